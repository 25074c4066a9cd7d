"""The formatter of `grit compare`: total, whatever it is given."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_impl.curves.numbers import show, span

SPECS = [".3g", ".2g", ".4f", "+.4g", ".0%", ".0f", "g"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"),
        (math.nan, "undefined"),
        (math.inf, "infinity"),
        (-math.inf, "-infinity"),
        (np.float32("nan"), "undefined"),
        (np.float64("-inf"), "-infinity"),
        (np.float16(0.5), "0.5"),
        (np.int64(7), "7"),
        (np.array(2.5), "2.5"),
        (np.array([2.5]), "2.5"),
        (np.bool_(True), "True"),
        (Decimal("1.25"), "1.25"),
        (Fraction(1, 4), "0.25"),
        (10**400, "infinity"),
        (-(10**400), "-infinity"),
        (1 / 3, "0.333"),
        ("neither", "neither"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_shown(value: Any, text: str) -> None:
    """Oracle: written by hand."""
    assert show(value) == text


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.floats())))
def test_total(value: Any) -> None:
    """Oracle: Python's own format where the number is finite; text, never an exception, everywhere else."""
    for spec in SPECS:
        text = show(value, spec)
        assert isinstance(text, str)
        if isinstance(value, float) and math.isfinite(value):
            assert text == format(value, spec) == show(np.float64(value), spec)
    assert span(value, None) == f"[{show(value)}, unknown]"
