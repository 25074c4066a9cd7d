"""`grit export`, `grit serve`, `grit deploy` from the command line. Oracles: files, exit statuses, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result

from grit_impl.errors import GRITError
from grit_impl.export import commands, export_merged, read_metadata
from grit_impl.record import RunRecord
from grit_impl.serve import commands as serving
from grit_impl.serve.server import EmbeddedOllama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(lab: SimpleNamespace, tmp_path: Path) -> Path:
    """A complete run record with an adapter."""
    record = RunRecord.create(tmp_path / "pure-seed1", arm="pure", base_model=str(lab.untied), config={})
    shutil.copytree(lab.untied_lora, record.adapter)
    record.finish()
    return record.path


def call(command: Any, *arguments: str | Path) -> Result:
    """Run a command as the command line does."""
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.mark.parametrize("target", ["gguf", "adapter"])
def test_export_writes_verifies_and_records(run: Path, target: str) -> None:
    """Oracle: the files, and the verification that the record keeps."""
    done = call(commands.export, run, "--to", target, "--dtype", "f16", "--verify")
    assert done.exit_code == 0, done.output
    assert "verified" in done.output
    kept = json.loads((run / "gguf" / "verification.json").read_text())
    assert kept["verification"]["passed"] is True
    assert kept["verification"]["prompts"] == 20
    assert kept["verification"]["max_difference"] < 5e-2
    assert (run / "gguf" / "Modelfile").is_file()
    names = {"gguf": {"model-f16.gguf"}, "adapter": {"base-f16.gguf", "adapter-f16.gguf"}}[target]
    assert {Path(f["path"]).name for f in kept["files"]} == names


def test_export_of_a_foreign_file_is_verified_the_same_way(run: Path, lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: a good file passes; the base's export, taken for the merged model, ends with status 1 and its name."""
    good = export_merged(lab.untied, lab.untied_lora, tmp_path / "good.gguf").path
    bad = export_merged(lab.untied, None, tmp_path / "bad.gguf").path
    assert call(commands.export, run, "--existing", good).exit_code == 0
    failed = call(commands.export, run, "--existing", bad)
    assert failed.exit_code == 1
    assert "no-op-merge" in failed.output


def test_export_to_ollama_and_deploy(run: Path) -> None:
    """Oracle: the server's list of models."""
    with EmbeddedOllama({}) as server:
        done = call(commands.export, run, "--to", "ollama", "--ollama-url", server.url)
        assert done.exit_code == 0, done.output
        again = call(commands.deploy, run, "--name", "mine", "--ollama-url", server.url)
        assert again.exit_code == 0, again.output
        assert sorted(server.models.by_key) == ["grit-pure:latest", "mine:latest"]
        assert "0.0 MiB sent" in again.output
        assert call(commands.deploy, "--delete", "mine", "--ollama-url", server.url).exit_code == 0
        assert sorted(server.models.by_key) == ["grit-pure:latest"]


def refuse(command: Any, *arguments: str | Path) -> str:
    """The one line of a refusal."""
    done = call(command, *arguments)
    assert isinstance(done.exception, GRITError), done.output
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_bad_input_is_one_line(run: Path, tmp_path: Path) -> None:
    """Oracle: a GRITError, which the command line prints and turns into status 2."""
    assert "no run record" in refuse(commands.export, tmp_path)
    assert "unknown base model" in refuse(commands.export, run, "--base", "./absent")
    (run / "COMPLETE").unlink()
    assert "not complete" in refuse(commands.export, run)
    assert "no Ollama at" in refuse(commands.deploy, "--delete", "x", "--ollama-url", "127.0.0.1:9")
    assert "run grit export first" in refuse(commands.deploy, run)
    assert "nothing to deploy" in refuse(commands.deploy)
    assert "run grit export first" in refuse(serving.serve, tmp_path / "absent.gguf")


def test_help_is_instant() -> None:
    """Oracle: the modules that a help text loads: neither torch nor the server."""
    code = "import sys, grit_impl.export.commands as c; assert not {'torch', 'uvicorn', 'gguf'} & set(sys.modules)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert time.perf_counter() - start < 10
    for command in (commands.export, serving.serve, commands.deploy):
        assert "Usage" in call(command, "--help").output


def test_parameters_reach_the_modelfile(run: Path) -> None:
    """Oracle: the file's text."""
    call(commands.export, run, "--temperature", "0.7", "--min-p", "0.05", "--num-ctx", "1024")
    text = (run / "gguf" / "Modelfile").read_text()
    for line in ("PARAMETER temperature 0.7", "PARAMETER min_p 0.05", "PARAMETER num_ctx 1024", "TEMPLATE"):
        assert line in text


def test_adapter_folder_and_base_folder(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the fingerprint in the files; an adapter folder knows its base."""
    lora = tiny.make_adapter(lab.untied, tmp_path / "lora")
    assert call(commands.export, lora).exit_code == 0
    assert call(commands.export, lab.untied, "--out", tmp_path / "base").exit_code == 0
    files = (lora / "gguf" / "model-q8_0.gguf", tmp_path / "base" / "model-q8_0.gguf")
    assert len({read_metadata(file)["grit.base_fingerprint"] for file in files}) == 1
    assert "--out" in refuse(commands.export, lab.untied)
