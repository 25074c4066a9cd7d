"""Our GGUF files against llama.cpp's own converters, run from the scripts that its Python source distribution carries.

The distribution is fetched by pip, held to a known hash, and kept in pytest's cache. One function of it is replaced:
its pre-tokenizer lookup knows published tokenizers only, by a hash of their ids, and refuses any trained elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
from filelock import FileLock

from grit_impl.export import export_adapter, export_merged

pytestmark = pytest.mark.nightly

PROJECT, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/")

# All conversions in one process: most of the time goes into its imports.
DRIVER = """
import json, runpy, sys
root, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
for script, pre, *arguments in jobs:
    TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
    sys.argv = [script, *arguments]
    runpy.run_path(f"{root}/{script}", run_name="__main__")
"""

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


def fetch(folder: Path) -> None:
    """Download the source distribution and unpack the converters as `folder`; skips where it cannot be had."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wanted = Path(temporary, "requirements.txt")
        wanted.write_text(f"{PROJECT}=={VERSION} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1"]
        source = ["--no-deps", f"--no-binary={PROJECT}", "--require-hashes", f"--requirement={wanted}"]
        try:
            done = subprocess.run(
                [*pip, *source, f"--dest={temporary}"], capture_output=True, text=True, timeout=600, check=False
            )
        except subprocess.TimeoutExpired as error:
            pytest.skip(f"cannot fetch {PROJECT} {VERSION}: no answer in {error.timeout:.0f} s")
        assert "DO NOT MATCH THE HASHES" not in done.stderr, done.stderr
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["pip failed"]
            pytest.skip(f"cannot fetch {PROJECT} {VERSION}: {reason[0]}")
        (archive,) = Path(temporary).glob("*.tar.gz")
        root = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.startswith(tuple(root + script for script in SCRIPTS)):
                    tar.extract(member, temporary, filter="data")
        Path(temporary, root).replace(folder)


@pytest.fixture(scope="module")
def llamacpp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with llama.cpp's converters."""
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")
    cache = getattr(request.config, "cache", None)
    folder = (cache.mkdir(PROJECT) if cache else tmp_path_factory.mktemp(PROJECT)) / VERSION
    with FileLock(folder.with_name(f"{VERSION}.lock")):
        if not folder.exists():
            fetch(folder)
    return folder


@pytest.fixture(scope="module")
def lab(llamacpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases, adapters, and llama.cpp's conversion of each as `<name>.<dtype>.gguf`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("converter")
    jobs = []

    def convert(script: str, name: str, dtypes: tuple[str, ...], pre: str, *options: str) -> None:
        for dtype in dtypes:
            out = root / f"{name}.{dtype}.gguf"
            jobs.append([script, pre, str(root / name), "--outtype", dtype, "--outfile", str(out), *options])

    for name, settings in BASES.items():
        tiny.make_base(root / name, **settings)
        convert(SCRIPTS[0], name, DTYPES, "gpt-2" if settings.get("split") else "llama-bpe")
    # As models are published.
    base = tiny.make_base(root / "stored-bf16", llama3_rope=True, seed=7)
    AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").save_pretrained(base)
    convert(SCRIPTS[0], "stored-bf16", DTYPES, "llama-bpe")
    base = root / "untied-llama3"
    for name, settings in ADAPTERS.items():
        lora = tiny.make_adapter(base, root / name, **settings)
        convert(SCRIPTS[1], name, ("f32", "f16"), "llama-bpe", "--base", str(base))
        merged = root / f"merged-{name}"
        tiny.make_tokenizer(merged)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
        adapted.merge_and_unload().save_pretrained(merged)
        convert(SCRIPTS[0], merged.name, DTYPES, "llama-bpe")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(llamacpp), json.dumps(jobs)],
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
