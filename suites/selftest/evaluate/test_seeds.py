"""Effects over training seeds: paired by seed, and honest about how few there are."""

from __future__ import annotations

import pytest

from grit_impl.errors import GRITError
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.seeds import effect_over_seeds


def _evaluation(baseline: int, pure: int, n: int = 100) -> Evaluation:
    rows = [
        {"label": label, "suite": "aqi", "item": str(i), "scores": {"category_right": i < right, "unparsable": False}}
        for label, right in (("baseline", baseline), ("pure", pure))
        for i in range(n)
    ]
    return Evaluation({"baseline": "b", "pure": "p"}, rows)


def test_six_seeds_by_hand() -> None:
    """Oracle: differences 4, 6, 5, 7, 3, 5: mean 5; all of one sign, so p = 2 / 2**6; t interval by hand."""
    found = effect_over_seeds([_evaluation(50, 50 + d) for d in (4, 6, 5, 7, 3, 5)], "pure", "baseline")
    assert found.differences == (4, 6, 5, 7, 3, 5)
    assert found.p == pytest.approx(2 / 2**6)
    half = 2.5706 * 2**0.5 / 6**0.5
    assert (found.interval.low, found.interval.high) == pytest.approx((5 - half, 5 + half), abs=1e-3)
    assert "over 6 seeds, p = 0.031" in found.statement


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([7], "one seed, which supports no statement"),
        ([7, 8, 7, 9, 8], "5 seeds, which cannot reach p < .05 (at best 0.062); run 6"),
        ([7, -6, 5, -7, 3, -1], "decides nothing"),
    ],
)
def test_what_too_few_or_mixed_seeds_do_not_support(seeds: list[int], words: str) -> None:
    """Oracle: two-sided sign-flip test: 2 / 2**n at best."""
    assert words in effect_over_seeds([_evaluation(50, 50 + d) for d in seeds], "pure", "baseline").statement


def test_missing_arms_are_named() -> None:
    """Oracle: the message."""
    with pytest.raises(GRITError, match="evaluation 1 has no items that both 'hybrid' and 'baseline'"):
        effect_over_seeds([_evaluation(50, 60)], "hybrid", "baseline")
    with pytest.raises(GRITError, match="at least one evaluation"):
        effect_over_seeds([], "pure", "baseline")
