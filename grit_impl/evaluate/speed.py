"""Tokens per second by the server's own counters, fair between models and robust against a drifting machine.

* The rate is `(eval_count - 1) / eval_duration`: the first token is produced while the prompt is read and costs nothing
  in `eval_duration`, so short answers look absurdly fast (one token: a million tokens per second).
* Every sample has the same number of tokens. A model decides itself when to stop, and Ollama has no option against it;
  but at a temperature of 100 over the 100 likeliest tokens it babbles, and hardly ever says "end". What is said does
  not matter to the speed of a dense model. A sample that ends early all the same is drawn again with another seed.
* Models take turns within a round, in rotating order, and are compared within the round: when the machine slows down,
  it slows down for all of them. The first requests to each model are warm-up and not kept.
* How many rounds are needed depends on the machine, so they go on until the intervals are narrow, by a rule that is
  fixed beforehand and looks at their widths alone (`Schedule`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grit_impl.evaluate.metrics import GATE_ALPHA, speed_difference
from grit_impl.serve.client import Endpoint, Reply, Unanswered

Row = dict[str, Any]

BABBLE = {"temperature": 100.0, "top_k": 100, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "stop": []}
WARM_UP = 2
"""Requests per model that are not kept: loading, caches, frequency scaling."""
REDRAWS = 5
RELOADED = 50_000_000
"""Nanoseconds of load_duration from which on the model was loaded for this request, which then is warm-up again."""
LOOKS = (1, 2, 4, 8)
"""Multiples of the first number of rounds after which measuring may end."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When measuring ends.

    After `rounds` rounds, and twice, four and eight times as many, the intervals are looked at. It ends at the first
    look at which each is narrow enough, or which comes after the budget. Every interval is made for one of four looks
    (`metrics.median`), so that its confidence does not depend on this rule.

    Attributes:
        rounds: Until the first look; 0: no measurement.
        width: Of each model's interval of delta_speed, in percent of the base's speed.
        seconds: Budget: the measured requests' time, after which no further look is waited for.
    """

    rounds: int = 30
    width: float = 10.0
    seconds: float = 300.0

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of rounds after which it may end."""
        return tuple(self.rounds * factor for factor in LOOKS) if self.rounds else ()

    def widest(self, rows: Sequence[Row], base: str, labels: Iterable[str]) -> float:
        """Width of the widest interval of delta_speed, at the confidence of a gate; 0 if there is none."""
        found = [
            speed_difference(rows, label, base, 1 - GATE_ALPHA, len(self.looks)) for label in labels if label != base
        ]
        return max((each.high - each.low for each in found if each is not None), default=0.0)

    def end(self, rows: Sequence[Row], base: str, labels: Iterable[str]) -> str:
        """Why measuring ends with these rows, all of one look; empty if it goes on."""
        if self.widest(rows, base, labels) <= self.width:
            return "narrow enough"
        return "out of time" if sum(row["seconds"] for row in rows) > self.seconds else ""


def measure(
    endpoint: Endpoint,
    models: Mapping[str, str],
    prompt: str,
    *,
    base: str,
    schedule: Schedule,
    tokens: int,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    earlier: Iterable[Row] = (),
    keep: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], str]:
    """Measure all models in interleaved rounds.

    Args:
        endpoint: The server; requests go out one at a time.
        models: Name on the server by label.
        prompt: Sent to every model.
        base: Label of the model that the others are compared with.
        schedule: When to end.
        tokens: Tokens of each sample.
        options: Further Ollama options, e.g. `num_thread`.
        seed: Of the sampling; a round uses the same for every model.
        earlier: Rows that are measured already.
        keep: Called with each row as it is measured.

    Returns:
        Rows with `round`, `label`, `tokens_per_second`, `eval_count`, `eval_duration` (ns), `seconds` (of the request)
        and `order` (position in the round), up to the last look, and why it was the last. A sample that no attempt gave
        is missing.
    """
    rows = {(row["round"], row["label"]): row for row in earlier}
    labels, looks = list(models), schedule.looks
    warm: set[str] = set()
    for number in range(looks[-1] if looks else 0):
        # Every order is followed by its reverse, so that a steady drift favours nobody.
        first = number // 2 % len(labels)
        turn = labels[first:] + labels[:first]
        for order, label in enumerate(turn if number % 2 == 0 else reversed(turn)):
            if (number, label) in rows:
                continue
            for _ in range(0 if label in warm else WARM_UP):
                _sample(endpoint, models[label], prompt, tokens, options, seed)
            warm.add(label)
            reply = _sample(endpoint, models[label], prompt, tokens, options, seed + 1000 * number)
            if reply is None:
                continue
            row = {
                "label": label,
                "round": number,
                "order": order,
                "tokens_per_second": reply.tokens_per_second,
                "eval_count": reply.eval_count,
                "eval_duration": reply.eval_duration,
                "seconds": reply.seconds,
            }
            keep(row)
            rows[number, label] = row
        if not any((number, label) in rows for label in labels):
            return _until(rows, number), "no samples"
        if number + 1 in looks:
            seen = _until(rows, number)
            if why := schedule.end(seen, base, labels):
                return seen, why
    return list(rows.values()), "all rounds"


def _until(rows: Mapping[tuple[int, str], Row], last: int) -> list[Row]:
    return [row for (number, _), row in rows.items() if number <= last]


def _sample(
    endpoint: Endpoint, model: str, prompt: str, tokens: int, options: Mapping[str, Any] | None, seed: int
) -> Reply | None:
    """An answer of exactly `tokens` tokens from a loaded model, or None."""
    for draw in range(REDRAWS):
        request = {**BABBLE, **(options or {}), "seed": seed + draw, "num_predict": tokens}
        try:
            reply = endpoint.generate(model, prompt, request)
        except Unanswered:
            return None
        if reply.eval_count == tokens and reply.eval_duration > 0 and reply.load_duration < RELOADED:
            return reply
    return None
