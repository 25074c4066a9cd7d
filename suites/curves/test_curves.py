"""Are the arms comparable, and do their losses differ by more than reruns do?"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.verify


def test_rerun_is_identical(judge):
    judge("curves.rerun-identical")


def test_losses_are_comparable(judge):
    judge("curves.labels-comparable")


def test_late_callback_changes_nothing(judge):
    judge("curves.late-identical")


@pytest.mark.parametrize("claim", ["curves.pure-beyond-noise", "curves.hybrid-beyond-noise"])
def test_losses_differ_beyond_noise(judge, claim):
    judge(claim)


def test_shape_proves_nothing(judge):
    judge("curves.shape-proves-nothing")
