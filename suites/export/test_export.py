"""Does every exported model load in llama.cpp and generate?"""

from __future__ import annotations

import pytest

from grit_impl.verify.claims import family

pytestmark = pytest.mark.verify


@pytest.mark.parametrize("claim", family("export"))
def test_export(judge, claim):
    judge(claim)
