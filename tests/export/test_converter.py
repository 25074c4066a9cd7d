"""Our GGUF files against llama.cpp's own converters (`llamacpp_converter`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
from llamacpp_converter import LORA_SCRIPT, command, converters, job

from grit_impl.export import export_adapter, export_merged

pytestmark = pytest.mark.nightly

BASES: dict[str, dict[str, Any]] = {
    "untied-default": {"seed": 3},
    "untied-llama3": {"llama3_rope": True, "pad_rows": 13, "seed": 4},
    "tied-default": {"tied": True, "split": "gpt2", "seed": 5},
    "tied-llama3": {"tied": True, "llama3_rope": True, "pad_rows": 13, "split": "gpt2", "seed": 6},
}
# Scalings that the converter writes rightly: it knows one alpha, and llama.cpp divides it by each tensor's rank.
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-pattern": {"lora_alpha": 10, "rank_pattern": {"v_proj": 3, "down_proj": 16}},
}
DTYPES = ("f32", "f16", "bf16", "q8_0")


@pytest.fixture(scope="module")
def llamacpp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with llama.cpp's converters."""
    return converters(request, tmp_path_factory)


@pytest.fixture(scope="module")
def lab(llamacpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases, adapters, and llama.cpp's conversion of each as `<name>.<dtype>.gguf`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("converter")
    jobs = []

    def convert(name: str, dtypes: tuple[str, ...] = DTYPES, *options: str, **settings: str) -> None:
        for dtype in dtypes:
            jobs.append(job(root / name, dtype, root / f"{name}.{dtype}.gguf", *options, **settings))

    for name, settings in BASES.items():
        tiny.make_base(root / name, **settings)
        convert(name, pre="gpt-2" if settings.get("split") else "llama-bpe")
    # As models are published.
    base = tiny.make_base(root / "stored-bf16", llama3_rope=True, seed=7)
    AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").save_pretrained(base)
    convert("stored-bf16")
    base = root / "untied-llama3"
    for name, settings in ADAPTERS.items():
        lora = tiny.make_adapter(base, root / name, **settings)
        convert(name, ("f32", "f16"), "--base", str(base), script=LORA_SCRIPT)
        merged = root / f"merged-{name}"
        tiny.make_tokenizer(merged)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
        adapted.merge_and_unload().save_pretrained(merged)
        convert(merged.name)
    done = subprocess.run(
        command(llamacpp, jobs),
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's tensors (type, shape, bytes) and the keys that say how to compute with them, each by name."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
    known = ("general.architecture", "general.type", "llama.", "tokenizer.", "adapter.")
    return tensors, {name: field.contents() for name, field in reader.fields.items() if name.startswith(known)}


def same(ours: Path, theirs: Path) -> None:
    """Assert that two files hold the same tensors, byte for byte, and the same keys."""
    for mine, official in zip(read(ours), read(theirs), strict=True):
        assert official
        assert mine.keys() == official.keys()
        assert [name for name in official if mine[name] != official[name]] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [*BASES, "stored-bf16"])
def test_model_is_byte_identical(lab: Path, tmp_path: Path, base: str, dtype: str) -> None:
    """Oracle: the file that llama.cpp's `convert_hf_to_gguf.py` writes of the same folder."""
    ours = export_merged(lab / base, None, tmp_path / "ours.gguf", dtype)
    same(ours.path, lab / f"{base}.{dtype}.gguf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merged_model_is_byte_identical(lab: Path, tmp_path: Path, adapter: str, dtype: str) -> None:
    """Oracle: llama.cpp's `convert_hf_to_gguf.py` on the model as PEFT's `merge_and_unload` merges it."""
    ours = export_merged(lab / "untied-llama3", lab / adapter, tmp_path / "ours.gguf", dtype)
    same(ours.path, lab / f"merged-{adapter}.{dtype}.gguf")


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_is_byte_identical(lab: Path, tmp_path: Path, adapter: str, dtype: str) -> None:
    """Oracle: the file that llama.cpp's `convert_lora_to_gguf.py` writes of the same adapter."""
    ours = export_adapter(lab / "untied-llama3", lab / adapter, tmp_path / "ours.gguf", dtype)
    same(ours.path, lab / f"{adapter}.{dtype}.gguf")
