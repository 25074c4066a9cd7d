"""The command line answers quickly where there is nothing to compute: help, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.parametrize("command", [[], *([name] for name in ("train", "compare", "export", "serve", "evaluate"))])
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
        (("export", "missing"), "missing is no run record, no PEFT adapter and no model folder"),
        (("serve", "missing.gguf"), "missing.gguf is no GGUF file"),
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
