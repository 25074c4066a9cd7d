"""llama.cpp's own converters, from the scripts that its Python source distribution carries.

The distribution is fetched by pip, held to a known hash, and kept in pytest's cache. One function of it is replaced:
its pre-tokenizer lookup knows published tokenizers only, by a hash of their ids, and refuses any trained elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

PROJECT, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
MODEL_SCRIPT, LORA_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
PARTS = (MODEL_SCRIPT, LORA_SCRIPT, "conversion/", "gguf-py/gguf/")

# All conversions in one process: most of the time on small models goes into its imports.
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


def converters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with llama.cpp's converters; skips where they cannot be had."""
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")
    cache = getattr(request.config, "cache", None)
    folder = (cache.mkdir(PROJECT) if cache else tmp_path_factory.mktemp(PROJECT)) / VERSION
    with FileLock(folder.with_name(f"{VERSION}.lock")):
        if not folder.exists():
            _fetch(folder)
    return folder


def command(folder: Path, jobs: Sequence[Sequence[str]]) -> list[str]:
    """The command of a process that does `jobs`: (script, name of the pre-tokenizer, its arguments ...) each."""
    return [sys.executable, "-c", DRIVER, str(folder), json.dumps(jobs)]


def job(
    source: Path, dtype: str, out: Path, *options: str, script: str = MODEL_SCRIPT, pre: str = "llama-bpe"
) -> list[str]:
    """One conversion of a model's folder, or an adapter's."""
    return [script, pre, str(source), "--outtype", dtype, "--outfile", str(out), *options]


def _fetch(folder: Path) -> None:
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
                if member.name.startswith(tuple(root + part for part in PARTS)):
                    tar.extract(member, temporary, filter="data")
        Path(temporary, root).replace(folder)
