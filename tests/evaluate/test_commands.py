"""`grit evaluate` from the outside: what is printed, the exit status, and one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

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
        (("--scorer", "vibes"), "--scorer takes the name of a scorer: see --help, not 'vibes'"),
        (("--prompt", "Say it"), "--prompt takes a text with {features} in it, where the question goes, not 'Say it'"),
        (("--answer-format", "AQI 42 (Good)"), "--answer-format takes a form without digits"),
        (("--knowledge-by", "guess"), "--knowledge-by takes answer or likelihood, not 'guess'"),
        (("--max-tokens", "0"), "--max-tokens takes a whole number of at least 1, not '0'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments, message: str) -> None:
    """Oracle: the message, on standard error, without a traceback; nothing is written."""
    done = _grit(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sentiments(fake_ollama, tmp_path: Path):
    """An own task and a server that answers it in sentences, but only if the question comes as it is."""
    rows = [
        {"features": f"Is {word} praise?", "answer": answer}
        for word, answer in [
            ("wonderful", "positive"),
            ("dreadful", "negative"),
            ("superb", "positive"),
            ("dull", "negative"),
        ]
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth = {row["features"]: row["answer"] for row in rows}

    def answer(model: str, prompt: str) -> str:
        right = truth.get(prompt)
        if right is None or model == "mute":
            return "As I said before, this depends on many things."
        wrong = "negative" if right == "positive" else "positive"
        return f"The sentiment is {right}, not {wrong}." if model == "pure" else f"It is {wrong}."

    return fake_ollama(answer, {f"{name}:latest": name for name in ("base", "pure", "mute")}, lambda model: 100.0)


OWN = ("--no-knowledge", "--speed-rounds", "0")


def test_a_task_of_ones_own(sentiments, tmp_path: Path) -> None:
    """Oracle: by script base has all wrong and pure all right; no AQI prefix, and what is sent is said."""
    mine, junit = str(tmp_path / "mine.jsonl"), tmp_path / "junit.xml"
    asked = ("--ollama-url", sentiments.url, "--aqi-dataset", mine, "--out", str(tmp_path / "out"), *OWN)
    done = _grit("--model", "base=base", "--model", "pure=pure", *asked, "--junit", str(junit))
    assert done.returncode == 0, done.stderr
    assert "4 questions, sent as '{features}', read by the scorer contains-as-answer" in done.stdout
    assert "base on the first 4 questions: 0 right, 0 that answer nothing" in done.stdout
    assert "'Is wonderful praise?' -> 'It is negative.' (wrong)" in done.stdout
    assert "delta_aqi of pure is 100.00 points" in done.stdout
    assert "warning" not in done.stderr
    assert {request["prompt"] for request in sentiments.requests} == {
        json.loads(line)["features"] for line in (tmp_path / "mine.jsonl").read_text().splitlines()
    }
    (suite,) = ET.parse(junit).getroot()
    assert [(case.get("classname"), case.get("name")) for case in suite] == [
        ("evaluate.pure", "delta_aqi"),
        ("evaluate.pure", "delta_speed"),
    ]
    # Four questions decide nothing at the confidence of a gate, and no speed was measured.
    assert [case[0].tag for case in suite] == ["skipped", "skipped"]


def test_a_wrong_prompt_is_seen_before_the_full_run(sentiments, tmp_path: Path) -> None:
    """Oracle: the server knows the bare question alone; the warning names what to look at."""
    mine = str(tmp_path / "mine.jsonl")
    asked = ("--ollama-url", sentiments.url, "--aqi-dataset", mine, "--out", str(tmp_path / "out"), *OWN)
    done = _grit("--model", "base=base", *asked, "--prompt", "Q: {features}", "--answer-format", "<sentiment>")
    assert done.returncode == 0, done.stderr
    assert "base on the first 4 questions: 0 right, 4 that answer nothing" in done.stdout
    assert "warning: 4 of 4 answers say nothing that the scorer can read: see --scorer, --prompt" in done.stderr
    assert sentiments.requests[0]["prompt"] == "Q: Is wonderful praise?\n\nAnswer in this form: <sentiment>"


def test_refuted_thresholds_are_failures_in_junit() -> None:
    """Oracle: counts by hand."""
    from grit_impl.evaluate.gates import Gate
    from grit_impl.evaluate.terminal import junit_xml
    from grit_impl.statistics.decision import Judgement

    gates = [
        Gate("delta_aqi", "pure", Judgement(verdict, verdict)) for verdict in ("supported", "refuted", "inconclusive")
    ]
    (suite,) = ET.fromstring(junit_xml(gates).partition("\n")[2])
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    assert [[child.tag for child in case] for case in suite] == [[], ["failure"], ["skipped"]]
