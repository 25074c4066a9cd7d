"""What checks say of what was applied, how often, and where it arrived, on each side of each threshold."""

from __future__ import annotations

from typing import Any

from ledgers import BENT, NAMES, Case, Rows, bent, ledger, statuses

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


CASES: dict[str, Case] = {
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
