"""Does every exported model load in llama.cpp and generate?"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.verify


@pytest.mark.parametrize(
    "claim",
    ["export.base-generates", "export.baseline-generates", "export.hybrid-generates", "export.pure-generates"],
)
def test_export_generates(judge, claim):
    judge(claim)
