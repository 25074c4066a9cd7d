"""The claims on the real thing: Unsloth, 4-bit weights, 8-bit AdamW. Needs a CUDA GPU."""

from __future__ import annotations

import pytest

from grit_impl.verify.claims import family, find

pytestmark = [pytest.mark.verify, pytest.mark.gpu]
COST = [claim for claim in family("gpu") if find(claim).requires[0].startswith("cost:")]

EXPERIMENT = [claim for name in ("curves", "training", "export", "evaluation", "hypotheses") for claim in family(name)]


@pytest.mark.parametrize("claim", family("gradients"))
def test_provenance(judge, claim):
    judge(claim)


@pytest.mark.parametrize("claim", [claim for claim in family("gpu") if claim not in COST])
def test_runs(judge, claim):
    judge(claim)


@pytest.mark.parametrize("claim", EXPERIMENT)
def test_experiment(judge, claim):
    """What the arms of the plan learnt, exported and asked: the other suites' claims, on a GPU; counted once."""
    judge(claim)


@pytest.mark.parametrize("claim", COST)
def test_cost(judge, claim):
    """Needs no run of an arm, but minutes of steps: `-k test_cost` alone, `-k "not test_cost"` for the rest."""
    judge(claim)
