"""The claims catalogue: small declarations, one file per family."""

from __future__ import annotations

import difflib
from functools import cache

from grit_impl.errors import GRITError
from grit_impl.statistics.decision import OUTCOMES, Judgement, Metric, Outcome, decide_at_least, items_to_decide
from grit_impl.verify.claims.base import Claim, Evidence

__all__ = [
    "OUTCOMES",
    "Claim",
    "Evidence",
    "Judgement",
    "Metric",
    "Outcome",
    "catalogue",
    "decide_at_least",
    "find",
    "items_to_decide",
]


@cache
def catalogue() -> dict[str, Claim]:
    """All claims by id, in the order in which a report shows them."""
    from grit_impl.verify.claims import curves, evaluation, export, gpu, gradients, hypotheses, training

    families = (gradients, curves, training, export, evaluation, hypotheses, gpu)
    claims = [claim for family in families for claim in family.CLAIMS]
    by_id = {claim.id: claim for claim in claims}
    if len(by_id) != len(claims):
        raise AssertionError("two claims share an id")
    return by_id


def find(claim: str | Claim) -> Claim:
    """The claim with this id; a claim is returned as it is.

    Raises:
        GRITError: there is no such claim; the message names the nearest.
    """
    if isinstance(claim, Claim):
        return claim
    try:
        return catalogue()[claim]
    except KeyError:
        near = difflib.get_close_matches(claim, catalogue(), 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else "see docs/claims.md"
        raise GRITError(f"unknown claim {claim!r}; {hint}") from None
