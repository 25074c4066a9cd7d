"""Did the optimizer consume the preconditioned gradients? Judged on the gradient ledger of each arm."""

from __future__ import annotations

import pytest

from grit_impl.verify.claims import family

pytestmark = pytest.mark.verify


@pytest.mark.parametrize("claim", family("gradients"))
def test_gradients(judge, claim):
    judge(claim)
