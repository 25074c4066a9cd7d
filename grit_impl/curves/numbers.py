"""Numbers in words that a person reads: one formatter, total over its inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def show(value: Any, spec: str = ".3g") -> str:
    """A number as text.

    Args:
        value: Any number, also NumPy's; None where nothing is known.
        spec: Format of a finite number, as in `format`.

    Returns:
        "unknown" for None, "undefined" for NaN, "infinity" or "-infinity"; what is no number comes back as `str`.
    """
    if isinstance(value, np.generic | np.ndarray) and value.size == 1:
        value = value.item()
    if value is None:
        return "unknown"
    if isinstance(value, bool | str | bytes | complex):
        return str(value)
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        return "-infinity" if value < 0 else "infinity"
    except (TypeError, ValueError):
        return str(value)
    if math.isnan(number):
        return "undefined"
    if math.isinf(number):
        return "infinity" if number > 0 else "-infinity"
    return format(number, spec)


def span(low: Any, high: Any, spec: str = ".3g") -> str:
    """An interval as text: "[low, high]"."""
    return f"[{show(low, spec)}, {show(high, spec)}]"
