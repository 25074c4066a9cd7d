"""Under which names trainers and trackers log a series, and which of several candidates is meant.

A name is compared by its words: `train/loss`, `Train_Loss` and `train-loss` are one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from grit_impl.errors import GRITError

Words = tuple[str, ...]
FEWEST_LOSSES = 8
"""Fewer say nothing about each other, and are no series but a summary."""


def existing(path: str | Path) -> tuple[Path, str | None]:
    """`FILE::RUN` as the file or folder and the name of one of its runs, None where only a path was given.

    Raises:
        GRITError: there is no such file or folder.
    """
    file, colons, name = str(path).partition("::")
    try:
        if Path(path).exists():
            return Path(path), None
        if colons and Path(file).exists():
            return Path(file), name
    except OSError as error:
        raise GRITError(f"{path}: cannot be read ({error.strerror})") from error
    raise GRITError(f"{file}: no such file or folder")


def words(name: str) -> Words:
    """The lower-case words of a column, tag or metric."""
    return tuple(w for w in re.split(r"[^0-9a-z]+", name.strip().lower()) if w)


def _known(*names: str) -> tuple[Words, ...]:
    return tuple(words(name) for name in names)


NAMES: dict[str, tuple[Words, ...]] = {
    "step": _known(
        "train/global_step",  # transformers in wandb
        "trainer/global_step",  # Lightning in wandb
        "global_step",
        "current_steps",  # LLaMA-Factory
        "optimizer_step",
        "train_step",
        "step",
        "steps",
        "iteration",
        "iterations",
        "iter",
    ),
    "loss": _known(
        "loss",
        "train/loss",
        "loss/train",
        "training/loss",
        "loss/training",
        "train/loss_step",  # Lightning, for on_step with on_epoch
        "training/loss_step",
        "loss_step",
        "step_loss",
        "reduced_train_loss",  # NeMo
        "lm loss",  # Megatron
        "value",  # a scalar that TensorBoard exports as CSV
        "train/loss_epoch",
        "training/loss_epoch",
        "loss_epoch",
        "epoch_loss",  # Keras
        "train/train_loss",  # the mean over the run, which transformers logs once, at the end
    ),
    "grad_norm": _known(
        "grad_norm", "train/grad_norm", "gradient_norm", "train/gradient_norm", "gradnorm", "train/grad_norm_step"
    ),
    "learning_rate": _known("learning_rate", "train/learning_rate", "lr", "train/lr"),
    "tokens": _known("tokens"),
}
"""Known names of each series, the most telling first."""
_SIDELINES = {"step", "steps", "epoch", "epochs", "time", "timestamp", "runtime", "percentage", "index", ""}


def is_series(name: str, series: str | None = None) -> bool:
    """Whether a name is one of the known ones, of this series or of any."""
    return any(words(name) in NAMES[s] for s in ([series] if series else NAMES))


def is_sideline(name: str) -> bool:
    """Whether a column only says where in the run a row stands: a step, an epoch, a time."""
    found = set(words(name) or ("",))
    return bool(found & _SIDELINES) and "loss" not in found


def pick(series: str, counts: Mapping[str, int], wanted: str | None = None) -> str | None:
    """Which of the names holds a series.

    Args:
        series: A key of `NAMES`.
        counts: How many values each name has.
        wanted: The name that the user gave, exactly or by its words.

    Returns:
        The first known name with at least 8 values, else the one with most; None where no name is known.

    Raises:
        GRITError: the wanted name is not there.
    """
    if wanted is not None:
        found = [n for n in counts if n == wanted] or [n for n in counts if words(n) == words(wanted)]
        if len(found) != 1:
            raise GRITError(f"{len(found) or 'no'} columns or tags named {wanted!r}; found {listed(counts)}")
        return found[0]
    known = sorted((n for n in counts if words(n) in NAMES[series]), key=lambda n: NAMES[series].index(words(n)))
    if not known and series == "learning_rate":
        # Lightning names it after the optimizer: lr-AdamW.
        known = [n for n in counts if words(n)[:1] == ("lr",)]
        known = known if len(known) == 1 else []
    full = [n for n in known if counts[n] >= FEWEST_LOSSES]
    return full[0] if full else max(known, key=lambda n: counts[n], default=None)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, the first few of many."""
    found = [" ".join(name.split()) for name in names]
    return (", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")) or "nothing"
