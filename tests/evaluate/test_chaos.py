"""A network and a server that misbehave: the accuracy is the undisturbed one, or the evaluation says inconclusive."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from grit_impl import aqi
from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.gates import judge
from grit_impl.evaluate.session import evaluate

N = 250
MODELS = {"base": "base", "baseline": "baseline", "pure": "pure", "hybrid": "hybrid"}
RIGHT = {"base": 0.2, "baseline": 0.6, "pure": 0.65, "hybrid": 0.6}


@pytest.fixture
def server(fake_ollama):
    """Four models that answer the same 250 questions, each with its own share of right, wrong and empty answers."""
    items = {aqi.instruction(item): item for item in aqi.generate(N, seed=1)}

    def answer(model: str, prompt: str) -> str:
        luck = random.Random(f"{model} {prompt}").random()
        if luck < RIGHT[model]:
            return aqi.answer(items[prompt])
        return "" if luck > 0.98 else f"AQI {int(luck * 500)}"

    return fake_ollama(answer, {f"{name}:latest": f"digest-{name}" for name in MODELS})


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """The 250 questions."""
    path = tmp_path / "aqi.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in aqi.generate(N, seed=1)))
    return path


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_third_of_1000_requests_ruined_changes_nothing(server, questions, chaos, tmp_path, stream: bool) -> None:
    """Oracle: the same evaluation without the proxy, answer by answer; every fault kind must have been met."""
    options = EvaluationOptions(
        progress=False, backoff=0.002, timeout=1.0, attempts=8, in_flight=4, speed_rounds=0, stream=stream
    )
    calm = evaluate(server.url, MODELS, questions, None, tmp_path / "calm", options)
    rng = random.Random(3)
    kinds = (*chaos.faults, "none")
    slow = {40: chaos.slow[0], 400: chaos.slow[1], 800: chaos.slow[0]}
    proxy = chaos(server.url, lambda n: slow.get(n, rng.choice(kinds[:-1]) if rng.random() < 0.35 else None))
    stormy = evaluate(proxy.url, MODELS, questions, None, tmp_path / "stormy", options)
    assert proxy.requests > 1000
    assert set(proxy.served) >= {*chaos.faults, *chaos.slow}
    assert stormy.complete
    for label in MODELS:
        assert stormy.correct(label) == calm.correct(label)
        for item, row in calm.rows(label).items():
            assert stormy.rows(label)[item]["answer"] == row["answer"]
        assert stormy.metrics[label].aqi_accuracy == calm.metrics[label].aqi_accuracy
        assert stormy.metrics[label].faults, "the faults are on record"


def test_too_much_chaos_is_inconclusive(server, questions, chaos, tmp_path) -> None:
    """Oracle: the undisturbed answers; what was answered is identical, what was not is named, and no gate decides."""
    options = EvaluationOptions(
        progress=False, backoff=0.001, timeout=1.0, attempts=2, in_flight=4, speed_rounds=0, give_up_after=1000
    )
    calm = evaluate(server.url, MODELS, questions, None, tmp_path / "calm", options)
    rng = random.Random(4)
    proxy = chaos(server.url, lambda n: rng.choice(chaos.faults) if rng.random() < 0.7 else None)
    stormy = evaluate(proxy.url, MODELS, questions, None, tmp_path / "stormy", options)
    assert not stormy.complete
    for label in MODELS:
        missing = {name.removeprefix("aqi/") for name in stormy.metrics[label].unanswered}
        right = stormy.correct(label)
        assert right == {item: value for item, value in calm.correct(label).items() if item not in missing}
        assert len(right) + len(missing) == N
        assert missing
    verdicts = judge(stormy, without=("delta_speed", "retention"))
    assert {gate.judgement.verdict for gate in verdicts} == {"inconclusive"}
    assert "aqi/aqi-1-" in verdicts[0].judgement.summary
    assert stormy.winner()[0] is None
    # And the next call, in better weather, asks for the rest only.
    asked = len(server.requests)
    healed = evaluate(server.url, MODELS, questions, None, tmp_path / "stormy", options)
    assert healed.metrics["pure"].aqi_accuracy == calm.metrics["pure"].aqi_accuracy
    assert len(server.requests) - asked < 4 * N
