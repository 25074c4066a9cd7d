"""What one would like to know of GRIT. Reported with intervals; gated only by --gate-hypotheses."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.verify


def test_pure_beats_lora_on_aqi(judge):
    judge("hypotheses.pure-beats-lora")


def test_hybrid_agrees_with_pure(judge):
    judge("hypotheses.hybrid-agrees-with-pure")


def test_pure_retains_more(judge):
    judge("hypotheses.pure-retains-more")


def test_pure_ends_at_a_lower_loss(judge):
    judge("hypotheses.pure-lower-loss")
