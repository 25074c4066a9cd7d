"""The zoo's two lists: faults and sound variants, each entered by a decorator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from grit_impl.zoo.bench import OPTIMIZERS, TRAINERS, Bench, Moments

Build = Callable[[Bench], Moments]
TORCH = ("adamw", "sgd")
HUGGING_FACE = ("trainer", "sft")
OPEN_ORDER = ("loop", *HUGGING_FACE, "hybrid")
"""Optimizers and trainers that cases name together; in OPEN_ORDER a case may come before clipping or after."""
FAULTS: list[Case] = []
SOUND: list[Case] = []


@dataclass(frozen=True)
class Case:
    """One fault, or one sound variant.

    Attributes:
        id: Its name.
        causes: Verdicts that name it rightly.
        text: What is wrong (or why nothing is).
        build: Called with the bench before training; returns what to do when.
        setting: Fields of Bench that it needs.
        trainers, optimizers: Where it exists.
        ledger: Arguments of the ledger.
    """

    id: str
    causes: tuple[str, ...]
    text: str
    build: Callable[[Bench], Moments]
    setting: dict[str, Any] = field(default_factory=dict)
    trainers: tuple[str, ...] = TRAINERS
    optimizers: tuple[str, ...] = OPTIMIZERS
    ledger: dict[str, Any] = field(default_factory=dict)
    per_optimizer: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def expected(self, optimizer: str) -> tuple[str, ...]:
        """The right verdicts under an optimizer."""
        return self.per_optimizer.get(optimizer, self.causes)


def fault(id: str, *causes: str, **options: Any) -> Callable[[Build], Build]:
    """Enter a sabotage of a run: `build` says what is done when, its docstring what is wrong.

    Args:
        id: Its name.
        causes: Verdicts that name it rightly.
        options: Fields of `Case`.
    """
    return _enter(FAULTS, id, causes, options)


def sound(id: str, *causes: str, **options: Any) -> Callable[[Build], Build]:
    """Enter a run in order: as `fault`, with the verdicts that it may get."""
    return _enter(SOUND, id, causes, options)


def _enter(cases: list[Case], id: str, causes: tuple[str, ...], options: dict[str, Any]) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        cases.append(Case(id, causes, (build.__doc__ or "").strip(), build, **options))
        return build

    return register
