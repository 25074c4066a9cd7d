"""Did the optimizer consume the preconditioned gradients? Judged on the gradient ledger of each arm."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.verify


def test_baseline_is_unmodified(judge):
    judge("gradients.baseline-unmodified")


def test_callbacks_moment_reaches_the_optimizer(judge):
    judge("gradients.moment-reaches-optimizer")


def test_pure_is_effective(judge):
    judge("gradients.pure-effective")


def test_hybrid_is_effective(judge):
    judge("gradients.hybrid-effective")


def test_late_callback_is_caught(judge):
    judge("gradients.hybrid-late-caught")
