"""The chain of custody: its links, the ways in which they break, and what each is called."""

from __future__ import annotations

from grit_impl.ledger.chain import arrival, change, effect
from grit_impl.ledger.chain.links import CHECKS, LINKS, Breach, Check

MODULES = (arrival, change, effect)
"""In the order of asking: importing them enters their checks."""
CAUSES: dict[str, str] = {
    **{check.cause: check.meaning for check in CHECKS},
    "only-one-factor": "only A's or only B's gradients are modified",
    "update-unexplained": "the parameters move in a way that the optimizer does not explain",
    "effective": "modified gradients reached the optimizer and changed the direction of its updates",
    "no-modifier": "plain training: nothing changes gradients but clipping and scaling",
    "partly-seen": "the run was resumed, and its ledger saw less than half of it",
    "undecided": "the ledger itself failed, or saw no gradient on its way",
}

__all__ = ["CAUSES", "CHECKS", "LINKS", "Breach", "Check"]
