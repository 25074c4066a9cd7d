"""What a server changes when it is asked again: counted, shown, stored, and in the interval of every difference."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.evaluate import session
from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.gates import decide
from grit_impl.evaluate.noise import Noise
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.session import evaluate
from grit_impl.statistics.decision import Metric, decide_at_least
from grit_impl.statistics.intervals import wilson
from grit_impl.statistics.paired import paired_difference_interval

N, REPEATS = 50, 10
OPTIONS = EvaluationOptions(progress=False, backoff=0.001, speed_rounds=0, repeats=REPEATS)
MODELS = {"base": "base", "pure": "pure"}
DIGESTS = {"base:latest": "d0", "pure:latest": "d1"}
ITEMS = aqi.generate(N, seed=1)
TRUTH = {aqi.instruction(item): aqi.answer(item) for item in ITEMS}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """50 AQI questions."""
    path = tmp_path / "aqi.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


@pytest.fixture
def forgetful(fake_ollama):
    """A server whose second answer is another one for every question of `base`; a tie of 0.01 nats where they part."""
    seen: set[tuple[str, str]] = set()

    def answer(model: str, prompt: str) -> str:
        first = (model, prompt) not in seen
        seen.add((model, prompt))
        return TRUTH[prompt] if first or model == "pure" else "AQI is unknown"

    server = fake_ollama(answer, DIGESTS)

    def told(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if not request.get("logprobs"):
            return reply
        tops = [("A", -0.001, -9.0), ("QI", -0.001, -9.0), (" is", -0.69, -0.70)]
        told = [[{"token": word, "logprob": best}, {"token": "x", "logprob": other}] for word, best, other in tops]
        return {**reply, "logprobs": [{**top[0], "top_logprobs": top} for top in told]}

    server.edit = told
    return server


def test_what_changes_is_counted_stored_and_widens(forgetful, questions: Path, tmp_path: Path) -> None:
    """Oracle: the script: all of base's sample changes from right to wrong at a tie, none of pure's."""
    out = tmp_path / "out"
    evaluation = evaluate(forgetful.url, MODELS, questions, None, out, OPTIONS)
    assert evaluation.noise("base") == Noise(REPEATS, REPEATS, REPEATS, REPEATS, REPEATS, exact=False)
    assert evaluation.noise("pure") == Noise(REPEATS, 0, 0, 0, 0, exact=False)
    assert f"{REPEATS} of {REPEATS} differences begin at a tie below 0.02 nats" in str(evaluation.noise())
    share = 100 * (REPEATS + 1) / (2 * REPEATS + 2)
    plain = paired_difference_interval([True] * N, [True] * N).scaled(100)
    found = evaluation.metrics["pure"].delta_aqi.difference
    assert (found.low, found.high) == pytest.approx(
        (max(-100, plain.low - 2 * share), min(100, plain.high + 2 * share))
    )
    assert Evaluation.load(out).metrics == evaluation.metrics
    stored = json.loads((out / "evaluation.json").read_text())["noise"]["again"]
    assert (stored["changed"], stored["asked"]) == (REPEATS, 2 * REPEATS)
    judged = decide(evaluation, "delta_aqi", "pure", 0.0)
    assert {m.subject: m.estimate for m in judged.metrics if m.name == "answers_changed"} == {"base": 100, "pure": 0}
    asked = len(forgetful.requests)
    assert evaluate(forgetful.url, MODELS, questions, None, out, OPTIONS).noise() == evaluation.noise()
    assert len(forgetful.requests) == asked, "what was asked again is not asked a third time"


def test_an_exact_server_widens_nothing(fake_ollama, questions: Path, tmp_path: Path) -> None:
    """Oracle: the mark of the embedded server's version; a change that is seen all the same counts."""
    server = fake_ollama(lambda model, prompt: TRUTH[prompt], DIGESTS)
    once = evaluate(server.url, MODELS, questions, None, tmp_path / "real", OPTIONS)
    server.version = "0.33.0+grit"
    exact = evaluate(server.url, MODELS, questions, None, tmp_path / "embedded", OPTIONS)
    none = evaluate(server.url, MODELS, questions, None, tmp_path / "none", replace(OPTIONS, repeats=0))
    assert exact.noise("pure").share.estimate == once.noise("pure").share.estimate == 0
    plain = none.metrics["pure"].delta_aqi.difference
    assert exact.metrics["pure"].delta_aqi.difference == plain
    assert "no interval is widened" in str(exact.noise())
    assert once.metrics["pure"].delta_aqi.high == pytest.approx(plain.high + 200 / (2 * REPEATS + 2))
    assert "is not known" in str(none.noise())
    assert Noise(20, 1, 1, 0, 0, exact=True).allowance > 0


def test_what_more_questions_do_not_narrow_is_told() -> None:
    """Oracle: by hand: of a reach of 5 points 3 are the server's; 4 points away, 2 of 1 are left, so four times as many
    items; 2 points away none are enough."""
    metric = Metric("delta_aqi", 4.0, -1.0, 9.0, "points", 100, fixed=3.0)
    assert decide_at_least(metric, 0.0, "it", strictly=True).needed == 400
    near = decide_at_least(replace(metric, estimate=2.0, low=-3.0, high=7.0), 0.0, "it", strictly=True)
    assert near.needed is None
    assert "no sample size decides it: the server may have moved it by 3; ask more answers again" in near.summary


def test_two_servers_are_compared_on_the_sample(fake_ollama, questions: Path, tmp_path: Path) -> None:
    """Oracle: the other server says something else to pure's questions, in other words to base's."""
    here = fake_ollama(lambda model, prompt: TRUTH[prompt], DIGESTS)
    there = fake_ollama(lambda model, prompt: "no idea" if model == "pure" else f"{TRUTH[prompt]}!", DIGESTS)
    there.version = "0.34.0"
    found = evaluate(here.url, MODELS, questions, None, tmp_path / "out", OPTIONS, beside=there.url)
    (other,) = [name for name in found.noises() if name]
    assert other == f"{there.url}, 0.34.0"
    assert found.noise(beside=other) == Noise(2 * REPEATS, 2 * REPEATS, REPEATS, 0, 0, exact=False)
    assert found.noise() == Noise(2 * REPEATS, 0, 0, 0, 0, exact=False)
    told = decide(found, "delta_aqi", "pure", 0.0).evidence["asked again"]
    assert told[other] == "20 of 20 answers differ there (100.0% [83.9, 100.0]), 10 between right and wrong"


def test_the_other_server_is_tried_first(fake_ollama, questions: Path, tmp_path: Path) -> None:
    """Oracle: a port where nobody listens, and a server without one of the models: no question was asked."""
    here = fake_ollama(lambda model, prompt: TRUTH[prompt], DIGESTS)
    there = fake_ollama(lambda model, prompt: TRUTH[prompt], {})
    for url in ("http://127.0.0.1:9", there.url):
        with pytest.raises(GRITError, match=f"--beside-url {url}: "):
            evaluate(here.url, MODELS, questions, None, tmp_path / "out", replace(OPTIONS, backoff=0.0), beside=url)
    assert here.requests == []


def test_a_question_without_a_second_answer_is_told(fake_ollama, questions: Path, tmp_path: Path, monkeypatch) -> None:
    """Oracle: the first of twenty repeats fails, by a plant; the others are asked."""
    here = fake_ollama(lambda model, prompt: TRUTH[prompt], DIGESTS)
    original, failed = session._Session._one, []

    def one(self, task, other=None):
        if other is not None and not failed:
            failed.append(task)
            return self._row(task, error="as planted", faults=[])
        return original(self, task, other)

    monkeypatch.setattr(session._Session, "_one", one)
    found = evaluate(here.url, MODELS, questions, None, tmp_path / "out", OPTIONS)
    assert found.noise().asked == 2 * REPEATS - 1
    (note,) = [note for note in found.meta["notes"] if "as planted" in note]
    assert note.startswith("1 questions got no second answer")


def test_the_share_stands_beside_the_accuracy(forgetful, questions: Path, tmp_path: Path) -> None:
    """Oracle: the command's output."""
    code = "from grit_impl.cli import main; main()"
    given = ["--model", "base=base", "--model", "pure=pure", "--aqi-dataset", str(questions), "--no-knowledge"]
    given += ["--ollama-url", forgetful.url, "--out", str(tmp_path / "out"), "--speed-rounds", "0", "--repeats", "10"]
    done = subprocess.run([sys.executable, "-c", code, "evaluate", *given], capture_output=True, text=True, timeout=120)
    assert "changed" in done.stdout
    assert "server: 10 of 20 answers changed when asked again (50.0% [29.9, 70.1])" in done.stdout
    assert "10 of 10 differences begin at a tie below 0.02 nats" in done.stdout


# -- coverage ---------------------------------------------------------------------------------------------------------


def _rows(label: str, suite: str, rights: Any, **more: Any) -> list[dict[str, Any]]:
    return [
        {"label": label, "suite": suite, "item": str(i), "answer": str(right), "correct": bool(right),
         "scores": {"category_right": bool(right), "correct": bool(right)}, **more}
        for i, right in enumerate(rights)
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.02, 0.06])
def test_intervals_hold_what_an_exact_server_would_say(share: float) -> None:
    """Oracle: the exact results of the simulation; on this server they change, against pure and for the base alone.

    95% intervals of the difference, and of what a copy of the base retains, in 200 evaluations with 20 answers of each
    model asked again. Without being widened they miss.
    """
    rng, runs, facts = np.random.default_rng(3), 200, 200
    covered, plain = np.zeros(2), np.zeros(2)

    def answers(exact: Any, towards: bool) -> Any:
        """What is said this time: of the wrong (or right) ones, so many change that `share` differ between two asks."""
        rare = share / 2 / np.mean(exact != towards)
        return np.where((exact != towards) & (rng.random(len(exact)) < rare), towards, exact)

    for _ in range(runs):
        base, pure = rng.random(420) < 0.4, rng.random(420) < 0.6
        known = rng.random(facts) < 0.9
        sets = [("base", "aqi", base, True), ("pure", "aqi", pure, False), ("base", "knowledge", known, True)]
        sets.append(("pure", "knowledge", known, False))
        first, again = [], []
        for label, suite, exact, towards in sets:
            first += _rows(label, suite, answers(exact, towards))
            drawn = set(map(str, rng.choice(len(exact), 14 if suite == "aqi" else 6, replace=False)))
            again += [row for row in _rows(label, suite, answers(exact, towards), beside="") if row["item"] in drawn]
        for seen, counts in (([], plain), (again, covered)):
            found = Evaluation({"base": "b", "pure": "p"}, first, again=seen)
            delta, kept = found.compare("pure", "base").difference, found.retention("pure", wilson, 0.95)
            counts += (delta.low <= 20 <= delta.high, kept.high >= 100 - 1e-9)
    assert (covered / runs >= 0.94).all(), covered / runs
    assert (plain / runs < 0.9).any(), plain / runs
