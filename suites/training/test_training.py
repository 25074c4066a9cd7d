"""Did the arms train, alike in everything but the optimizer, and at what cost?"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.verify


def test_same_schedule(judge):
    judge("training.same-schedule")


@pytest.mark.parametrize("claim", ["training.baseline-learns", "training.hybrid-learns", "training.pure-learns"])
def test_arm_learns(judge, claim):
    judge(claim)


@pytest.mark.parametrize("claim", ["training.hybrid-overhead", "training.pure-overhead"])
def test_step_time(judge, claim):
    judge(claim)
