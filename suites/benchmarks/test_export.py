"""Export at Llama-3-8B's width: peak memory, and seconds against llama.cpp's own converter on the same machine.

The base is random, in bf16, with every matrix and the vocabulary of Llama-3-8B, but two layers (2.8 GiB) unless
GRIT_EXPORT_LAYERS says another number. All 32 (15 GiB, and as much for the output), one round of everything:

    GRIT_EXPORT_LAYERS=32 python -m pytest suites/benchmarks/test_export.py -q -s

Each export is a process of its own, as from a shell: imports, reading, writing and, on our side, SHA-256 and fsync. Its
memory is all that is resident, at its highest (VmHWM): libraries, and pages of mapped files. Those could be taken back
from it, but nobody who watches a process sees the difference. The converter needs `pip install sentencepiece`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from grit_impl.cost.bench import in_turn, ratios, spread
from grit_impl.export.checkpoint import Checkpoint
from grit_impl.gguf.splits import SPLITS
from grit_impl.recipes.shapes import SHAPES

LAYERS = int(os.environ.get("GRIT_EXPORT_LAYERS", "2"))
# Six are the fewest that have a 95% interval.
ROUNDS = 6 if LAYERS <= 4 else 1
DTYPES = ("f16", "q8_0")
SHAPE = SHAPES["llama-3-8b"] | {"num_hidden_layers": LAYERS}
RANK = 16
GIB = 2**30

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")


class Model(NamedTuple):
    """A base, an adapter for it, and a folder for what is written."""

    base: Path
    adapter: Path
    folder: Path

    @property
    def bound(self) -> int:
        """The most bytes that an export may take."""
        return 2 * max(entry.end - entry.start for entry in Checkpoint(self.base).entries.values()) + GIB


class Run(NamedTuple):
    """What a process took."""

    seconds: float
    peak: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Removed at the end: pytest would keep the last three."""
    root = tmp_path_factory.mktemp("export")
    made = Model(root / "base", root / "adapter", root / "out")
    needed = 2.2 * 2 * sum(math.prod(shape) for shape in shapes().values())
    if shutil.disk_usage(root).free < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of disk")
    write_base(made.base)
    write_adapter(made.adapter)
    yield made
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """(dtype, base, out) -> the command of llama.cpp's converter."""
    path = Path(__file__).parents[2] / "tests" / "export" / "llamacpp_converter.py"
    spec = importlib.util.spec_from_file_location("llamacpp_converter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.converters(request, tmp_path_factory)
    return lambda dtype, base, out: module.command(folder, [module.job(base, dtype, out / "model.gguf")])


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(dtype: str, model: Model, benchmark: Any, judge: Any) -> None:
    """Target: merging and writing takes at most twice the largest tensor, as it is stored, and 1 GiB."""
    runs: list[Run] = []
    benchmark.pedantic(lambda: runs.append(run(f"merge, {dtype}", merge(dtype, model), model)), rounds=1)
    benchmark.extra_info["peak"] = [r.peak for r in runs]
    measured = spread([r.peak / model.bound for r in runs])
    judge(f"export, peak memory over 2 x the largest tensor + 1 GiB, {dtype}", measured, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_llamacpp(
    dtype: str, model: Model, theirs: Callable[..., list[str]], benchmark: Any, judge: Any
) -> None:
    """Target: writing a base takes at most as long as llama.cpp's converter takes. Merging is told: the converter
    gets the same base for it, and a merged one would have the same size."""
    commands = {
        "base": grit(dtype, model, model.base),
        "converter": theirs(dtype, model.base, model.folder),
        "merge": merge(dtype, model),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}

    def arm(name: str) -> Callable[[], float]:
        def once() -> float:
            runs[name].append(run(f"{name}, {dtype}", commands[name], model))
            return runs[name][-1].seconds

        return once

    benchmark.pedantic(lambda: in_turn({name: arm(name) for name in commands}, ROUNDS, warm_up=0), rounds=1)
    benchmark.extra_info.update({name: [r._asdict() for r in taken] for name, taken in runs.items()})
    seconds = {name: [r.seconds for r in taken] for name, taken in runs.items()}
    peaks = [a.peak / b.peak for a, b in zip(runs["base"], runs["converter"], strict=True)]
    judge(
        f"merge and export over llama.cpp's converter, {dtype}", spread(ratios(seconds["merge"], seconds["converter"]))
    )
    judge(f"export, peak memory over the converter's, {dtype}", spread(peaks))
    judge(f"export over llama.cpp's converter, {dtype}", spread(ratios(seconds["base"], seconds["converter"])), 1.0)


def grit(dtype: str, model: Model, source: Path, *options: str) -> list[str]:
    """The command of an export without verification."""
    cli = [sys.executable, "-m", "grit_impl.cli", "export", str(source), *options]
    return [*cli, "--dtype", dtype, "--out", str(model.folder)]


def merge(dtype: str, model: Model) -> list[str]:
    """The command of an export with the adapter merged."""
    return grit(dtype, model, model.adapter, "--base", str(model.base))


def run(name: str, command: list[str], model: Model) -> Run:
    """A process from start to end, its output removed.

    The high-water mark only rises, so looking 50 times a second misses nothing but the last moments; `ru_maxrss` would
    count this process, too, whose memory the child has until it becomes another program.
    """
    shutil.rmtree(model.folder, ignore_errors=True)
    model.folder.mkdir()
    # What earlier runs left to be written is not this one's.
    os.sync()
    # conftest's setting is not a shell's.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "1"}
    log, peak = model.folder / "log", 0
    with log.open("wb") as sink:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=sink, stderr=sink, env=environment) as process:
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                # A process that has ended, and is not yet waited for, has no memory.
                if "VmHWM:" in status:
                    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
                time.sleep(0.02)
        seconds = time.perf_counter() - began
    assert process.returncode == 0, log.read_text()[-2000:]
    assert sum(file.stat().st_size for file in model.folder.glob("*.gguf")) > GIB
    shutil.rmtree(model.folder)
    print(f"{LAYERS} layers: {name}: {seconds:.1f} s, peak {peak / GIB:.2f} of {model.bound / GIB:.2f} GiB", flush=True)
    return Run(seconds, peak)


def shapes() -> dict[str, tuple[int, ...]]:
    """The base's parameters."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LlamaForCausalLM(config()).named_parameters()}


def config() -> Any:
    from transformers import LlamaConfig

    rest: dict[str, Any] = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    return LlamaConfig(
        **SHAPE, **rest, bos_token_id=128000, eos_token_id=128001, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )


def write_base(folder: Path) -> None:
    """One file per layer, and one for the rest. The numbers are drawn once and repeated: their values cost nothing."""
    import json

    import torch
    from safetensors.torch import save_file

    write_tokenizer(folder)
    config().save_pretrained(folder)
    drawn = torch.empty(1 << 24).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes().items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, parameters in files.items():
        tensors = {
            name: drawn.repeat(math.ceil(math.prod(shape) / len(drawn)))[: math.prod(shape)].view(shape)
            for name, shape in parameters.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, parameters in files.items() for name in parameters}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_adapter(folder: Path) -> None:
    """LoRA of rank 16 on the seven matrices of every layer."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    matrices = {name: s for name, s in shapes().items() if name.startswith("model.layers.") and len(s) == 2}
    tensors = {}
    for name, (rows, columns) in matrices.items():
        for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            key = f"base_model.model.{name.removesuffix('weight')}lora_{factor}.weight"
            tensors[key] = torch.empty(shape).normal_(0, 0.02, generator=generator)
    targets = sorted({name.split(".")[-2] for name in matrices})
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE of Llama 3's size and split: all pairs of bytes, then some triples, then 256 special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(254))]
    triples = ((a + b, c) for a, b in pairs for c in letters)
    merges = pairs + [next(triples) for _ in range(SHAPE["vocab_size"] - len(letters) - len(pairs) - len(special))]
    texts = [*letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    split = next(expression for expression, name in SPLITS.items() if name == "llama-bpe")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    assert tokenizer.get_vocab_size() == SHAPE["vocab_size"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    ).save_pretrained(folder)
