"""Are the arms comparable, and do their losses differ by more than reruns do?"""

from __future__ import annotations

import pytest

from grit_impl.verify.claims import family

pytestmark = pytest.mark.verify


@pytest.mark.parametrize("claim", family("curves"))
def test_curves(judge, claim):
    judge(claim)
