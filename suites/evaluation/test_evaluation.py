"""What fine-tuning did to the served models: AQI accuracy, general knowledge, speed."""

from __future__ import annotations

import pytest

from grit_impl.verify.claims import family

pytestmark = pytest.mark.verify


@pytest.mark.parametrize("claim", family("evaluation"))
def test_evaluation(judge, claim):
    judge(claim)
