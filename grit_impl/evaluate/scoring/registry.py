"""Scorers by name: each reads one answer against one item and says right, wrong, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.evaluate.scoring.knowledge import Said
from grit_impl.evaluate.scoring.text import spoken, words

Item = Mapping[str, Any]
Scorer = Callable[[Item, str], Said]
SCORERS: dict[str, Scorer] = {}


def scorer(name: str) -> Callable[[Scorer], Scorer]:
    """Offer a function as `--scorer NAME`. Its docstring's first line is what the help says.

    It gets the item (`features`: the question; `answer`: the truth, or a list of equally good ones; `choices`, where
    the data set has them) and what the model wrote. `none` answers nothing; it is wrong, and counted apart.
    """

    def register(function: Scorer) -> Scorer:
        SCORERS[name] = function
        return function

    return register


def find_scorer(name: str) -> Scorer:
    """The scorer of this name.

    Raises:
        GRITError: there is none.
    """
    if name not in SCORERS:
        raise GRITError(f"unknown scorer {name!r}: use {', '.join(SCORERS)}")
    return SCORERS[name]


def score(name: str, item: Item, answer: str) -> dict[str, Any]:
    """One answer against its item.

    Returns:
        `correct`, `unparsable` (it answers nothing: empty, reasoning alone, an echo) and `note`, the reason.
    """
    said = find_scorer(name)(item, answer)
    note = ""
    if said == "none":
        note = "no answer" if words(spoken(answer)) else "only reasoning" if words(answer) else "empty"
    return {"correct": said == "right", "unparsable": said == "none", "note": note}


def truths_of(item: Item) -> list[str]:
    """The item's equally good answers."""
    value = item["answer"]
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
