"""Speed on servers whose true speed, drift and length are scripted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grit_impl.evaluate import speed
from grit_impl.evaluate.client import Endpoint
from grit_impl.evaluate.results import Evaluation

MODELS = {"base": "base", "pure": "pure"}
DIGESTS = {"base:latest": "d0", "pure:latest": "d1"}


def _evaluation(rows) -> Evaluation:
    return Evaluation(MODELS, [], rows)


def _measure(server, rounds: int = 16, **options):
    with Endpoint(server.url, backoff=0.001) as endpoint:
        return speed.measure(endpoint, MODELS, "one two", rounds=rounds, tokens=32, **options)


def test_a_machine_that_slows_down_changes_no_comparison(fake_ollama) -> None:
    """Oracle: the script: pure is 4% slower than base at any time, while the machine loses half of its speed."""
    state = {"n": 0}

    def rate(model: str) -> float:
        state["n"] += 1
        return 100.0 * 0.5 ** (state["n"] / 36) * (0.96 if model == "pure" else 1.0)

    rows = _measure(fake_ollama(lambda model, prompt: "babble", DIGESTS, rate))
    metrics = _evaluation(rows).metrics
    assert metrics["pure"].delta_speed.estimate == pytest.approx(-4, abs=0.5)
    # Measured one model after the other, the same script would have said something else entirely.
    first, last = rows[0]["tokens_per_second"], rows[-1]["tokens_per_second"]
    assert last < 0.6 * first


def test_models_take_turns_and_warm_up(fake_ollama) -> None:
    """Oracle: the order of requests at the server: 2 + 1 per model first, then alternating first places."""
    server = fake_ollama(lambda model, prompt: "babble", DIGESTS)
    rows = _measure(server, rounds=8)
    order = [request["model"] for request in server.requests]
    assert order[:6] == ["base"] * 3 + ["pure"] * 3
    first = [row["label"] for row in rows if row["order"] == 0]
    assert first == ["base", "pure", "pure", "base"] * 2, "each order, then its reverse"
    assert len(order) == 2 * 8 + 2 * speed.WARM_UP


def test_the_first_token_is_free(fake_ollama) -> None:
    """Oracle: 32 tokens in the time of 31 (the fake's rate is 100 tokens/s by construction)."""
    rows = _measure(fake_ollama(lambda model, prompt: "babble", DIGESTS), rounds=3)
    assert {round(row["tokens_per_second"], 4) for row in rows} == {100.0}
    assert {row["eval_count"] for row in rows} == {32}


def test_short_samples_are_drawn_again(fake_ollama) -> None:
    """Oracle: the script ends every second answer early; only full ones are kept, none is missing."""
    server = fake_ollama(lambda model, prompt: "babble", DIGESTS)
    state = {"n": 0}

    def cut(request, whole):
        state["n"] += 1
        return {**whole, "eval_count": 5} if state["n"] % 2 else whole

    server.edit = cut
    rows = _measure(server, rounds=5)
    assert len(rows) == 10
    assert {row["eval_count"] for row in rows} == {32}


def test_a_reloaded_model_is_warmed_up_again(fake_ollama) -> None:
    """Oracle: the first sample after a load is slow by script and must not be among the rows."""
    server = fake_ollama(lambda model, prompt: "babble", DIGESTS)
    state = {"last": ""}

    def reload(request, whole):
        loaded, state["last"] = request["model"] != state["last"], request["model"]
        return {**whole, "load_duration": 10**9, "eval_duration": 10**12} if loaded else whole

    server.edit = reload
    assert {round(row["tokens_per_second"]) for row in _measure(server, rounds=4)} == {100}


def test_a_model_that_never_babbles_has_no_speed(fake_ollama) -> None:
    """Oracle: no sample of the wanted length exists, so no number may appear."""
    server = fake_ollama(lambda model, prompt: "babble", DIGESTS)
    server.edit = lambda request, whole: {**whole, "eval_count": 5} if request["model"] == "pure" else whole
    metrics = _evaluation(_measure(server, rounds=4)).metrics
    assert metrics["pure"].tokens_per_second is None
    assert metrics["pure"].delta_speed is None
    assert metrics["base"].tokens_per_second.n == 4


def test_the_interval_covers(seeded) -> None:
    """Oracle: heavy-tailed noise around a known median ratio; order statistics promise at least 95% coverage."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        drift = np.cumsum(rng.normal(0, 0.02, 30))
        rows = [
            {"round": k, "label": label, "tokens_per_second": math.exp(5 + drift[k] + shift + 0.02 * rng.standard_t(2))}
            for k in range(30)
            for label, shift in (("base", 0.0), ("pure", math.log(0.95)))
        ]
        delta = _evaluation(rows).metrics["pure"].delta_speed
        covered += delta.low <= -5 <= delta.high
    assert 0.93 <= covered / 400 <= 0.995
