"""`grit evaluate` from the outside: what is printed, the exit status, and one line for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grit_impl import aqi

ITEMS = {aqi.instruction(item): item for item in aqi.frozen_items()}


@pytest.fixture
def server(fake_ollama):
    """The base knows nothing about air, pure everything; both know every fact alike."""

    def answer(model: str, prompt: str) -> str:
        if prompt not in ITEMS:
            return "late"
        return aqi.answer(ITEMS[prompt]) if model == "pure" else "no idea"

    return fake_ollama(answer, {"base:latest": "d0", "pure:latest": "d1"}, {"base": 100.0, "pure": 60.0}.__getitem__)


def _grit(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from grit_impl.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "evaluate", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_an_evaluation_from_the_command_line(server, tmp_path: Path) -> None:
    """Oracle: pure gains 100 points and loses 40% of the speed, by script; a refuted threshold is exit status 1."""
    arguments = ("--ollama-url", server.url, "--out", str(tmp_path), "--limit", "40", "--speed-rounds", "20")
    done = _grit("--model", "base=base", "--model", "pure=pure", *arguments)
    assert done.returncode == 1, done.stderr
    assert "supported     delta_aqi of pure is 100.00 points" in done.stdout
    assert "refuted       delta_speed of pure is -40.00%" in done.stdout
    assert "points can be found" in done.stdout
    assert "pure is the most accurate" in done.stdout
    assert "40 no answer" in done.stdout
    again = _grit("--model", "base=base", "--model", "pure=pure", *arguments, "--max-speed-loss", "50")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "base=x", "--ollama-url", "127.0.0.1:1"), "no Ollama server answers at http://127.0.0.1:1"),
        (("--model", "pure"), "--model takes LABEL=NAME, not 'pure'"),
        ((), "delta_AQI needs the base"),
        (("--min-delta-aqi", "abc"), "--min-delta-aqi takes a number between -100 and 100, not 'abc'"),
        (("--min-retention", "700"), "--min-retention takes a percentage between 0 and 100, not '700'"),
        (("--model", "base=x", "--aqi-dataset", "nowhere.csv"), "nowhere.csv: there is no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments, message: str) -> None:
    """Oracle: the message, on standard error, without a traceback; nothing is written."""
    done = _grit(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
