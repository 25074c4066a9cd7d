"""What two runs, or two arms of runs, say about each other: answers, reasons and the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grit_impl.statistics.intervals import Interval

QUESTIONS = {
    "comparable": "Comparable?",
    "training": "Same training, or different?",
    "decorrelated": "Decorrelated?",
    "better": "Better?",
}


@dataclass
class CurveComparison:
    """What two runs (or two arms of several runs) say about each other.

    Attributes:
        a: Name of the first run, the reference.
        b: Name of the second.
        verdicts: Answer per question ("comparable": yes | no; "training": same | different | inconclusive;
            "decorrelated": shared batches | no shared batches | unclear; "better": a's name, b's name, neither or
            inconclusive), or "not exercised".
        reasons: One sentence per question.
        numbers: The evidence, plain values ready for JSON.
        notes: What a reader must know besides.
        curves: The series behind the plots, by name; not part of `to_dict`.
    """

    a: str
    b: str
    verdicts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(QUESTIONS, "not exercised"))
    reasons: dict[str, str] = field(default_factory=lambda: dict.fromkeys(QUESTIONS, ""))
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> str:
        """ "same", "different", "inconclusive", or "incomparable" where the comparison was refused."""
        return self.verdicts["training"] if self.verdicts["training"] != "not exercised" else "incomparable"

    @property
    def summary(self) -> str:
        """One line: the verdict on the training and why."""
        question = "training" if self.verdict != "incomparable" else "comparable"
        return f"{self.b} against {self.a}: {self.verdict} ({self.reasons[question]})"

    def answer(self, question: str, verdict: str, reason: str) -> None:
        """Set the answer to one question."""
        self.verdicts[question], self.reasons[question] = verdict, reason

    def to_dict(self) -> dict[str, Any]:
        """Everything but the raw curves, as JSON-ready values."""
        kept = ("a", "b", "verdicts", "reasons", "numbers", "notes")
        return {"verdict": self.verdict, **{key: _plain(getattr(self, key)) for key in kept}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, Interval):
        return _plain(value.to_dict())
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
