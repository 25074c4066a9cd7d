"""What one would like to know of GRIT. Reported with intervals; gated only by --gate-hypotheses."""

from __future__ import annotations

import pytest

from grit_impl.verify.claims import family

pytestmark = pytest.mark.verify


@pytest.mark.parametrize("claim", family("hypotheses"))
def test_hypotheses(judge, claim):
    judge(claim)
