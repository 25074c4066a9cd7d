"""The claims catalogue: each claim is a function with `@claim`, in the file of its family."""

from __future__ import annotations

import difflib
import importlib

from grit_impl.errors import GRITError
from grit_impl.statistics.decision import OUTCOMES, Judgement, Metric, Outcome, decide_at_least, items_to_decide
from grit_impl.verify.claims.base import Claim, Evidence
from grit_impl.verify.claims.registry import REGISTERED, claim

__all__ = [
    "OUTCOMES",
    "Claim",
    "Evidence",
    "Judgement",
    "Metric",
    "Outcome",
    "catalogue",
    "claim",
    "decide_at_least",
    "family",
    "find",
    "items_to_decide",
]
FAMILIES = ("gradients", "curves", "training", "export", "evaluation", "hypotheses", "gpu")
"""The files of claims, in the order in which a report shows them."""
TRAINER = "verdict:trainer"
"""What only a test itself can bring: the gradient ledger of somebody's trainer."""


def catalogue() -> dict[str, Claim]:
    """All claims by id, in the order in which a report shows them; another project's stand last."""
    for name in FAMILIES:
        importlib.import_module(f"{__name__}.{name}")
    place = {name: number for number, name in enumerate(FAMILIES)}
    claims = sorted(REGISTERED.values(), key=lambda each: place.get(each.family, len(place)))
    return {each.id: each for each in claims}


def family(name: str) -> list[str]:
    """The ids of a family's claims that the project's own arms decide, for `@pytest.mark.parametrize("claim", ...)`.

    Raises:
        GRITError: no claim belongs to it.
    """
    found = [each.id for each in catalogue().values() if each.family == name and TRAINER not in each.requires]
    if not found:
        families = ", ".join(dict.fromkeys(each.family for each in catalogue().values()))
        raise GRITError(f"no claim belongs to the family {name!r}; there are {families}")
    return found


def find(which: str | Claim) -> Claim:
    """The claim with this id; a claim is returned as it is.

    Raises:
        GRITError: there is no such claim; the message names the nearest.
    """
    if isinstance(which, Claim):
        return which
    known = catalogue()
    try:
        return known[which]
    except KeyError:
        near = difflib.get_close_matches(which, known, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else "see docs/claims.md"
        raise GRITError(f"unknown claim {which!r}; {hint}") from None
