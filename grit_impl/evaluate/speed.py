"""Tokens per second by the server's own counters, fair between models and robust against a drifting machine.

* The rate is `(eval_count - 1) / eval_duration`: the first token is produced while the prompt is read and costs nothing
  in `eval_duration`, so short answers look absurdly fast (one token: a million tokens per second).
* Every sample has the same number of tokens. A model decides itself when to stop, and Ollama has no option against it;
  but at a temperature of 100 over the 100 likeliest tokens it babbles, and hardly ever says "end". What is said does
  not matter to the speed of a dense model. A sample that ends early all the same is drawn again with another seed.
* Models take turns within a round, in rotating order, and are compared within the round: when the machine slows down,
  it slows down for all of them. The first requests to each model are warm-up and not kept.
* What a server does with a model is not what the model is. A copy of the base under another name is measured as one
  more model: a server on which the copy is slower than the base cannot tell how fast a model is (`gates`). Every ten
  rounds all models are unloaded and loaded again, in the order of the round, so that no model keeps a good or bad
  place. And where the server has no room for all of them, each is loaded for its turn alone: taking turns among more
  models than fit, always the same ones would be measured right after a load, which costs a third of their speed.
* How many rounds are needed depends on the machine, so they go on until the intervals are narrow, or every model is
  seen to be fast enough, by a rule that is fixed beforehand (`Schedule`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grit_impl.evaluate.metrics import GATE_ALPHA, speed_difference
from grit_impl.serve.client import Endpoint, Reply, Unanswered, full_name
from grit_impl.statistics.intervals import Interval

Row = dict[str, Any]

BABBLE = {"temperature": 100.0, "top_k": 100, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "stop": []}
WARM_UP = 2
"""Requests per model that are not kept: loading, caches, frequency scaling."""
REDRAWS = 5
TURN = 100_000_000
"""Nanoseconds of generating that a turn lasts, about. What else runs on a machine only makes samples slower, and short
ones by far, so the fastest of a turn counts; where one sample lasts as long, it is the only one."""
MOST_SAMPLES = 8
RELOADED = 50_000_000
"""Nanoseconds of load_duration from which on the model was loaded for this request, which then is warm-up again; half
of what a load took, if that is longer: a busy machine needs as long to look the model up."""
CLONE = "(copy of the base)"
"""Label of the base under another name; no label of a user has parentheses."""
CLONE_NAME = "grit-speed-copy-of-base"
EPOCH = 10
"""Rounds after which all models are loaded anew."""
LOOKS = (1, 2, 3, 4, 6, 8)
"""Multiples of the first number of rounds after which measuring may end."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When measuring ends.

    After `rounds` rounds, and two, three, four, six and eight times as many, the intervals are looked at. It ends at
    the first look at which each is narrow enough, or every model keeps the bound, or which comes after the budget.
    Every interval is made for one of six looks (`metrics.median`), so that its confidence does not depend on this rule.

    Attributes:
        rounds: Until the first look; 0: no measurement.
        width: Of each model's interval of delta_speed, in percent of the base's speed.
        seconds: Budget: the time of measured requests with the loads and warm-ups before them, after which no further
            look is waited for.
        max_speed_loss: Percent of the base's speed that a model may lose. Once every gate would be supported
            (`gates`), nothing is left to find out; a model that may be slower is measured on. None: not judged.
    """

    rounds: int = 30
    width: float = 4.0
    seconds: float = 300.0
    max_speed_loss: float | None = None

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of rounds after which it may end."""
        return tuple(self.rounds * factor for factor in LOOKS) if self.rounds else ()

    def end(self, rows: Sequence[Row], base: str, labels: Iterable[str]) -> str:
        """Why measuring ends with these rows, all of one look; empty if it goes on."""
        intervals = {
            label: interval
            for label in labels
            if label != base
            and (interval := speed_difference(rows, label, base, 1 - GATE_ALPHA, len(self.looks))) is not None
        }
        if all(each.high - each.low <= self.width for each in intervals.values()):
            return "narrow enough"
        copy = intervals.pop(CLONE, None)
        loss = self.max_speed_loss
        if loss is not None and all(keeps(each, copy, loss) for each in intervals.values()):
            return "every model keeps the bound"
        return "out of time" if sum(row["seconds"] for row in rows) > self.seconds else ""


def keeps(model: Interval, copy: Interval | None, loss: float) -> bool:
    """Whether a model's speed keeps a bound, also after what the server may have done to a copy of the base.

    Args:
        model: delta_speed, in percent.
        copy: The same of the copy; None: none was measured.
        loss: Percent that may be lost.
    """
    floor = max(copy.high, 0.0) if copy is not None else 0.0
    told = copy is None or max(-copy.low, copy.high) <= loss
    return told and model.low >= -loss and model.estimate - floor >= -loss


@contextmanager
def copy_of(endpoint: Endpoint, name: str) -> Iterator[dict[str, str]]:
    """A copy of a model, by its label, for as long as it is needed; nothing where the server makes none."""
    if not name or not endpoint.copy(name, CLONE_NAME):
        yield {}
        return
    try:
        yield {CLONE: CLONE_NAME}
    finally:
        endpoint.remove(CLONE_NAME)


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
        Rows with `round`, `label`, `tokens_per_second`, `eval_count`, `eval_duration` (ns), `seconds` (of all requests
        that it took), `order` (position in the round) and `alone` (whether it was the only model loaded), up to the
        last look, and why it was the last. A sample that no attempt gave is missing.
    """
    rows = {(row["round"], row["label"]): row for row in earlier}
    labels, looks = list(models), schedule.looks
    stage = _Stage(endpoint, models, prompt, tokens, options)
    for number in range(looks[-1] if looks else 0):
        # Every order is followed by its reverse, so that a steady drift favours nobody.
        first = number // 2 % len(labels)
        turn = labels[first:] + labels[:first]
        turn = turn if number % 2 == 0 else turn[::-1]
        if any((number, label) not in rows for label in labels):
            stage.begin(number // EPOCH, turn, seed)
        for order, label in enumerate(turn):
            if (number, label) in rows:
                continue
            stage.enter(label, seed)
            reply = stage.turn(label, seed + 1000 * number)
            if reply is None:
                continue
            row = {
                "label": label,
                "round": number,
                "order": order,
                "tokens_per_second": reply.tokens_per_second,
                "eval_count": reply.eval_count,
                "eval_duration": reply.eval_duration,
                "seconds": stage.spent(),
                "alone": stage.alone,
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


class _Stage:
    """The models on the server: which are loaded and warm, and whether there is room for more than one."""

    def __init__(
        self,
        endpoint: Endpoint,
        models: Mapping[str, str],
        prompt: str,
        tokens: int,
        options: Mapping[str, Any] | None,
    ) -> None:
        self.endpoint, self.models, self.prompt, self.tokens = endpoint, models, prompt, tokens
        self.options = dict(options or {})
        self.alone = False
        self.warm: dict[str, None] = {}
        self.epoch = -1
        self.samples, self.shortest = 0, float(TURN)
        self.loading, self.reloads = RELOADED, 0
        self._seconds = 0.0

    def begin(self, epoch: int, turn: Sequence[str], seed: int) -> None:
        """Load all models anew if this epoch is a new one, and see whether they fit."""
        if epoch == self.epoch or self.alone:
            return
        self.epoch = epoch
        self._clear(self.models)
        for label in turn:
            self.enter(label, seed)
        loaded = self.endpoint.loaded()
        self.alone = loaded is not None and not {full_name(name) for name in self.models.values()} <= loaded

    def enter(self, label: str, seed: int) -> None:
        """Have a model loaded and warm; where there is no room, as the only one."""
        if self.alone and list(self.warm) != [label]:
            self._clear(self.warm)
        if label not in self.warm:
            for _ in range(WARM_UP):
                self.sample(label, seed)
            self.warm[label] = None

    def turn(self, label: str, seed: int) -> Reply | None:
        """The fastest of a turn's samples, equally many for every model; None where the first fails."""
        if not self.samples:
            # By the fastest warm-up of all models: a disturbed one would say that one sample lasts long enough. After a
            # load of its own, which takes longer than the samples, a model has twice as many.
            self.samples = max(1, min(MOST_SAMPLES, round((1 + self.alone) * TURN / self.shortest)))
        fastest = self.sample(label, seed)
        for number in range(1, self.samples):
            reply = self.sample(label, seed + 10 * number) if fastest else None
            if reply is None or fastest is None:
                break
            fastest = max(fastest, reply, key=lambda each: each.tokens_per_second)
        return fastest

    def sample(self, label: str, seed: int) -> Reply | None:
        """An answer of exactly `tokens` tokens from a loaded model, or None."""
        for draw in range(REDRAWS):
            request = {**BABBLE, **self.options, "seed": seed + draw, "num_predict": self.tokens}
            try:
                reply = self.endpoint.generate(self.models[label], self.prompt, request)
            except Unanswered:
                return None
            self._seconds += reply.seconds
            reloaded = reply.load_duration >= self.loading
            if reply.eval_count == self.tokens and reply.eval_duration > 0 and not reloaded:
                self.shortest = min(self.shortest, reply.eval_duration)
                return reply
            if reloaded and label not in self.warm:
                self.loading = max(RELOADED, reply.load_duration // 2)
            elif reloaded:
                # It was thrown out meanwhile, perhaps by another user. Twice, and there is less room than it seemed.
                self.reloads += 1
                self.alone = self.alone or self.reloads > 1
        return None

    def spent(self) -> float:
        """Seconds of requests since this was last asked."""
        spent, self._seconds = self._seconds, 0.0
        return spent

    def _clear(self, labels: Iterable[str]) -> None:
        for label in labels:
            self.endpoint.unload(self.models[label])
        self.warm = {}


def _until(rows: Mapping[tuple[int, str], Row], last: int) -> list[Row]:
    return [row for (number, _), row in rows.items() if number <= last]
