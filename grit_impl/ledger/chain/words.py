"""What verdicts are written with: tensors, steps and angles, as people say them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.findings import Facts

_NAME = re.compile(r"(?:(?:.*?\.)?layers\.(\d+)\.)?(.*?)\.?lora_(?:embedding_)?([AB])\b")


def number(n: int, what: str) -> str:
    """A count with its noun."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def median(values: pd.Series) -> float:
    """NaN for none."""
    return float(values.median()) if values.notna().any() else float("nan")


def most(rows: pd.Series) -> str:
    """The most frequent value, or 'someone'."""
    counts = rows.dropna().value_counts()
    return str(counts.index[0]) if len(counts) else "someone"


def degrees(turns: pd.Series) -> str:
    """The median angle of values of 1 - cos."""
    angle = np.degrees(np.arccos(np.clip(1 - median(turns), -1, 1)))
    return "an unknown angle" if np.isnan(angle) else f"{angle:.2g} degrees" if angle < 1 else f"{angle:.0f} degrees"


def tensor(name: str) -> str:
    """`...layers.3.self_attn.q_proj.lora_B.default.weight` -> `B of layer 3, self_attn.q_proj`."""
    found = _NAME.match(name)
    if found is None:
        return name
    layer, module, side = found.groups()
    where = ", ".join(part for part in (f"layer {layer}" if layer else "", module.split("model.")[-1]) if part)
    return f"{side} of {where}" if where else side


def of_all(names: Iterable[str], f: Facts) -> str:
    """Some of the ledger's tensors: all, all of a factor, a few by name, or how many."""
    chosen = set(names)
    table = f.tensors.drop_duplicates("name")
    known = set(table.name)
    if chosen >= known:
        return f"all {len(known)} tensors" if len(known) > 1 else "the tensor"
    for group in ("A", "B"):
        if chosen == set(table[table.group == group].name) and len(chosen) > 1:
            return f"{group} of all {len(chosen)} layers"
    if len(chosen) <= 2:
        return " and ".join(tensor(name) for name in sorted(chosen))
    return f"{len(chosen)} of {number(len(known), 'tensor')} (e.g. {tensor(min(chosen))})"


def steps_of(steps: Collection[Any], f: Facts) -> str:
    """`7 of 10 steps`."""
    return f"{len(set(steps))} of {number(len(f.steps), 'step')}"


def since(bad: pd.DataFrame, f: Facts) -> str:
    """From when to when, as far as the ledger saw."""
    first, last = int(bad.step.min()), int(bad.step.max())
    begin, end = (int(f.steps[0]["step"]), int(f.steps[-1]["step"])) if f.steps else (first, last)
    gaps = bad.step.nunique() < last - first + 1
    if gaps:
        return f"in {steps_of(bad.step, f)}, first in step {first}"
    if first == begin:
        return f"in all {number(end - begin + 1, 'step')}" if last == end else f"until step {last} of {end}"
    return f"from step {first} of {end} on" if last == end else f"in steps {first} to {last} of {end}"
