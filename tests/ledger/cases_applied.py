"""What checks say of what was applied, how often, and where it arrived, on each side of each threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ledgers import BENT, NAMES, Case, Rows, bent, ledger, some, statuses

from grit_impl.ledger.timeline import LOOP_SCALING

NUMBER = {"mods": 1, "entry": 4.0}
SECOND = "layers.0.q_proj.lora_A.second.weight"
FIRST = "layers.0.q_proj.lora_A.default.weight"


def twice(alike: float, until: int = 8, turns: int = 2) -> Rows:
    """The same code has gone over all tensors twice in the first steps."""

    def step(number: int) -> dict[str, Any]:
        return {"read": 1, "again": NAMES} if number <= until else {"read": 1} if number <= 8 else {}

    return ledger(lambda s, n: {**BENT, "turns": turns, "alike": alike}, step)


def in_turn(only_second: bool = False, unheld: bool = False) -> Rows:
    """Two adapters of a layer, the second from step 6 on; or the first never."""

    def tensor(step: int, name: str) -> dict[str, Any]:
        used = (name == SECOND) == (only_second or step > 5)
        held = {"unheld": 1} if unheld and name == SECOND else {}
        return held if used else {"why": "the active adapter is another", "absent": 1, "raw": None, **held}

    return ledger(tensor, names=[FIRST, SECOND])


TINY = {"update_exact": 1e-4, "update_raw": 1e-2}


def by_hand(factor: float) -> dict[str, Any]:
    """A step in which the training loop multiplies all gradients by a factor."""
    return {"events": [{"who": LOOP_SCALING, "phase": "before", "changed": 4, "factor": factor}]}


def scaled(norm: Callable[[int, str], float]) -> Callable[[int, str], dict[str, Any]]:
    """Gradients of other sizes in each step, each scaled to a norm of its own."""
    return lambda s, n: {
        "mods": 1,
        "turn": 0.0,
        "raw": s / 4,
        "entry": norm(s, n),
        "update_turn": 0.0,
        "update_exact": 0.3,
    }


CASES: dict[str, Case] = {
    "double-buffered": (
        "stale-gradient",
        bent(fit=0.0, own=0.6, stale=0.0, turns=2),
        "40 of 40 modified gradients that were looked into belong to the step before",
        {"stale": 40, "repeated": 0},
    ),
    "turned-twice-and-fresh": ("stale-gradient", bent(fit=0.0, own=0.1, stale=0.0, turns=2), None, {}),
    "scaled-to-nothing-by-hand": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "entry": 1e-8 / s, "update_exact": 1e-9}, lambda s: by_hand(1e-8 / s)),
        "GRIT left 1.8e-09 of the gradients' norm",
        {"room": math.inf, "gain": (1e-8 / 5 + 1e-8 / 6) / 2, "update_ratio": 1e-8},
    ),
    "unscaled-by-hand": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "entry": 2.0**-24, "update_exact": 1e-9}, lambda s: by_hand(2.0**-24)),
        None,
        {},
    ),
    "divided-by-tokens": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "entry": 1e-5 / s, "update_exact": 1e-6}, lambda s: by_hand(1e-5 / s)),
        None,
        {},
    ),
    "b-clipped-by-its-own-norm": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "raw": 1e-6, "entry": 1e-6} if "lora_A" in n else {**BENT, **TINY, "entry": 5e-5}),
        "GRIT left 5.0e-05 of the gradients' norm of B of all 2 layers: it stays where it was, and the other factor "
        "has next to no gradient",
        {"gain": 5e-5, "update_ratio": 1e-2},
    ),
    "b-clipped-and-a-not": (
        "clipped-to-nothing",
        ledger(lambda s, n: BENT if "lora_A" in n else {**BENT, **TINY, "entry": 5e-5}),
        None,
        {},
    ),
    "orthogonal": (
        "cancelled-by-optimizer",
        bent(update_turn=0.02, factor_turn=9e-4, reaction=1.0),
        "the optimizer makes each update orthogonal, which divides the matrix out again: what is left is the error of "
        "its iteration, 11 degrees",
        {"factor_turn": 9e-4, "update_turn": 0.02},
    ),
    "orthogonal-and-turned": (
        "cancelled-by-optimizer",
        bent(update_turn=0.02, factor_turn=2e-3, reaction=1.0),
        None,
        {},
    ),
    "orthogonal-by-chance": (
        "cancelled-by-optimizer",
        some(20, {**BENT, "update_turn": 0.02, "factor_turn": 1e-5, "reaction": 1.0}, {**BENT, "reaction": 1.0}),
        None,
        {},
    ),
    "normalised-each": ("cancelled-by-optimizer", ledger(scaled(lambda s, n: 1.0)), None, {}),
    "normalised-to-its-weight": (
        "cancelled-by-optimizer",
        ledger(scaled(lambda s, n: 1.0 + NAMES.index(n))),
        "the gradients were multiplied by numbers, not by a matrix; the updates are 3 times as large",
        {"update_turn": 0.0, "gradient_turn": 0.0, "update_ratio": 3.0, "gain": 17 / 9},
    ),
    "one-number": (
        "scaled-only",
        ledger(lambda s, n: NUMBER, report=statuses(ready=4)),
        "each gradient was multiplied by one number, 4, as by a matrix in which damping drowns the statistics, or "
        "which none have reached",
        {"gain": 4.0},
    ),
    "two-numbers": (
        "scaled-only",
        ledger(lambda s, n: {**NUMBER, "entry": 4.0 + (s > 5) * 2e-3}, report=statuses(ready=4)),
        None,
        {},
    ),
    "one-number-of-nobody": ("scaled-only", ledger(lambda s, n: NUMBER), None, {}),
    "one-number-after-a-matrix": (
        "scaled-only",
        ledger(lambda s, n: {**NUMBER, "turn_written": 0.3}, report=statuses(ready=4)),
        None,
        {},
    ),
    "twice-by-one-code": (
        "applied-twice",
        twice(0.6),
        "the same code went over the gradients of all 4 tensors twice in a step, with matrices alike",
        {"again": 32, "alike": 0.6},
    ),
    "twice-in-few-steps": ("applied-twice", twice(0.6, until=3), None, {}),
    "twice-but-unlike": ("applied-twice", twice(0.4), None, {}),
    "twice-read-turned-once": ("applied-twice", twice(0.6, turns=1), None, {}),
    "aside": (
        "blown-up",
        bent(turn=0.95, entry=50.0),
        "GRIT made of what had no size in the gradients 50 times their size: all 4 tensors stand at 87 degrees to the "
        "raw ones; the updates are 1 times as large as the raw gradients'",
        {"gain": 50.0, "update_ratio": 1.0},
    ),
    "aside-but-small": ("blown-up", bent(turn=0.95, entry=9.0), None, {}),
    "large-but-along": ("blown-up", bent(turn=0.85, entry=50.0), None, {}),
    "large": (
        "blown-up",
        bent(entry=2e4),
        "GRIT made the gradients of A of all 2 layers 2e+04 times as large; the updates are 1 times as large as the "
        "raw gradients'",
        {"gain": 2e4, "update_ratio": 1.0},
    ),
    "clipped-away": (
        "dropped",
        ledger(lambda s, n: {"entry": 0.0, "lost": 1, "undone_by": "clipping"}),
        "clipping removed 40 of 40 gradients before the optimizer ran",
        {"dropped": 40},
    ),
    "adapters-in-turn": ("not-used", in_turn(), None, {}),
    "adapter-never-active": (
        "not-used",
        in_turn(only_second=True),
        "A of layer 0, q_proj took no part in the forward pass (the active adapter is another), in all 10 steps",
        {"unused": 10},
    ),
    "adapter-left-for-one-that-nobody-trains": (
        "not-used",
        in_turn(unheld=True),
        "A of layer 0, q_proj took no part in the forward pass (the active adapter is another), from step 6 of 10 on",
        {"unused": 5},
    ),
}
