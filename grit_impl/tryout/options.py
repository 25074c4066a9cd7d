"""What `grit try` can be told. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from grit_impl.recipes.arms import TrainingSettings, default_training
from grit_impl.settings import count_or_nothing, number, one_of, positive, seed, setting

METRICS = ("loss", "exact", "numeric", "choice", "regex")


def evaluation_seeds(text: str) -> int | None:
    """a whole number of at least 3"""
    if (value := count_or_nothing(text)) is not None and value < 3:
        raise ValueError(text)
    return value


def effect(text: str) -> float:
    """a number above 0 and below 100"""
    if not 0 < (value := number(text)) < 100:
        raise ValueError(text)
    return value


def expression(text: str) -> str:
    """a regular expression"""
    try:
        re.compile(text)
    except (re.error, OverflowError) as error:
        raise ValueError(text) from error
    return text


@dataclass(frozen=True)
class Trying:
    """What `grit try` can be told, besides base, data and the training options that it shares with `grit train`."""

    seeds: int | None = setting(None, "pairs of runs, each from a seed of its own; at least 3", evaluation_seeds)
    trials: int | None = setting(None, "learning rates that every arm is tuned over", count_or_nothing)
    steps: int | None = setting(None, "optimizer steps of a run", count_or_nothing, "max_steps", "steps")
    minutes: float = setting(30.0, "time for everything: steps, trials and seeds that are not given fit it", positive)
    metric: str = setting("loss", f"what is compared on the held-out rows: {', '.join(METRICS)}", one_of(*METRICS))
    pattern: str = setting(
        "", "--metric regex: what must be the same in answer and truth, e.g. AQI ([0-9]+)", expression
    )
    smallest_effect: float = setting(1.0, "smallest gain of interest: percent of the loss, or points", effect)
    seed: int = setting(3407, "seed of the split and of the tuning; those of the pairs follow it", seed)


SHARED = ("batch_size", "accumulation", "learning_rate", "max_length", "rank", "alpha")
"""Options of `TrainingSettings` that `grit try` has, too."""


def training_of(base: str, *, cuda: bool, given: dict[str, Any]) -> TrainingSettings:
    """The settings that all runs share: the preset's for this base, one batch of eight a step where memory allows it.

    Args:
        base: What `find_base` takes.
        cuda: Whether runs are on a GPU.
        given: Those of `SHARED` that were asked for.
    """
    alpha = {"alpha": given["rank"]} if "rank" in given else {}
    found = default_training(base, cuda=cuda, preset="recommended", **{**alpha, **given})
    if found.gradient_checkpointing or {"batch_size", "accumulation"} & set(given):
        return found
    return replace(found, batch_size=8, accumulation=1)
