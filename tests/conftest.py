"""What tests of more than one room use."""

from __future__ import annotations

import pytest

from grit_impl.cost.bench import Figure, Growth, exponent, spread
from grit_impl.cost.performance import Performance


@pytest.fixture
def performance() -> Performance:
    """A step that meets its target, one that misses it, seconds that grow with size^1.5, and bytes that do not."""
    sizes = (8, 16, 32, 64)
    seconds = tuple(tuple(1e-3 * size**1.5 * drift for drift in (1, 1.3, 0.8)) for size in sizes)
    flat = ((28840.0,),) * 4
    figures = [
        Figure("step, GRIT over LoRA", spread([1.05] * 6), 1.1),
        Figure("step, r=64 <b>", spread([1.234] * 6), 1.1),
        Figure("seconds by rank", exponent(sizes, seconds), 3.0, Growth("rank", "what GRIT adds", "s", sizes, seconds)),
        Figure("bytes", exponent(sizes, flat), 0.0, Growth("processes", "sent", "B", sizes, flat)),
    ]
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    return Performance("2026-01-02T03:04:05+00:00", "A processor, 2 cores", versions, "abc123", figures)
