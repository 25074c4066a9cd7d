"""The chain of custody: each link that a modified gradient passes, and how it can break.

A breach says which link broke, under which name, for which tensors and since when. Breaches are looked for in the
order of the links; for most, each tensor is judged by itself (`findings.lasting`), so that one of 28 is not averaged
away.

Thresholds: a direction is "the same" below `TURN` = 1e-4 for gradients (1 - cos), and below `SAME_UPDATE` = 1e-3 for
updates, which are differences of parameters and carry their rounding. Real preconditioning was measured at 0.1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.findings import Facts

SAME_UPDATE = 1e-3
REPLAYED = 0.05
"""Largest relative distance of an update from its replay."""
LIMIT_PASSED = 10.0
"""So many times the clipping limit at the optimizer's entry is no longer clipped."""
LINKS = ("used", "arrived", "read", "turned", "delivered", "consumed", "moved", "kept", "throughout")


@dataclass(frozen=True)
class Breach:
    """A link that broke.

    Attributes:
        summary: What happened, for people.
        tensors: Names; None: all of them.
        numbers: The evidence.
        cause: If not the breach's own.
    """

    summary: str
    tensors: Iterable[str] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    cause: str | None = None


@dataclass(frozen=True)
class Check:
    """One way for a link to break: the link, the cause's name, what it means, and the function that sees it."""

    link: str
    cause: str
    meaning: str
    find: Callable[[Facts], Breach | None]


CHECKS: list[Check] = []


def check(link: str, cause: str, meaning: str) -> Callable[[Callable[[Facts], Breach | None]], Callable[..., Any]]:
    """Enter a check; the order of entering is the order of asking."""

    def register(find: Callable[[Facts], Breach | None]) -> Callable[[Facts], Breach | None]:
        CHECKS.append(Check(link, cause, meaning, find))
        return find

    return register


def rows_of(rows: pd.DataFrame, names: Iterable[str], flags: pd.Series) -> pd.DataFrame:
    """The flagged rows of some tensors."""
    return rows[flags & rows.name.isin(set(names))]
