"""Speed on servers whose true speed, drift and length are scripted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grit_impl.evaluate import speed
from grit_impl.evaluate.metrics import GATE_ALPHA, median
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.speed import LOOKS, Schedule
from grit_impl.serve.client import Endpoint, Reply, Unanswered

MODELS = {"base": "base", "pure": "pure"}
DIGESTS = {"base:latest": "d0", "pure:latest": "d1"}


def _evaluation(rows) -> Evaluation:
    return Evaluation(MODELS, [], rows)


def _measure(server, rounds: int = 16, **options):
    """The rows until the first look."""
    with Endpoint(server.url, backoff=0.001) as endpoint:
        schedule = Schedule(rounds, width=math.inf)
        return speed.measure(endpoint, MODELS, "one two", base="base", schedule=schedule, tokens=32, **options)[0]


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
    """Oracle: the order of requests at the server: 2 per model first, then alternating first places."""
    server = fake_ollama(lambda model, prompt: "babble", DIGESTS)
    rows = _measure(server, rounds=8)
    order = [request["model"] for request in server.requests]
    assert order[:6] == ["base", "base", "pure", "pure", "base", "pure"]
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


class _Machine:
    """Stands in for `Endpoint`: the log ratio of the two models' speeds is `shift` plus this noise."""

    def __init__(self, rng: np.random.Generator, shift: float, noise) -> None:
        self.rng, self.shift, self.noise = rng, shift, noise

    def generate(self, model: str, prompt: str, options, **_) -> Reply:
        rate = 100 * math.exp((self.shift + self.noise(self.rng)) if model == "pure" else 0.0)
        nanoseconds = int(1e9 * (options["num_predict"] - 1) / rate)
        return Reply("x", "length", 9, options["num_predict"], nanoseconds, 1, 0, nanoseconds / 1e9)

    def unload(self, model: str) -> None:
        """It costs nothing here."""

    def loaded(self) -> None:
        """Not said."""


NOISES = {
    "quiet": lambda rng: 0.01 * rng.normal(),
    "loaded machine": lambda rng: 0.15 * rng.standard_t(2),
    # Median zero, long tail to one side: where the interval is narrow depends on which side the sample fell.
    "skewed": lambda rng: 0.12 * (rng.exponential() - math.log(2)),
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES.keys())
@pytest.mark.parametrize(("width", "loss"), [(4.0, None), (10.0, None), (4.0, 10.0), (4.0, 25.0)])
def test_the_stopping_rule_keeps_the_error(monkeypatch, noise, width: float, loss: float | None) -> None:
    """Oracle: pure is exactly 10% slower, the bound itself, so either verdict is false: at most alpha of them.

    With alpha .1 for a gate (at 1e-4 nothing would ever be seen) and 500 measurements, of which 67 would be an error
    above .1 with 99% confidence.
    """
    alpha = 0.1
    monkeypatch.setattr(speed, "GATE_ALPHA", alpha)
    rng, wrong, rounds = np.random.default_rng(5), 0, set()
    schedule = Schedule(10, width=width, max_speed_loss=loss)
    for _ in range(500):
        machine = _Machine(rng, math.log(0.9), noise)
        rows, _ = speed.measure(machine, MODELS, "q", base="base", schedule=schedule, tokens=32)
        evaluation = Evaluation(MODELS, [], rows, {"speed": {"looks": schedule.looks}})
        delta = evaluation.delta_speed("pure", 1 - alpha)
        rounds.add(delta.n)
        wrong += not delta.low <= -10 <= delta.high
    assert wrong <= 67
    assert rounds <= set(schedule.looks)


@pytest.mark.parametrize(("looks", "kept"), [(len(LOOKS), True), (1, False)], ids=["corrected", "naive"])
def test_only_corrected_intervals_survive_the_worst_rule(looks: int, kept: bool) -> None:
    """Oracle: the same simulation, ended as soon as the interval is wrong, which no rule can surpass.

    Made for six looks, it is wrong at any of them in at most alpha of the measurements; made for one, in more.
    """
    alpha, rng, wrong = 0.1, np.random.default_rng(6), 0
    for _ in range(500):
        values = 100 * (0.9 * np.exp([NOISES["loaded machine"](rng) for _ in range(80)]) - 1)
        deltas = [median(values[:look], 1 - alpha, looks) for look in Schedule(10).looks]
        wrong += any(not delta.low <= -10 <= delta.high for delta in deltas)
    assert (wrong <= 67) == kept


def test_noise_is_measured_longer_and_a_quiet_machine_is_not() -> None:
    """Oracle: the scripted noise: 1% needs the fewest rounds, 15% with heavy tails more, each at a gate's alpha."""
    for name, looks in (("quiet", {30}), ("loaded machine", {120, 240})):
        machine = _Machine(np.random.default_rng(8), 0.0, NOISES[name])
        rows, why = speed.measure(machine, MODELS, "q", base="base", schedule=Schedule(), tokens=32)
        evaluation = Evaluation(MODELS, [], rows, {"speed": {"looks": Schedule().looks}})
        delta = evaluation.delta_speed("pure", 1 - GATE_ALPHA)
        assert delta.n in looks, why
        assert f"{len(LOOKS)} looks" in delta.method
        assert (why == "narrow enough") == (delta.high - delta.low <= Schedule().width)


@pytest.mark.parametrize("lost", [0, 8, 14])
def test_measuring_ends_where_every_model_keeps_the_bound(lost: int) -> None:
    """Oracle: models that lose 0, 8 and 14% at a scatter of 4%: only equality is far from 10%, and told early."""
    found = {}
    for loss in (None, 10.0):
        machine = _Machine(np.random.default_rng(8), math.log(1 - lost / 100), lambda rng: 0.04 * rng.normal())
        schedule = Schedule(max_speed_loss=loss)
        rows, why = speed.measure(machine, MODELS, "q", base="base", schedule=schedule, tokens=32)
        delta = Evaluation(MODELS, [], rows, {"speed": {"looks": schedule.looks}}).delta_speed("pure", 1 - GATE_ALPHA)
        found[loss] = why, delta.n
    assert found[None][0] == "narrow enough"
    if lost:
        assert found[10.0] == found[None]
    else:
        assert found[10.0] == ("every model keeps the bound", 30)
        assert found[None][1] == 180


def test_measuring_ends_with_the_budget() -> None:
    """Oracle: a model that needs 0.31 s for a sample: 30 rounds of two take 19 s, 60 rounds 37 s."""
    for seconds, rounds in ((10.0, 30), (30.0, 60), (math.inf, 240)):
        machine = _Machine(np.random.default_rng(9), 0.0, NOISES["quiet"])
        schedule = Schedule(width=0.001, seconds=seconds)
        rows, why = speed.measure(machine, MODELS, "q", base="base", schedule=schedule, tokens=32)
        assert max(row["round"] for row in rows) + 1 == rounds
        assert why == ("all rounds" if rounds == 240 else "out of time")


def test_a_measurement_is_taken_up_where_it_was() -> None:
    """Oracle: the first 41 rounds of an uninterrupted measurement; only the rest is asked for, the end is the same."""
    schedule, asked = Schedule(width=0.001), []
    noise = NOISES["quiet"]

    def run(earlier):
        machine = _Machine(np.random.default_rng(3), 0.0, noise)
        return speed.measure(
            machine, MODELS, "q", base="base", schedule=schedule, tokens=32, earlier=earlier, keep=asked.append
        )

    whole, _ = run([])
    asked.clear()
    again, _ = run([row for row in whole if row["round"] < 41])
    assert min(row["round"] for row in asked) == 41
    assert [(row["round"], row["label"]) for row in again] == [(row["round"], row["label"]) for row in whole]


def test_a_server_that_dies_while_measuring_is_not_waited_for() -> None:
    """Oracle: 20 answers, then none: a round without a sample ends it."""
    machine = _Machine(np.random.default_rng(3), 0.0, NOISES["quiet"])
    answer, calls = machine.generate, []

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) > 20:
            raise Unanswered("dead", [])
        return answer(*arguments, **options)

    machine.generate = dying
    rows, why = speed.measure(machine, MODELS, "q", base="base", schedule=Schedule(), tokens=32)
    assert why == "no samples"
    assert len(rows) == 16
    assert len(calls) < 26
