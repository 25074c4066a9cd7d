"""An evaluation's answers and what follows from them: accuracies, paired differences, retention, speed.

Only raw evidence is stored (`answers.jsonl`, `speed.jsonl`, `evaluation.json`); every number is recomputed from it, so
that a stored evaluation can be judged again at another confidence or by another metric. Accuracies are in percent,
their differences in percentage points, speeds in tokens per second.

Models are compared on the items that both answered, item by item: at 300 items and a gap of 7 points McNemar's test
finds the gap in 72% of evaluations, an unpaired z-test in 46%.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from grit_impl.errors import GRITError
from grit_impl.evaluate.metrics import (
    Comparison,
    ModelMetrics,
    compare,
    discordant,
    median,
    share,
    speed_difference,
    speed_rates,
    widened_retention,
)
from grit_impl.evaluate.metrics import paired as paired
from grit_impl.evaluate.noise import FILE, Noise, tally
from grit_impl.evaluate.scoring import AQI_METRICS
from grit_impl.record import write_atomic
from grit_impl.statistics.intervals import Interval, t_interval, wilson
from grit_impl.statistics.paired import holm, mcnemar_exact

Row = dict[str, Any]
ANSWERED = "answer"
"""The accuracy of a task that is no index: right or not."""
SCORE_FIELD = {"category": "category_right", "exact": "exact", "within5": "within5", ANSWERED: "correct"}
SCHEMA = 1
_mcnemar = lru_cache(maxsize=4096)(mcnemar_exact)


class Evaluation:
    """The answers of several models to the same questions.

    Args:
        models: Name on the server by label, in the order of the report.
        answers: One row per (model, suite, item): `label`, `suite`, `item`, `prompt`, `answer`, `scores` (of
            `scoring.score_aqi` or `scoring.score`), `correct` (by the primary metric), and the server's counters;
            `error` instead of an answer where there is none.
        speed: One row per (round, label) with `tokens_per_second`.
        meta: What was asked, of whom, when.
        base: Label of the reference for delta_AQI, retention and delta_speed.
        baseline: Label of the fine-tuned reference.
        aqi_metric: The primary accuracy, one of `SCORE_FIELD`.
        path: Where it is stored.
        again: Rows like those of `answers` of what was asked once more; `beside` names the server if it is another one.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        answers: Sequence[Row],
        speed: Sequence[Row] = (),
        meta: Mapping[str, Any] | None = None,
        *,
        base: str = "base",
        baseline: str = "baseline",
        aqi_metric: str = AQI_METRICS[0],
        path: Path | None = None,
        again: Sequence[Row] = (),
    ) -> None:
        if aqi_metric not in SCORE_FIELD:
            raise GRITError(f"unknown AQI metric {aqi_metric!r}: use {', '.join(AQI_METRICS)}")
        self.models, self.answers, self.speed = dict(models), list(answers), list(speed)
        self.meta, self.again = dict(meta or {}), list(again)
        self.base, self.baseline, self.aqi_metric, self.path = base, baseline, aqi_metric, path
        self._cache: dict[float, dict[str, ModelMetrics]] = {}
        self._scores: dict[tuple[str, str, str], dict[str, bool]] = {}
        self._rows: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.answers:
            self._rows.setdefault((row["label"], row["suite"]), {})[row["item"]] = row

    # -- answers ------------------------------------------------------------------------------------------------------

    def rows(self, label: str, suite: str = "aqi") -> dict[str, Row]:
        """One model's answers by item id."""
        return self._rows.get((label, suite), {})

    @property
    def complete(self) -> bool:
        """Whether every model has a trustworthy answer to every question."""
        return not any(row.get("error") for row in self.answers)

    def unanswered(self, label: str) -> tuple[str, ...]:
        """Items of a model without a trustworthy answer, as `suite/id`."""
        return tuple(f"{row['suite']}/{row['item']}" for row in self._everything(label) if row.get("error"))

    def _everything(self, label: str) -> list[Row]:
        return [row for suite in ("aqi", "knowledge") for row in self.rows(label, suite).values()]

    def scores(self, label: str, suite: str, score: str) -> Mapping[str, bool]:
        """Right or wrong by item, of the answered items that have a truth for this score."""
        key = (label, suite, score)
        if key not in self._scores:
            self._scores[key] = {
                item: bool(row["scores"][score])
                for item, row in self.rows(label, suite).items()
                if not row.get("error") and row["scores"].get(score) is not None
            }
        return self._scores[key]

    def correct(self, label: str, metric: str | None = None) -> Mapping[str, bool]:
        """Right or wrong by item on AQI, by the primary or the given metric."""
        return self.scores(label, "aqi", SCORE_FIELD[metric or self.aqi_metric])

    def retained(self, label: str) -> list[bool]:
        """Whether this model still answers each of the knowledge questions that the base answered."""
        ours = self.scores(label, "knowledge", "correct")
        known = [item for item, right in self.scores(self.base, "knowledge", "correct").items() if right]
        return [ours[item] for item in known if item in ours]

    def retention(self, label: str, interval: Callable[[int, int, float], Interval], confidence: float) -> Interval:
        """Percent of what the base answered that this model answers too, which must be something.

        Args:
            label: The model.
            interval: Of k successes in n trials.
            confidence: Of that interval, before it is widened for the server.
        """
        kept, questions = self.retained(label), self.scores(self.base, "knowledge", "correct")
        found = interval(sum(kept), len(kept), confidence).scaled(100)
        return widened_retention(found, self.noise().allowance, len(questions))

    def noise(self, *labels: str, beside: str = "") -> Noise:
        """What changed when a sample was asked again.

        Args:
            *labels: Of these models; of all without any: what a server changes does not depend on what a model knows.
            beside: The other server that was asked, as `again` names it; "" for the same one.
        """
        rows = [row for row in self.again if row["beside"] == beside and row["label"] in (labels or self.models)]
        pairs = [(self.rows(row["label"], row["suite"]).get(row["item"], {"error": "gone"}), row) for row in rows]
        score = {"aqi": SCORE_FIELD[self.aqi_metric], "knowledge": "correct"}
        found = [pair for pair in pairs if not pair[0].get("error")]
        return tally(found, score, bool(self.meta.get("exact")) and not beside)

    def noises(self) -> dict[str, Noise]:
        """Of all models: what the same server ("") changed, and each other one that was asked the sample."""
        return {name: self.noise(beside=name) for name in dict.fromkeys(["", *(row["beside"] for row in self.again)])}

    # -- metrics ------------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> dict[str, ModelMetrics]:
        """By label, with 95% intervals."""
        return self.metrics_at(0.95)

    def metrics_at(self, confidence: float) -> dict[str, ModelMetrics]:
        """By label, with intervals of this two-sided confidence."""
        if confidence not in self._cache:
            self._cache[confidence] = self._compute(confidence)
        return self._cache[confidence]

    def _compute(self, confidence: float) -> dict[str, ModelMetrics]:
        delta = self._comparisons(self.base, self.correct, confidence)
        over = self._comparisons(self.baseline, self.correct, confidence, skip=(self.base,))
        kept = self._comparisons(self.base, lambda label: self.scores(label, "knowledge", "correct"), confidence)
        return {label: self._model(label, confidence, delta, over, kept) for label in self.models}

    def _model(
        self,
        label: str,
        confidence: float,
        delta: Mapping[str, Comparison],
        over: Mapping[str, Comparison],
        kept: Mapping[str, Comparison],
    ) -> ModelMetrics:
        everything = self._everything(label)
        answered = [row for row in everything if not row.get("error")]
        scores = [row["scores"] for row in answered]
        errors = [each["absolute_error"] for each in scores if each.get("absolute_error") is not None]
        metrics = {name: self.accuracy(label, name, confidence) for name in AQI_METRICS}
        knowledge = self.scores(label, "knowledge", "correct")
        return ModelMetrics(
            label=label,
            model=self.models[label],
            aqi_accuracy=self.accuracy(label, None, confidence),
            **metrics,
            mae=t_interval(errors, confidence) if errors else None,
            delta_aqi=delta.get(label),
            delta_over_baseline=over.get(label),
            knowledge=share(knowledge.values(), confidence),
            delta_knowledge=kept.get(label),
            retention=self.retention(label, wilson, confidence) if self.retained(label) else None,
            tokens_per_second=median(speed_rates(self.speed, label).values(), confidence, self.looks),
            delta_speed=self.delta_speed(label, confidence),
            delta_speed_absolute=self.delta_speed(label, confidence, absolute=True),
            unanswered=self.unanswered(label),
            unparsable=dict(Counter(each["note"] for each in scores if each["unparsable"])),
            cut=sum(row.get("done_reason") == "length" for row in answered),
            faults=dict(Counter(kind for row in everything for kind in row.get("faults", ()))),
        )

    def _comparisons(
        self,
        reference: str,
        correct: Callable[[str], Mapping[str, bool]],
        confidence: float,
        skip: Iterable[str] = (),
    ) -> dict[str, Comparison]:
        others, allowance = [x for x in self.models if x != reference and x not in skip], self.noise().allowance
        pairs = {label: paired(correct(label), correct(reference)) for label in others} if others else {}
        pairs = {label: pair for label, pair in pairs.items() if pair[0]}
        pvalues = {label: _mcnemar(*discordant(*pair)) for label, pair in pairs.items()}
        corrected = dict(zip(pvalues, holm(list(pvalues.values())), strict=True)) if pvalues else {}
        return {
            label: compare(ours, theirs, confidence, reference, pvalues[label], corrected[label], allowance)
            for label, (ours, theirs) in pairs.items()
        }

    def accuracy(self, label: str, metric: str | None = None, confidence: float = 0.95) -> Interval | None:
        """Percent of AQI items right, by the primary or the given metric, with Wilson's interval."""
        return share(self.correct(label, metric).values(), confidence)

    def compare(self, label: str, reference: str, confidence: float = 0.95) -> Comparison:
        """Any model against any other on AQI; its p-value is not corrected."""
        ours, theirs = paired(self.correct(label), self.correct(reference))
        if not ours:
            raise GRITError(f"{label!r} and {reference!r} have no answered item in common")
        p = _mcnemar(*discordant(ours, theirs))
        return compare(ours, theirs, confidence, reference, p, p, self.noise().allowance)

    # -- speed --------------------------------------------------------------------------------------------------------

    @property
    def looks(self) -> int:
        """How often the measurement of speed could have ended (see `speed.Schedule`)."""
        return len(self.meta.get("speed", {}).get("looks", ())) or 1

    def delta_speed(self, label: str, confidence: float = 0.95, absolute: bool = False) -> Interval | None:
        """Speed gained over the base, round by round: in percent of the base's, or in tokens per second."""
        if label == self.base:
            return None
        return speed_difference(self.speed, label, self.base, confidence, self.looks, absolute)

    # -- tables and the winner ----------------------------------------------------------------------------------------

    def table(self, by: str = "pollutant", confidence: float = 0.95) -> list[Row]:
        """Accuracy per group of items.

        Args:
            by: `pollutant`, or `category` (the true one).
            confidence: Of the Wilson intervals.

        Returns:
            Rows with `group`, `label`, `n`, `correct`, `accuracy`, `low`, `high` (percent).
        """
        field = {"category": "true_category"}.get(by, by)
        rows: list[Row] = []
        for label in self.models:
            groups: dict[str, list[bool]] = {}
            for item, right in self.correct(label).items():
                groups.setdefault(str(self.rows(label)[item].get(field) or "?"), []).append(right)
            for group, rights in groups.items():
                share = wilson(sum(rights), len(rights), confidence).scaled(100)
                rows.append(
                    {
                        "group": group,
                        "label": label,
                        "n": len(rights),
                        "correct": sum(rights),
                        "accuracy": share.estimate,
                        "low": share.low,
                        "high": share.high,
                    }
                )
        return sorted(rows, key=lambda row: row["group"])

    def winner(self, alpha: float = 0.05) -> tuple[str | None, str]:
        """The model with the best AQI accuracy, if it is better than every other one beyond doubt.

        Returns:
            Its label and the sentence for the report; the label is None where the paired tests (Holm over the other
            models) do not separate the best from the rest, or where answers are missing.
        """
        accuracy = {label: m.aqi_accuracy.estimate for label, m in self.metrics.items() if m.aqi_accuracy}
        if len(accuracy) < 2:
            return None, "No winner: fewer than two models have answers."
        if not self.complete:
            return None, "No winner: some questions have no trustworthy answer, see the unanswered items."
        best, *others = sorted(accuracy, key=lambda label: -accuracy[label])
        compared = {label: self.compare(best, label) for label in others}
        corrected = holm([each.p for each in compared.values()])
        doubtful = [
            label for label, p in zip(compared, corrected, strict=True) if p > alpha or compared[label].low <= 0
        ]
        if not doubtful:
            second = others[0]
            gap = compared[second].difference
            return best, (
                f"{best} is the most accurate: {gap.estimate:.1f} points above {second} "
                f"[{gap.low:.1f}, {gap.high:.1f}], McNemar p = {compared[second].p:.2g}."
            )
        smallest = compared[doubtful[0]].detectable
        return None, (
            f"No winner: {best} has the highest accuracy, but {', '.join(doubtful)} cannot be told apart from it "
            f"(this evaluation finds differences from {smallest:.1f} points on)."
        )

    # -- storage ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `evaluation.json` beside the answers: what was asked, and the metrics for other programs to read."""
        if self.path is None:
            raise GRITError("this evaluation has no folder")
        winner, sentence = self.winner()
        content = {
            "schema": SCHEMA,
            "models": self.models,
            "base": self.base,
            "baseline": self.baseline,
            "aqi_metric": self.aqi_metric,
            "complete": self.complete,
            "winner": winner,
            "summary": sentence,
            "meta": self.meta,
            "noise": {name or "again": each.to_dict() for name, each in self.noises().items()},
            "unanswered": [row for row in self.answers if row.get("error")],
            "metrics": {label: each.to_dict() for label, each in self.metrics.items()},
        }
        write_atomic(self.path / "evaluation.json", json.dumps(content, indent=2, default=str))

    @classmethod
    def load(cls, path: str | Path, aqi_metric: str | None = None) -> Evaluation:
        """A stored evaluation.

        Args:
            path: Its folder.
            aqi_metric: Judge by another primary metric than the stored one.

        Raises:
            GRITError: there is none, it was interrupted, or a file is damaged (with file and line).
        """
        folder = Path(path)
        try:
            content = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
            models, meta = content["models"], content["meta"]
            answers = [*read_lines(folder / "answers.jsonl"), *content["unanswered"]]
        except FileNotFoundError as error:
            raise GRITError(f"{folder} holds no finished evaluation: {Path(error.filename).name} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, GRITError):
                raise
            raise GRITError(f"corrupt evaluation: {folder / 'evaluation.json'} cannot be read ({error})") from error
        return cls(
            models,
            [row for row in answers if row["label"] in models],
            [row for row in read_lines(folder / "speed.jsonl", missing=True) if row["label"] in models],
            meta,
            base=content["base"],
            baseline=content["baseline"],
            aqi_metric=aqi_metric or content["aqi_metric"],
            path=folder,
            again=[row for row in read_lines(folder / FILE, missing=True) if row["label"] in models],
        )


def read_lines(path: Path, missing: bool = False) -> list[Row]:
    """Rows of a JSONL file that may end in half a line, as a killed process leaves it.

    Raises:
        GRITError: any other line is damaged.
    """
    if missing and not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            row["label"]
        except (ValueError, RecursionError, KeyError, TypeError):
            if number == len(lines):
                break
            raise GRITError(f"corrupt evaluation: {path}, line {number} is not an answer; remove that line") from None
        rows.append(row)
    return rows


def as_line(row: Row) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


class appending:
    """Append rows to a file, each on the disk before the next is asked for; a full disk is one clear line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._handle: IO[str] | None = None

    def __enter__(self) -> Callable[[Row], None]:
        self._handle = open(self.path, "a", encoding="utf-8")
        return self._write

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self._handle.close()

    def _write(self, row: Row) -> None:
        assert self._handle is not None
        try:
            with self._lock:
                self._handle.write(as_line(row))
                self._handle.flush()
        except OSError as error:
            raise GRITError(f"cannot write {self.path}: {error.strerror or error}") from error
