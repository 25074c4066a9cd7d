"""Base models: the embedded tiny one, a folder, a hub id, or random weights in the shape of a Llama.

Random shapes are built one layer at a time on the device, and quantised on the way where asked, so that 8B
parameters never need more than one layer in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grit_impl.errors import GRITError
from grit_impl.files import FIXTURES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = FIXTURES / "tiny_llama"
"""Folder of the embedded base model."""

# Shapes as published in the models' config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    # A quarter of the layers and hardly a vocabulary: a step takes a quarter of the time.
    "llama-3-8b-8-layers": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
}
INITIAL_STD, RANDOM_SEED = 0.02, 3407


def load_base(
    spec: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    four_bit: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        spec: `tiny`, a folder of a transformers model, a hub id, or `random:llama-1b`, `random:llama-3-8b`,
            `random:tiny` (fixed seed; the tiny base's tokenizer).
        dtype: Of the weights that are not quantised. Default: float32 on the CPU, bfloat16 on a GPU.
        device: Default: the GPU if there is one.
        four_bit: NF4 with double quantisation. Default: only `random:llama-3-8b` on a GPU. A checkpoint that is
            already quantised stays as it is.

    Raises:
        GRITError: nothing by that name can be loaded, an unknown dtype, or `four_bit` without bitsandbytes.
    """
    import torch

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = _dtype(dtype, target)
    name = str(spec)
    shape = name.removeprefix("random:") if name.startswith("random:") else None
    if four_bit is None:
        four_bit = shape == "llama-3-8b" and target.type == "cuda"
    if four_bit:
        _require_bitsandbytes()
    if shape is not None:
        if shape not in SHAPES:
            raise GRITError(f"unknown random shape {shape!r}: use {', '.join(f'random:{key}' for key in SHAPES)}")
        return _random(SHAPES[shape], precision, target, four_bit), _tokenizer(TINY, "tiny")
    return _pretrained(name, precision, target, four_bit)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pretrained(
    name: str, dtype: torch.dtype, device: torch.device, four_bit: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source: str | Path = TINY if name == "tiny" else name
    if Path(source).is_dir() or name == "tiny":
        if not (Path(source) / "config.json").is_file():
            remedy = "rebuild it with python -m grit_impl.recipes.tiny_llama --out " + str(TINY)
            raise GRITError(
                f"base model {name}: {source} has no config.json: {remedy if name == 'tiny' else 'give a model folder'}"
            )
    elif name.count("/") > 1 or name.startswith((".", "~")):
        raise GRITError(f"unknown base model {name!r}: there is no such folder")
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
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:  # transformers, safetensors and the hub client raise many unrelated types
        raise GRITError(
            f"cannot load base model {name!r}: {_first_line(error)}; use tiny, random:llama-1b, random:llama-3-8b, "
            "random:tiny, a model folder or a reachable hub id"
        ) from error
    return model, _tokenizer(source, name)


def _tokenizer(source: str | Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as above
        raise GRITError(f"cannot load the tokenizer of base model {name!r}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _random(shape: dict[str, Any], dtype: torch.dtype, device: torch.device, four_bit: bool) -> PreTrainedModel:
    """A Llama with normal weights, materialised module by module from the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # A dictionary: transformers 4 declares rope_theta, 5 takes it for compatibility only.
    rest: dict[str, Any] = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    config = LlamaConfig(**shape, **rest, bos_token_id=0, eos_token_id=1)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.config.dtype = dtype
    generator = torch.Generator(device).manual_seed(RANDOM_SEED)

    def normal(size: torch.Size) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, INITIAL_STD, generator=generator)

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Embedding):
            module.weight = torch.nn.Parameter(normal(module.weight.shape))
        elif isinstance(module, torch.nn.Linear):
            # The head stays in full precision, as in quantised checkpoints.
            if four_bit and name != "lm_head":
                model.set_submodule(name, _linear4bit(module, normal, dtype, device))
            elif not (name == "lm_head" and config.tie_word_embeddings):
                module.weight = torch.nn.Parameter(normal(module.weight.shape))
        elif getattr(module, "weight", None) is not None:
            module.weight = torch.nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device))
    # Its frequencies are computed, not loaded: the meta device kept nothing of them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    if four_bit:
        setattr(model, "is_loaded_in_4bit", True)  # noqa: B010  peft looks at it to pick its 4-bit layers
    model.train(False)
    return model


def _linear4bit(
    module: torch.nn.Linear, normal: Callable[[Any], torch.Tensor], dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    layer = Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = Params4bit(
        normal(module.weight.shape),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to(device)
    return cast("torch.nn.Module", layer)


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer that transformers 4 and 5 both load: 5 writes a class name that 4 does not know."""
    tokenizer.save_pretrained(folder)
    config = Path(folder, "tokenizer_config.json")
    config.write_bytes(config.read_bytes().replace(b"TokenizersBackend", b"PreTrainedTokenizerFast"))


def resolve_base(spec: str) -> Path:
    """The folder of a base model: `tiny`, a folder, or a hub id, which is downloaded if the hub is reachable.

    Raises:
        GRITError: there is no such model.
    """
    folder = TINY if spec == "tiny" else Path(spec)
    if folder.is_dir():
        return folder
    if spec.startswith("random:"):
        raise GRITError(f"{spec} has no files: save it with python -m grit_impl.recipes.random_base {spec} FOLDER")
    if spec.count("/") != 1 or spec.startswith((".", "~")):
        raise GRITError(f"unknown base model {spec!r}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(spec, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # the hub client raises many unrelated types
        raise GRITError(
            f"base model {spec!r} is neither a folder nor on the hub ({str(error).splitlines()[0]})"
        ) from error
