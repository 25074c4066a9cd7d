"""No right export is called wrong, and no wrong one right: the cases of `cases.py`.

Oracle: how each was made. What came out when the cases met the verifier first is in `docs/measurements/testing.md`.
"""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
from bench import Bench

from grit_impl.errors import GRITError


def marked(case: cases.Right | cases.Wrong) -> object:
    """SmolLM2 is fetched, and takes half a minute a case; eight layers and more are left to the night, too."""
    right = case if isinstance(case, cases.Right) else case.right
    nightly = right.base in ("smollm2", "llama-tied-llama3") or "30-layers" in right.base
    return pytest.param(case, id=case.name, marks=[pytest.mark.nightly, pytest.mark.slow] if nightly else [])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Where the cases are made."""
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def fetched(request: pytest.FixtureRequest, bench: Bench) -> None:
    """SmolLM2's folder, for the cases that need it."""
    case = request.node.callspec.params["case"]
    if bench.smollm2 is None and "smollm2" in case.name:
        from grit_impl.recipes.bases import resolve_base

        try:
            bench.smollm2 = Path(resolve_base("smollm2"))
        except GRITError as error:
            pytest.skip(f"SmolLM2 cannot be had: {error}")


@pytest.mark.parametrize("case", map(marked, cases.RIGHT))
def test_right(bench: Bench, case: cases.Right) -> None:
    """Oracle: the export was made as it should be, or as another program makes it (q4_1)."""
    result = bench.right(case)
    assert result.passed, result.summary()
    assert result.positions >= 40


@pytest.mark.parametrize("case", map(marked, cases.WRONG))
def test_wrong(bench: Bench, case: cases.Wrong) -> None:
    """Oracle: the plant; something must be found, or the input refused."""
    assert bench.wrong(case), f"{case.name} was called the trained model"
