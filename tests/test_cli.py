"""The command line answers quickly where there is nothing to compute: help, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import grit_impl

# Packages that take long to import.
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "pandas", "scipy", "matplotlib", "numpy"}
MOST_CPU_SECONDS = 1.0
CODE = """
import atexit, sys, time
atexit.register(lambda: print("HEAVY", sorted({heavy} & set(sys.modules)), "CPU", time.process_time()))
from grit_impl.cli import main
sys.argv = {arguments}
main()
"""


def grit(*arguments: str) -> tuple[subprocess.CompletedProcess[str], str, float]:
    """The command, which heavy packages it imported, and its CPU seconds."""
    code = CODE.format(heavy=HEAVY, arguments=["grit", *arguments])
    environment = {**os.environ, "PYTHONPATH": str(Path(grit_impl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    imported, _, seconds = done.stdout.rpartition("HEAVY ")[2].partition(" CPU ")
    return done, imported, float(seconds)


@pytest.mark.parametrize(
    "command", [[], *([name] for name in ("try", "train", "compare", "export", "serve", "evaluate"))]
)
def test_help_is_light(command):
    """Oracle: sys.modules after `grit --help`; what made it slow would be one of these."""
    done, imported, _ = grit(*command, "--help")
    assert "Usage:" in done.stdout
    assert (done.returncode, imported) == (0, "[]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--dataset", "missing.jsonl"), "cannot read missing.jsonl: there is no such file"),
        (("train", "--dataset", "riddles"), "unknown data set 'riddles': use alpaca"),
        (("train", "--base-model", "nope"), "unknown base model 'nope': give tiny"),
        (("train", "--set", "damping=1"), "GRITConfig has no option 'damping'"),
        (("train", "--lr", "fast"), "--learning-rate takes a number above 0, not 'fast'"),
        (("try", "--dataset", "missing.jsonl"), "cannot read missing.jsonl: there is no such file"),
        (("try", "--dataset", "aqi", "--metric", "best"), "--metric takes one of loss, exact, numeric, choice, regex"),
        (("try", "--dataset", "aqi", "--seeds", "2"), "--seeds takes a whole number of at least 3, not '2'"),
        (("try", "--dataset", "aqi", "--metric", "regex"), "--pattern and --metric regex go together"),
        (("export", "missing"), "missing is no run record, no PEFT adapter and no model folder"),
        (("serve", "missing.gguf"), "missing.gguf is no GGUF file"),
        (("serve", "x.gguf", "--conformance", "h:1"), "--conformance asks h:1 and serves nothing: leave out x.gguf"),
        (("serve", "x.gguf", "--junit", "rows.xml"), "--junit writes the rows of --conformance: give both"),
        (("deploy", "missing"), "missing is no GGUF file"),
        (("evaluate", "--model", "base=x", "--aqi-dataset", "missing.jsonl"), "cannot read missing.jsonl"),
        (("evaluate", "--min-retention", "700"), "--min-retention takes a percentage between 0 and 100, not '700'"),
        (("compare", "a", "b"), "a: no such file or folder"),
        (("compare", "--arm", "x=a", "--arm", "y=b"), "a: no such file or folder"),
        (("compare",), "takes two runs, A and B, got 0"),
        (("report", "--reports-dir", "missing"), "no results in missing/results.db"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_are_light(arguments, message, monkeypatch, tmp_path):
    """Oracle: one message, status 2, no traceback, before anything heavy is imported, in less than a CPU second."""
    monkeypatch.chdir(tmp_path)
    done, imported, seconds = grit(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert imported == "[]"
    assert seconds < MOST_CPU_SECONDS


MODEL_OR_ROWS = {
    "alignment-index": ("alignment-index", "no-such/model", "--prompts", "rows.jsonl"),
    "export": ("export", "adapter"),
    "train": ("train", "--base-model", "no-such/model", "--dataset", "rows.jsonl", "--out", "run"),
    "train on rows": ("train", "--dataset", "no-such/rows", "--steps", "1", "--out", "run"),
    "evaluate": ("evaluate", "--model", "base=x", "--aqi-dataset", "no-such/rows"),
}


@pytest.mark.parametrize(
    ("command", "hub"),
    [*((name, "refuses") for name in MODEL_OR_ROWS), ("alignment-index", "is silent"), ("evaluate", "is silent")],
)
def test_a_hub_out_of_reach_is_said_at_once(command, hub, tmp_path, monkeypatch):
    """Oracle: one line within seconds; six attempts take half a minute, a download waits for minutes."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 4)
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "no-such/model"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with socket.socket() as server:  # bound, so that nobody else has the port
        server.bind(("127.0.0.1", 0))
        if hub == "is silent":
            server.listen(64)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        done, _, cpu = grit(*MODEL_OR_ROWS[command])
    waited = time.monotonic() - started
    said = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert (done.returncode, len(said), said[0][:13]) == (
        2,
        1,
        "error: cannot" if "rows" in said[0] else "error: base m",
    )
    # 10 s of waiting, and imports, which take their CPU time times whatever else this machine does.
    assert waited < (30 if hub == "is silent" else 15) + 8 * cpu
