"""Did the arms train, alike in everything but the optimizer, and at what cost?"""

from __future__ import annotations

import pytest

from grit_impl.verify.claims import family

pytestmark = pytest.mark.verify


@pytest.mark.parametrize("claim", family("training"))
def test_training(judge, claim):
    judge(claim)
