"""What fine-tuning did to the served models: AQI accuracy, general knowledge, speed."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.verify
ARMS = ("baseline", "hybrid", "pure")


def test_fine_tuning_works(judge):
    judge("evaluation.fine-tuning-works")


@pytest.mark.parametrize("claim", [f"evaluation.{arm}-delta-aqi" for arm in ARMS])
def test_delta_aqi(judge, claim):
    judge(claim)


@pytest.mark.parametrize("claim", [f"evaluation.{arm}-speed" for arm in ARMS])
def test_speed(judge, claim):
    judge(claim)


@pytest.mark.parametrize("claim", [f"evaluation.{arm}-retention" for arm in ARMS])
def test_retention(judge, claim):
    judge(claim)
