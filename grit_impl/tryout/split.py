"""A held-out split by the hash of what is asked: the same rows always fall on the same sides, however they are ordered.

Rows that ask the same, but for white space, have the same hash, so that no side holds another's question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grit_impl.errors import GRITError

SIDES = ("test", "validation", "train")
SHARES = {"test": 0.2, "validation": 0.15}
MOST = 320
"""Rows of a held-out side, about: more cost time in every run, and the spread over seeds hardly falls."""
FEWEST = 16
"""Rows of a held-out side below which its loss means nothing, and of the training side."""


@dataclass(frozen=True)
class Split:
    """Which rows are on which side.

    Attributes:
        rows: Side to the numbers of its rows, in file order.
        repeated: Rows that ask what an earlier row asks; they are on its side.
        dropped: Rows on no side, as their questions leave no room for an answer.
        first: The first row in words.
    """

    rows: Mapping[str, Sequence[int]]
    repeated: int
    dropped: int = 0
    first: str = ""

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(self.rows[side])} {side}" for side in reversed(SIDES))
        repeated = f"; {self.repeated} rows repeat another's question and stand on its side" if self.repeated else ""
        dropped = f"; {self.dropped} rows are left out, as their questions fill --max-length" if self.dropped else ""
        return sizes + repeated + dropped


def question(prompt: str, completion: str, asked: str = "") -> str:
    """What a row asks, with its white space made one; of a row that is learnt whole, `asked` or all of it."""
    return " ".join((prompt if prompt.strip() else asked or completion).split())


def side(asked: str, seed: int, shares: Mapping[str, float]) -> str:
    """The side of a question: its hash is a number from 0 to 1, of which `test` and `validation` have the lowest part.

    Args:
        asked: What `question` gave.
        seed: Other seeds give other splits.
        shares: Of `test` and `validation`.
    """
    hashed = hashlib.sha256(json.dumps([seed, asked]).encode()).digest()
    place = int.from_bytes(hashed[:8]) / 2**64
    if place < shares["test"]:
        return "test"
    return "validation" if place < shares["test"] + shares["validation"] else "train"


def split(questions: Sequence[str], seed: int, dropped: int = 0) -> Split:
    """Split rows.

    Args:
        questions: Of every row, what `question` gives.
        seed: Of the split.
        dropped: Rows besides, that were left out.

    Raises:
        GRITError: too few rows for three sides.
    """
    shares = {name: min(share, MOST / max(1, len(questions))) for name, share in SHARES.items()}
    rows: dict[str, list[int]] = {name: [] for name in SIDES}
    for number, asked in enumerate(questions):
        rows[side(asked, seed, shares)].append(number)
    distinct = len(set(questions))
    for name, found in rows.items():
        if len({questions[number] for number in found}) < FEWEST:
            left = f" ({dropped} more have questions that fill --max-length)" if dropped else ""
            raise GRITError(
                f"{len(questions)} rows{left}, {distinct} of them with a question of their own, are too few: {FEWEST} "
                f"questions are needed in each of {', '.join(SIDES)}, and {name} has {len(found)}; give about "
                f"{round(1.5 * FEWEST / SHARES['validation'])} rows"
            )
    return Split(rows, len(questions) - distinct, dropped)
