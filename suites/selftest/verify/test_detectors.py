"""Detectors and verdicts on ledgers written by hand: each side of every threshold, and the sentences people read.

A ledger here has ten steps and four tensors (A and B of two layers), unless a case says otherwise.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grit_impl.errors import GRITError
from grit_impl.record import RunRecord
from grit_impl.verify.claims import Evidence
from grit_impl.verify.claims import find as find_claim
from grit_impl.verify.detectors import DETECTORS, Finding
from grit_impl.verify.findings import facts
from grit_impl.verify.verdict import assert_effective, judge_ledger, judge_pair

STEPS = 10
NAMES = [f"layers.{layer}.q_proj.lora_{side}.default.weight" for layer in (0, 1) for side in "AB"]
Rows = list[dict[str, Any]]
PLAIN = {"raw": 1.0, "entry": 1.0, "update": 0.1, "update_exact": 0.1, "update_raw": 0.1, "replay": 1e-6}
# A gradient that GRIT turned and the optimizer consumed.
BENT = {"mods": 1, "turns": 1, "turn": 0.3, "turn_written": 0.3, "update_turn": 0.2, "by": "GRIT"}


def ledger(
    tensor: Callable[[int, str], dict[str, Any]] = lambda step, name: {},
    step: Callable[[int], dict[str, Any]] = lambda step: {},
    report: dict[str, Any] | None = None,
    steps: int = STEPS,
    names: list[str] = NAMES,
) -> Rows:
    """Rows of a plain run, changed by `tensor` and `step`, with the preconditioner's own report at the end."""
    rows: Rows = [{"kind": "run", "tensors": len(names)}]
    for number in range(1, steps + 1):
        rows.append({"kind": "step", "step": number, "held": len(names), "lr": [0.0, 1e-3], **step(number)})
        for name in names:
            digest = f"{name}@"
            hashes = {"hash_raw": digest + f"g{number}", "hash_entry": digest + f"e{number}"}
            hashes |= {"hash_before": digest + f"{number}", "hash_after": digest + f"{number + 1}"}
            rows.append({"kind": "tensor", "step": number, "name": name, **PLAIN, **hashes, **tensor(number, name)})
    return rows + ([{"kind": "factors", "step": steps, **report}] if report else [])


def bent(**changes: Any) -> Rows:
    """All gradients turned and consumed, but for the changes."""
    return ledger(lambda step, name: {**BENT, **changes})


def some(n: int, fields: dict[str, Any], other: dict[str, Any] | None = None) -> Rows:
    """`fields` in the first n of the 40 tensor rows, `other` in the rest."""
    return ledger(lambda step, name: fields if 4 * (step - 1) + NAMES.index(name) < n else other or {})


def find(cause: str, rows: Rows) -> Finding | None:
    """What one detector alone says."""
    return next(d for d in DETECTORS if d.cause == cause).find(facts(rows))


def statuses(**counts: int) -> dict[str, Any]:
    return {"statuses": {name.replace("_", "-"): n for name, n in counts.items()}}


NOT_IDLE = {**BENT}
DEAD = NAMES[3]
# (cause, rows, sentence or None, numbers)
CASES: dict[str, tuple[str, Rows, str | None, dict[str, Any]]] = {
    "nan-written": (
        "non-finite",
        some(3, {"nonfinite": 1, "by": "GRIT"}),
        "3 gradients were finite after backward and not after GRIT wrote them",
        {"nonfinite": 3},
    ),
    "nan-skipped": (
        "non-finite",
        ledger(lambda s, n: {"nonfinite": 1} if s == 2 else {}, lambda s: {"skipped": 1} if s in (2, 5) else {}),
        "4 gradients were finite after backward and not after someone wrote them; 2 steps were skipped",
        {"nonfinite": 4},
    ),
    "nan-factors": (
        "non-finite",
        ledger(report=statuses(non_finite=2, ready=1)),
        "the preconditioner's factors are not finite",
        {"statuses": {"non-finite": 2, "ready": 1}},
    ),
    "nan-factors-half": ("non-finite", ledger(report=statuses(non_finite=1, ready=1)), None, {}),
    "nan-nothing": ("non-finite", ledger(), None, {}),
    "unheld-modified": (
        "wrong-parameters",
        ledger(lambda s, n: {"unheld": 1, "turns": 1} if n in NAMES[:2] else {}),
        "2 modified tensors are held by no optimizer",
        {"unheld": 20, "inactive": 0, "orphans": 0, "replaced": 0},
    ),
    "unheld-untouched": ("wrong-parameters", ledger(lambda s, n: {"unheld": 1, "turns": 0}), None, {}),
    "re-created": (
        "wrong-parameters",
        ledger(lambda s, n: {"unheld": 1}, lambda s: {"replaced": 3 if s == 1 else 4 if s == 2 else None}),
        "4 tensors were re-created after the optimizer was built",
        {"unheld": 0, "inactive": 0, "orphans": 0, "replaced": 4},
    ),
    "re-created-held": ("wrong-parameters", ledger(step=lambda s: {"replaced": 4}), None, {}),
    "re-created-idle": (
        "wrong-parameters",
        ledger(lambda s, n: {"unheld": 1, "raw": 0.0}, lambda s: {"replaced": 1}),
        None,
        {},
    ),
    "untrained-written": (
        "wrong-parameters",
        ledger(lambda s, n: {"raw": 0.0, "turns": 1} if n == DEAD else {}),
        "1 tensors that are not trained were written to",
        {"unheld": 0, "inactive": 10, "orphans": 0, "replaced": 0},
    ),
    "untrained-untouched": ("wrong-parameters", ledger(lambda s, n: {"raw": 0.0} if n == DEAD else {}), None, {}),
    "once-trained-written": (
        "wrong-parameters",
        ledger(lambda s, n: {"raw": 1.0 if s == 4 else 0.0, "turns": 1} if n == DEAD else {}),
        None,
        {},
    ),
    "untrained-and-trained-written": (
        "wrong-parameters",
        ledger(lambda s, n: {"raw": 0.0, "turns": 1} if n == DEAD else NOT_IDLE),
        None,
        {},
    ),
    "orphans": (
        "wrong-parameters",
        ledger(step=lambda s: {"orphans": 2 if s == 3 else 1 if s == 4 else 0}),
        "gradients of 3 tensors that are no longer in the model were written",
        {"unheld": 0, "inactive": 0, "orphans": 3, "replaced": 0},
    ),
    "orphans-besides": ("wrong-parameters", ledger(lambda s, n: NOT_IDLE, lambda s: {"orphans": 1}), None, {}),
    "all-skipped": (
        "no-steps",
        ledger(step=lambda s: {"skipped": 1}),
        "10 steps seen, 10 skipped by GradScaler, none by a torch optimizer that holds a watched parameter",
        {"skipped": 10},
    ),
    "none-held": (
        "no-steps",
        ledger(step=lambda s: {"held": 0, "skipped": 1 if s == 1 else 0}),
        "10 steps seen, 1 skipped by GradScaler, none by a torch optimizer that holds a watched parameter",
        {"skipped": 1},
    ),
    "one-held": ("no-steps", ledger(step=lambda s: {"held": int(s == 7), "skipped": int(s != 7)}), None, {}),
    "dropped": (
        "dropped",
        some(36, {"lost": 1, "undone_by": "zero_grad"}),
        "zero_grad removed 36 of 40 gradients",
        {"dropped": 36},
    ),
    "dropped-some": ("dropped", some(35, {"lost": 1, "undone_by": "zero_grad"}), None, {}),
    "dropped-none": ("dropped", ledger(lambda s, n: {"raw": 0.0, "lost": 1}), None, {}),
    "zero-rate": (
        "learning-rate-zero",
        ledger(lambda s, n: {"hash_after": f"{n}@{s}"}, lambda s: {"lr": [1e-3, 0.0]}),
        "the learning rate is 0 in all 10 steps",
        {"still": 40, "highest_lr": 0.0},
    ),
    "no-bit-changed": (
        "learning-rate-zero",
        ledger(lambda s, n: {"hash_after": f"{n}@{s}"}, lambda s: {"lr": [0.0, s * 1e-3]}),
        "40 of 40 updates changed no bit",
        {"still": 40, "highest_lr": 1e-2},
    ),
    "no-rates": (
        "learning-rate-zero",
        ledger(lambda s, n: {"hash_after": f"{n}@{s}"}, lambda s: {"lr": None}),
        "40 of 40 updates changed no bit",
        {"still": 40, "highest_lr": None},
    ),
    "still-99": (
        "learning-rate-zero",
        ledger(lambda s, n: {"hash_after": f"{n}@{s + (s == 1)}"}, steps=100, names=NAMES[:1]),
        "99 of 100 updates changed no bit",
        {"still": 99, "highest_lr": 1e-3},
    ),
    "still-98": (
        "learning-rate-zero",
        ledger(lambda s, n: {"hash_after": f"{n}@{s + (s < 3)}"}, steps=100, names=NAMES[:1]),
        None,
        {},
    ),
    "still-unknown": ("learning-rate-zero", ledger(lambda s, n: {"hash_after": None}), None, {}),
    "micro": (
        "applied-on-micro-steps",
        ledger(lambda s, n: {"micro": "clip"} if s < 3 else {}),
        "clip changed partial sums, to which the next backward adds, in 2 of 10 steps",
        {"micro_steps_modified": 2},
    ),
    "micro-once": ("applied-on-micro-steps", ledger(lambda s, n: {"micro": "clip"} if s == 1 else {}), None, {}),
    "late": (
        "modified-too-late",
        ledger(lambda s, n: {"late": "callback" if s < 6 else "hook"} if s < 8 else {}),
        "callback changed gradients after the optimizer step, in 7 steps",
        {"late": 28, "late_steps": 7},
    ),
    "late-as-well": ("modified-too-late", ledger(lambda s, n: {**NOT_IDLE, "late": "callback"}), None, {}),
    "late-reads": (
        "modified-too-late",
        ledger(step=lambda s: {"late_reads": {"a": 1, "b": 2 if s < 3 else 0}, "hooked_modules": 4} if s < 4 else {}),
        "b looked for gradients after they had been used and cleared",
        {"late_reads": 4},
    ),
    "late-reads-of-nobody": ("modified-too-late", ledger(step=lambda s: {"late_reads": {"a": 1}}), None, {}),
    "late-none": ("modified-too-late", ledger(report=statuses(ready=1)), None, {}),
    "leftover": (
        "accumulated-across-steps",
        ledger(step=lambda s: {"leftover": 4 if s > 5 else 0}),
        "5 of 10 steps began with the gradients of the step before",
        {"leftover_steps": 5},
    ),
    "leftover-some": ("accumulated-across-steps", ledger(step=lambda s: {"leftover": 4 if s > 6 else 0}), None, {}),
    "leftover-two-steps": (
        "accumulated-across-steps",
        ledger(step=lambda s: {"leftover": int(s == 2)}, steps=2),
        "1 of 2 steps began with the gradients of the step before",
        {"leftover_steps": 1},
    ),
    "leftover-one-step": ("accumulated-across-steps", ledger(steps=1), None, {}),
    "overwritten": (
        "overwritten",
        some(20, {**BENT, "turn": 0.0, "undone_by": "restore"}, BENT),
        "GRIT changed 20 gradients by 1 - cos = 0.3; restore put them back",
        {"overwritten": 20, "overwritten_by": "restore", "written_by": "GRIT"},
    ),
    "overwritten-some": ("overwritten", some(19, {**BENT, "turn": 0.0}, BENT), None, {}),
    "overwritten-at-the-limit": ("overwritten", bent(turn_written=1e-4, turn=0.0), None, {}),
    "overwritten-within-rounding": (
        "overwritten",
        bent(turn_written=2e-4, turn=1e-4),
        "GRIT changed 40 gradients by 1 - cos = 0.0002; someone put them back",
        {"overwritten": 40, "overwritten_by": "someone", "written_by": "GRIT"},
    ),
    "overwritten-lost": ("overwritten", bent(turn=0.0, lost=1), None, {}),
    "silent-hooks": (
        "starved",
        ledger(step=lambda s: {"hooked_modules": 7 if s == 2 else 6, "module_calls": 0}),
        "gradients reach 4 LoRA tensors, but the 7 modules with hooks were called 0 times: something computes these "
        "layers without calling them (fused kernels)",
        {"hooked_modules": 7, "module_calls": 0, "statuses": {}},
    ),
    "called-once": ("starved", ledger(step=lambda s: {"hooked_modules": 6, "module_calls": int(s == 5)}), None, {}),
    "no-hooks": ("starved", ledger(), None, {}),
    "nothing-live": ("starved", ledger(lambda s, n: {"raw": 0.0}, lambda s: {"hooked_modules": 6}), None, {}),
    "starved": (
        "starved",
        ledger(step=lambda s: {"hooked_modules": 6, "module_calls": 2}, report=statuses(starved=3, ready=2)),
        "the preconditioner reports 3 layers without samples",
        {"hooked_modules": 6, "module_calls": 20, "statuses": {"starved": 3, "ready": 2}},
    ),
    "starved-half": ("starved", ledger(report=statuses(starved=2, ready=2)), None, {}),
    "starved-but-works": ("starved", ledger(lambda s, n: NOT_IDLE, report=statuses(starved=3)), None, {}),
    "not-ready": (
        "not-ready",
        ledger(report={**statuses(collecting=3, ready=3), "layers": [{"samples": 5}, {"samples": 9}, {}]}),
        "3 of 6 layers have no ready factor",
        {"statuses": {"collecting": 3, "ready": 3}, "most_samples": 9},
    ),
    "not-ready-unsaid": (
        "not-ready",
        ledger(report=statuses(collecting=2)),
        "2 of 2 layers have no ready factor",
        {"statuses": {"collecting": 2}, "most_samples": None},
    ),
    "mostly-ready": ("not-ready", ledger(report=statuses(collecting=2, ready=3)), None, {}),
    "no-report": ("not-ready", ledger(), None, {}),
    "not-ready-but-works": ("not-ready", ledger(lambda s, n: NOT_IDLE, report=statuses(collecting=3)), None, {}),
    "clipped": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "raw": 1e5}, lambda s: {"max_norm": 1.0}),
        "clipping left 5.0e-06 of the gradients' norm",
        {"room": 5e-6, "gain": 1e-5, "update_ratio": 1.0},
    ),
    "clipped-room": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "raw": 4e3, "entry": 4e3}, lambda s: {"max_norm": 1.0}),
        None,
        {},
    ),
    "clipped-gain": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "entry": 5e-5, "update_exact": 4e-3}, lambda s: {"max_norm": 1.0}),
        "clipping left 5.0e-05 of the gradients' norm",
        {"room": 0.5, "gain": 5e-5, "update_ratio": 0.04},
    ),
    "clipped-adaptive": (
        "clipped-to-nothing",
        ledger(
            lambda s, n: {**BENT, "entry": 5e-5, "update_exact": 0.05, "update_raw": 1.0}, lambda s: {"max_norm": 1.0}
        ),
        None,
        {},
    ),
    "clipped-unscaled": (
        # The scaler took a factor of 2**-10 out; the norm that is clipped is 2 * 1024 / 1024 = 2.
        "clipped-to-nothing",
        ledger(
            lambda s, n: {**BENT, "raw": 1024.0, "entry": 1e-5, "update_exact": 1e-3},
            lambda s: {"max_norm": 1.0, "events": [{"who": "GradScaler", "factor": 2.0**-10}]},
        ),
        "clipping left 1.0e-05 of the gradients' norm",
        {"room": 0.5, "gain": 1e-5, "update_ratio": 0.01},
    ),
    "no-clipping": ("clipped-to-nothing", bent(raw=1e5), None, {}),
    "clipped-unmodified": (
        "clipped-to-nothing",
        ledger(lambda s, n: {"raw": 1e5}, lambda s: {"max_norm": 1.0}),
        None,
        {},
    ),
    "twice": (
        "applied-twice",
        some(8, {**BENT, "turns": 2, "twice": 0.1}, BENT),
        "the same matrix was applied again to 8 of 40 modified gradients",
        {"twice": 8, "twice_residual": 0.1},
    ),
    "twice-rarely": ("applied-twice", some(7, {**BENT, "turns": 2, "twice": 0.1}, BENT), None, {}),
    "two-matrices": ("applied-twice", bent(turns=2, twice=0.2), None, {}),
    "twice-unknown": ("applied-twice", bent(turns=2), None, {}),
    "twice-half": (
        "applied-twice",
        some(20, {**BENT, "turns": 3, "twice": 0.0}, {**BENT, "turns": 2, "twice": 0.9}),
        "the same matrix was applied again to 40 of 40 modified gradients",
        {"twice": 40, "twice_residual": 0.0},
    ),
    "twice-less-than-half": (
        "applied-twice",
        some(19, {**BENT, "turns": 2, "twice": 0.0}, {**BENT, "turns": 2, "twice": 0.9}),
        None,
        {},
    ),
    "against": (
        "against-the-gradient",
        some(32, {**BENT, "turn": 1.5}, BENT),
        "32 of 40 modified gradients have a negative cosine",
        {"cosine": -0.5},
    ),
    "against-some": ("against-the-gradient", some(31, {**BENT, "turn": 1.5}, BENT), None, {}),
    "square": ("against-the-gradient", bent(turn=1.09), None, {}),
    "exactly-square": ("against-the-gradient", some(20, {**BENT, "turn": 1.0}, {**BENT, "turn": 1.4}), None, {}),
    "against-none": ("against-the-gradient", ledger(), None, {}),
    "stale": (
        "stale-gradient",
        some(20, {**BENT, "stale": 0.01, "fit": 0.5}, {**BENT, "stale": 0.9, "fit": 0.9}),
        "20 of 40 modified gradients belong to the step before",
        {"stale": 20, "repeated": 0},
    ),
    "stale-less": (
        "stale-gradient",
        some(19, {**BENT, "stale": 0.01, "fit": 0.5}, {**BENT, "stale": 0.9, "fit": 0.9}),
        None,
        {},
    ),
    "stale-limit": ("stale-gradient", bent(stale=0.05, fit=0.5), None, {}),
    "stale-explained": ("stale-gradient", bent(stale=0.01, fit=0.2), None, {}),
    "stale-repeated": (
        "stale-gradient",
        ledger(lambda s, n: {**BENT, "hash_entry": f"{n}{min(s, 5)}"}),
        "20 of 40 gradients are bit-equal to those of the step before",
        {"stale": 0, "repeated": 20},
    ),
    "stale-repeated-less": ("stale-gradient", ledger(lambda s, n: {**BENT, "hash_entry": f"{n}{min(s, 6)}"}), None, {}),
    "stale-unknown": ("stale-gradient", bent(hash_entry=None), None, {}),
    "unrelated": (
        "unrelated-gradient",
        bent(turn=1.05, fit=0.3),
        "the written gradients have cosine -0.05 with the raw ones and are no r x r multiple of them",
        {"cosine": -0.05, "fit": 0.3},
    ),
    "unrelated-turned": ("unrelated-gradient", bent(turn=0.89, fit=0.8), None, {}),
    "unrelated-fits": ("unrelated-gradient", bent(turn=1.0, fit=0.29), None, {}),
    "unrelated-none": ("unrelated-gradient", ledger(), None, {}),
    "undone": (
        "update-undone",
        # The step after finds what was there before, in five of the nine that have a next step.
        ledger(lambda s, n: {"hash_before": f"{n}@{1 if s < 7 else s}"}),
        "20 of 36 updates were reverted",
        {"undone": 20},
    ),
    "undone-less": ("update-undone", ledger(lambda s, n: {"hash_before": f"{n}@{1 if s < 5 else s}"}), None, {}),
    "undone-still": (
        "update-undone",
        ledger(lambda s, n: {"hash_before": n, "hash_after": n}),
        None,
        {},
    ),
    "raw-used": (
        "not-consumed",
        bent(replay=0.5, update_turn=5e-4),
        "the updates are those of the raw gradients (replay residual 0.5)",
        {"replay": 0.5, "update_turn": 5e-4, "reaction": math.nan},
    ),
    "no-reaction": (
        "not-consumed",
        bent(reaction=1e-7),
        "the optimizer's update does not depend on `.grad`: it has gradients of its own",
        {"replay": 1e-6, "update_turn": 0.2, "reaction": 1e-7},
    ),
    "some-reaction": ("not-consumed", bent(reaction=1e-6), None, {}),
    "unexplained": (
        "not-consumed",
        bent(replay=0.07, update_turn=1e-3),
        "the optimizer's replay misses the updates by 7%: something else moves the parameters",
        {"replay": 0.07, "update_turn": 1e-3, "reaction": math.nan},
    ),
    "replay-limit": ("not-consumed", bent(replay=0.05, update_turn=0.0), None, {}),
    "replay-unknown": ("not-consumed", bent(replay=None), None, {}),
    "turned-in-vain": (
        "cancelled-by-optimizer",
        some(2, {**BENT, "update_turn": 5e-4, "update_exact": 0.102}),
        "the gradients were turned, the updates are the unmodified ones (1 - cos = 5.0e-04)",
        {"update_turn": 5e-4, "gradient_turn": 0.3, "update_ratio": 1.02, "gain": 1.0},
    ),
    "scaled-in-vain": (
        "cancelled-by-optimizer",
        bent(turn=0.0, turn_written=0.0, entry=3.0, update_turn=0.0),
        "the gradients were only scaled, the updates are the unmodified ones (1 - cos = 0.0e+00)",
        {"update_turn": 0.0, "gradient_turn": 0.0, "update_ratio": 1.0, "gain": 3.0},
    ),
    "scaled-only": (
        "cancelled-by-optimizer",
        bent(turn=0.0, turn_written=0.0, entry=3.0, update_turn=0.0, update_exact=0.3),
        "the updates are 3 times as large, in the same direction (1 - cos = 0.0e+00)",
        {"update_turn": 0.0, "gradient_turn": 0.0, "update_ratio": 3.0, "gain": 3.0},
    ),
    "scaled-down": (
        "cancelled-by-optimizer",
        bent(turn=0.0, turn_written=0.0, update_turn=0.0, update_exact=0.097),
        "the updates are 0.97 times as large, in the same direction (1 - cos = 0.0e+00)",
        {"update_turn": 0.0, "gradient_turn": 0.0, "update_ratio": 0.97, "gain": 1.0},
    ),
    "update-turned": ("cancelled-by-optimizer", bent(update_turn=1e-3), None, {}),
    "touched-rarely": ("cancelled-by-optimizer", some(1, {**BENT, "update_turn": 0.0}), None, {}),
    "touched-never": ("cancelled-by-optimizer", ledger(), None, {}),
    "scaled-without-replay": (
        "cancelled-by-optimizer",
        bent(turn=5e-5, update_turn=None),
        "the gradients were only scaled, the updates are the unmodified ones (1 - cos = nan)",
        {"update_turn": math.nan, "gradient_turn": 5e-5, "update_ratio": math.nan, "gain": 1.0},
    ),
    "turned-without-replay": ("cancelled-by-optimizer", bent(turn=1e-4, update_exact=0.0), None, {}),
    "one-layer": (
        "only-some-layers",
        ledger(lambda s, n: BENT if "layers.0" in n and s > 2 else {}),
        "1 of 2 layers are never modified, e.g. layers.1.q_proj",
        {"layers": 2, "layers_missing": 1},
    ),
    "all-layers": ("only-some-layers", bent(), None, {}),
    "no-layer": ("only-some-layers", ledger(), None, {}),
    "one-of-fifty": (
        "only-some-layers",
        ledger(lambda s, n: {} if n.startswith("l7.") else BENT, steps=2, names=[f"l{k}.lora_A.w" for k in range(50)]),
        "1 of 50 layers are never modified, e.g. l7",
        {"layers": 50, "layers_missing": 1},
    ),
    "one-of-fifty-one": (
        "only-some-layers",
        ledger(lambda s, n: {} if n.startswith("l7.") else BENT, steps=2, names=[f"l{k}.lora_A.w" for k in range(51)]),
        None,
        {},
    ),
    "gone-before-the-first": (
        # A layer that has gradients only before preconditioning began is not missing from it.
        "only-some-layers",
        ledger(lambda s, n: BENT if "layers.0" in n and s > 2 else {"raw": float(s < 3)} if "layers.1" in n else {}),
        None,
        {},
    ),
    "only-b": (
        "only-one-factor",
        ledger(lambda s, n: BENT if "lora_B" in n and s > 5 else {}),
        "B is preconditioned (100%), A is not (0%)",
        {"share_A": 0.0, "share_B": 1.0},
    ),
    "hardly-a": (
        "only-one-factor",
        ledger(lambda s, n: BENT if n.startswith("b") or s == 1 else {}, steps=21, names=["a.lora_A.w", "b.lora_B.w"]),
        "B is preconditioned (100%), A is not (5%)",
        {"share_A": 1 / 21, "share_B": 1.0},
    ),
    "sometimes-a": (
        "only-one-factor",
        ledger(lambda s, n: BENT if n.startswith("b") or s == 1 else {}, steps=20, names=["a.lora_A.w", "b.lora_B.w"]),
        None,
        {},
    ),
    "both-factors": ("only-one-factor", bent(), None, {}),
    "neither-factor": ("only-one-factor", ledger(), None, {}),
    "no-b": (
        "only-one-factor",
        ledger(lambda s, n: BENT if "0" in n else {}, names=["l0.lora_A.w", "l1.lora_A.w"]),
        None,
        {},
    ),
    "others-do-not-count": (
        "only-one-factor",
        ledger(lambda s, n: BENT if "lora" in n else {}, names=["l.lora_A.w", "l.bias"]),
        None,
        {},
    ),
    "stopped": (
        "stopped",
        ledger(lambda s, n: BENT if s < 8 else {}),
        "no gradient was modified after step 7 of 10",
        {"last_modified": 7},
    ),
    "stopped-near-the-end": ("stopped", ledger(lambda s, n: BENT if s < 9 else {}), None, {}),
    "stopped-short-run": ("stopped", ledger(lambda s, n: BENT if s < 3 else {}, steps=5), None, {}),
    "stopped-six": (
        "stopped",
        ledger(lambda s, n: BENT if s < 5 else {}, steps=6),
        "no gradient was modified after step 4 of 6",
        {"last_modified": 4},
    ),
    "stopped-six-at-five": ("stopped", ledger(lambda s, n: BENT if s < 6 else {}, steps=6), None, {}),
    "never-started": ("stopped", ledger(), None, {}),
    "effective": (
        "effective",
        ledger(lambda s, n: BENT if s > 5 else {}),
        "50% of the gradients were turned (1 - cos = 0.3) in 5 of 10 steps; the optimizer consumed them (replay 1e-06)"
        " and its updates turned by 0.2",
        {"by": "GRIT"},
    ),
    "effective-without-replay": (
        "effective",
        bent(update_turn=None, by=None),
        "100% of the gradients were turned (1 - cos = 0.3) in 10 of 10 steps",
        {"by": "someone"},
    ),
    "effective-in-one-percent": (
        "effective",
        ledger(lambda s, n: BENT if s == 1 else {}, steps=100, names=NAMES[:1]),
        "1% of the gradients were turned (1 - cos = 0.3) in 1 of 100 steps; the optimizer consumed them (replay 1e-06)"
        " and its updates turned by 0.2",
        {"by": "GRIT"},
    ),
    "effective-in-less": (
        "effective",
        ledger(lambda s, n: BENT if s == 1 else {}, steps=101, names=NAMES[:1]),
        None,
        {},
    ),
    "turned-by-rounding": ("effective", bent(turn=1e-4), None, {}),
    "turned-by-clipping": ("effective", bent(mods=0), None, {}),
    "nothing-written": (
        "nothing-written",
        ledger(report=statuses(ready=4)),
        "a preconditioner is attached, but changes no gradient before the optimizer: not called, or written to a copy",
        {"statuses": {"ready": 4}},
    ),
    "hooks-alone": (
        "nothing-written",
        ledger(step=lambda s: {"hooked_modules": int(s == 3)}),
        "a preconditioner is attached, but changes no gradient before the optimizer: not called, or written to a copy",
        {"statuses": {}},
    ),
    "nobody-attached": ("nothing-written", ledger(), None, {}),
    "plain": ("no-modifier", ledger(), "no gradient was modified in 10 steps", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_detector(name: str) -> None:
    """Oracle: what was written into the ledger, on one side or the other of the detector's threshold."""
    cause, rows, sentence, numbers = CASES[name]
    found = find(cause, rows)
    if sentence is None:
        assert found is None, found
        return
    assert found is not None
    assert found.summary == sentence
    assert found.numbers.keys() == numbers.keys()
    for key, value in numbers.items():
        near = pytest.approx(value, nan_ok=True) if isinstance(value, float) else value
        assert found.numbers[key] == near, key


@pytest.mark.parametrize(
    ("name", "cause", "effective", "fault"),
    [
        ("effective", "effective", True, False),
        ("plain", "no-modifier", None, False),
        ("all-skipped", "no-steps", None, True),
        ("unexplained", "update-unexplained", None, True),
        ("scaled-only", "scaled-only", False, True),
        ("no-bit-changed", "no-update", False, True),
        ("overwritten", "overwritten", False, True),
    ],
)
def test_verdict(name: str, cause: str, effective: bool | None, fault: bool) -> None:
    """Oracle: the detector's cause; where nothing can be said about the modifier, `effective` is None, not False."""
    verdict = judge_ledger(CASES[name][1])
    assert (verdict.cause, verdict.effective, verdict.fault) == (cause, effective, fault)
    assert verdict.summary == CASES[name][2]
    assert str(verdict) == f"{cause}: {verdict.summary}"


def test_first_detector_that_answers_names_the_cause() -> None:
    """Oracle: NaN written into an otherwise effective run; without any detector nothing is decided."""
    rows = bent(nonfinite=1)
    assert judge_ledger(rows).cause == "non-finite"
    nothing = judge_ledger(rows, [])
    assert (nothing.cause, nothing.effective) == ("undecided", None)
    assert nothing.numbers["steps"] == STEPS


def test_numbers_of_a_verdict() -> None:
    """Oracle: A turned at 0.3 from step 3 on, B at 0.5 in all steps; medians and shares by hand."""
    turned = {
        "lora_A": {**BENT, "condition": 8.0},
        "lora_B": {**BENT, "turn": 0.5, "update_turn": 0.4, "identity": 2.0},
    }

    def tensor(step: int, name: str) -> dict[str, Any]:
        side = "lora_A" if "lora_A" in name else "lora_B"
        return turned[side] if side == "lora_B" or step > 2 else {"replay": 1.0}

    def step(number: int) -> dict[str, Any]:
        return {"order": ["backward", "GRIT", "step"] if number == 4 else ["backward", "step"]}

    verdict = judge_ledger(ledger(tensor, step, statuses(ready=4)))
    assert verdict.numbers == {
        "steps": 10,
        "tensors": 4,
        "active_steps": 10,
        "share_modified": 0.9,
        "statuses": {"ready": 4},
        "order": ["backward", "GRIT", "step"],
        "turn": 0.5,
        "update_turn": 0.4,
        "replay": 1e-6,
        "by": "GRIT",
    }
    assert verdict.per_group == {
        "A": {"tensors": 2, "share_modified": 0.8, "turn": 0.3, "update_turn": 0.2, "condition": 8.0},
        "B": {"tensors": 2, "share_modified": 1.0, "turn": 0.5, "update_turn": 0.4, "identity_distance": 2.0},
    }
    plain = judge_ledger(ledger())
    assert plain.numbers == {"steps": 10, "tensors": 4, "active_steps": 0, "share_modified": 0.0, "replay": 1e-6}


def test_rounding_of_numbers() -> None:
    """Oracle: four significant digits; 13 of 40 rows is 0.325, 1 of 3 rows 0.3333."""
    assert judge_ledger(some(13, BENT)).numbers["share_modified"] == 0.325
    thirds = ledger(lambda s, n: {**BENT, "turn": 0.123456} if s == 1 else {}, steps=3, names=NAMES[:1])
    verdict = judge_ledger(thirds)
    assert verdict.numbers["share_modified"] == 0.3333
    assert verdict.numbers["turn"] == 0.1235
    assert verdict.per_group["A"]["share_modified"] == 0.3333


def test_assert_effective_says_why() -> None:
    """Oracle: the cause, the sentence and every number; an allowed cause passes."""
    assert assert_effective(bent()).cause == "effective"
    late = CASES["late"][1]
    with pytest.raises(AssertionError) as error:
        assert_effective(late)
    text = str(error.value)
    assert text.startswith("the modified gradients had no effect: modified-too-late: callback changed gradients")
    assert "late = 28, late_steps = 7" in text
    assert assert_effective(late, allow=["modified-too-late"]).effective is False


def other(**fields: Any) -> Rows:
    """A run beside the plain one: the same data, parameters that differ after each step from 4 on."""
    return ledger(lambda s, n: {"hash_after": f"{n}@{s + 1}{'x' if s > 3 else ''}", **(fields if s > 3 else {})})


@pytest.mark.parametrize(
    ("rows", "cause", "effective", "sentence"),
    [
        (
            ledger(),
            "identical-to-baseline",
            False,
            "every parameter is bit-equal to the baseline's after each of 10 steps",
        ),
        (
            ledger(lambda s, n: {"raw": 1.02, "hash_after": "x"}),
            "different-data",
            None,
            "the first gradients differ by 2.0% before any update: other data, labels or initial weights",
        ),
        (other(), "same-within-rounding", False, "gradients and updates agree with the baseline's to 0.0e+00"),
        (
            other(update=0.2),
            "differs",
            True,
            "updates differ from the baseline's by 35.0%, from step 4",
        ),
        (other(raw=2.0), "differs", True, "updates differ from the baseline's by 0.0%, from step 4"),
        (ledger(names=["elsewhere"]), "nothing-in-common", None, "the two ledgers share no step and tensor"),
    ],
    ids=["identical", "data", "rounding", "update", "raw", "nothing"],
)
def test_pair(rows: Rows, cause: str, effective: bool | None, sentence: str) -> None:
    """Oracle: by hand; 7 of 10 steps with half the update's larger size apart: 35%."""
    verdict = judge_pair(rows, ledger())
    assert (verdict.cause, verdict.effective, verdict.summary) == (cause, effective, sentence)


def test_numbers_of_a_pair() -> None:
    """Oracle: updates of 0.2 against 0.1 in 7 of 10 steps, hashes equal in 3 of 10; a missing zero is no difference."""
    verdict = judge_pair(other(update=0.2), ledger())
    expected = {"rows": 40, "steps": 10, "first_raw": 0.0, "raw": 0.0, "update": 0.35, "bit_equal": 0.3, "onset": 4}
    assert verdict.numbers == pytest.approx(expected)
    assert judge_pair(ledger(steps=4), ledger()).numbers["rows"] == 16
    silent = ledger(lambda s, n: {"raw": 0.0, "update": 0.0, "hash_after": "x"})
    assert judge_pair(silent, ledger(lambda s, n: {"raw": 0.0, "update": 0.0})).cause == "same-within-rounding"


@pytest.mark.parametrize(
    ("first", "later", "cause"),
    [
        (1.009, 1.0, "same-within-rounding"),
        (1.011, 1.0, "different-data"),
        (1.0, 1.0009, "same-within-rounding"),
        (1.0, 1.002, "differs"),
    ],
)
def test_thresholds_of_a_pair(first: float, later: float, cause: str) -> None:
    """Oracle: 1% of the first gradients means other data, 0.1% on average a difference."""
    rows = ledger(lambda s, n: {"raw": first if s == 1 else later, "hash_after": "x"}, steps=100, names=NAMES[:1])
    assert judge_pair(rows, ledger(steps=100, names=NAMES[:1])).cause == cause


def test_not_a_ledger() -> None:
    """Oracle: rows without the header, and none at all."""
    for rows in ([], ledger()[1:]):
        with pytest.raises(GRITError, match="not a gradient ledger"):
            judge_ledger(rows)


def test_facts_of_rows() -> None:
    """Oracle: live, bent and touched by hand, on rows that miss one of their conditions each."""
    changes = ({"raw": 0.0}, {"raw": math.inf}, {"unheld": 1}, {"turn": 1e-4}, {"mods": None}, {"turn": None}, {})
    rows = ledger(lambda s, n: {**BENT, **changes[s - 1]}, steps=len(changes), names=NAMES[:1])
    table = facts(rows)
    assert list(table.live.step) == [4, 5, 6, 7]
    assert list(table.bent.step) == [7]
    assert list(table.touched.step) == [4, 6, 7]
    assert list(table.tensors.turn)[5] == 0.0
    assert table.tensors.layer[0] == "layers.0.q_proj"
    assert table.share(table.bent, table.live) == 0.25
    assert table.share(table.bent, table.bent[:0]) == 0.0
    missing = facts(ledger(lambda s, n: {"entry": None, "turn": None, "mods": 1}, names=["w"]))
    assert missing.tensors.turn.isna().all()
    assert set(missing.tensors.group) == {"other"}
    assert missing.statuses == {}
    assert not missing.modifier_known


def test_last_report_counts() -> None:
    """Oracle: the preconditioner's report at the end of training, not the first one."""
    rows = [*ledger(report=statuses(collecting=4)), {"kind": "factors", "step": 10, **statuses(ready=4)}]
    assert facts(rows).statuses == {"ready": 4}
    assert facts(rows).modifier_known


@pytest.fixture
def resumed(tmp_path: Path) -> Callable[[Rows, int], RunRecord]:
    """A run record whose ledger begins after step k."""

    def write(rows: Rows, k: int) -> RunRecord:
        record = RunRecord.create(tmp_path / f"{k}-{len(rows)}", arm="pure", resumed_from=k or None)
        with gzip.open(record.ledger, "wt") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
        return record

    return write


@pytest.mark.parametrize(
    ("name", "unseen", "cause", "effective", "claims"),
    [
        ("effective", 0, "effective", True, ("supported", "refuted")),
        ("effective", 10, "effective", True, ("supported", "refuted")),
        ("effective", 11, "partly-seen", None, ("inconclusive", "inconclusive")),
        ("plain", 10, "no-modifier", None, ("inconclusive", "supported")),
        ("plain", 11, "partly-seen", None, ("inconclusive", "inconclusive")),
        ("overwritten", 99, "overwritten", False, ("refuted", "refuted")),
        ("all-skipped", 99, "partly-seen", None, ("inconclusive", "inconclusive")),
    ],
)
def test_resumed_run_is_judged_on_what_was_seen(
    resumed: Any, name: str, unseen: int, cause: str, effective: bool | None, claims: tuple[str, str]
) -> None:
    """Oracle: ten steps seen: half of 20 speaks for the run, less does not, but a fault is one whenever it was seen."""
    verdict = judge_ledger(resumed(CASES[name][1], unseen))
    assert (verdict.cause, verdict.effective) == (cause, effective)
    assert verdict.numbers.get("unseen_steps", 0) == unseen
    seen = f"steps {unseen + 1} to {unseen + 10} seen; the run was resumed after step {unseen}"
    assert (seen in verdict.summary) == bool(unseen)
    assert str(CASES[name][2])[:30] in verdict.summary
    evidence = Evidence(verdicts={"pure": verdict, "baseline": verdict})
    found = [find_claim(f"gradients.{c}").judge(evidence) for c in ("pure-effective", "baseline-unmodified")]
    assert tuple(each.verdict for each in found) == claims


def test_resumed_run_is_compared_at_the_same_steps(resumed: Any) -> None:
    """Oracle: parameters bit-equal to an uninterrupted run's after steps 7 to 10, which the ledger calls 1 to 4."""
    whole = ledger()
    tail = [{**row, "step": row["step"] - 6} if "step" in row else row for row in whole if row.get("step", 7) > 6]
    verdict = judge_pair(resumed(tail, 6), resumed(whole, 0))
    assert (verdict.cause, verdict.numbers["steps"]) == ("identical-to-baseline", 4)
    assert judge_pair(resumed(tail, 0), resumed(whole, 0)).cause == "same-within-rounding"
    stopped = resumed(CASES["stopped"][1], 6)
    assert "no gradient was modified after step 13 of 16" in judge_ledger(stopped).summary
