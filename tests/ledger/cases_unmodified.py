"""What detectors say of ledgers in which no modified gradient reached the optimizer, on each side of each threshold."""

from __future__ import annotations

from ledgers import BENT, NAMES, Case, ledger, some, statuses

DEAD = NAMES[3]
CASES: dict[str, Case] = {
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
        ledger(lambda s, n: {"raw": 0.0, "turns": 1} if n == DEAD else BENT),
        None,
        {},
    ),
    "orphans": (
        "wrong-parameters",
        ledger(step=lambda s: {"orphans": 2 if s == 3 else 1 if s == 4 else 0}),
        "gradients of 3 tensors that are no longer in the model were written",
        {"unheld": 0, "inactive": 0, "orphans": 3, "replaced": 0},
    ),
    "orphans-besides": ("wrong-parameters", ledger(lambda s, n: BENT, lambda s: {"orphans": 1}), None, {}),
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
    "micro-often": (
        "applied-on-micro-steps",
        ledger(lambda s, n: {"micro": "clip"} if s < 5 else {}),
        "clip changed partial sums, to which the next backward adds, in 4 of 10 steps",
        {"micro_steps_modified": 4},
    ),
    "micro-once": ("applied-on-micro-steps", ledger(lambda s, n: {"micro": "clip"} if s == 1 else {}), None, {}),
    "late": (
        "modified-too-late",
        ledger(lambda s, n: {"late": "callback" if s < 6 else "hook"} if s < 8 else {}),
        "callback changed gradients after the optimizer step, in 7 steps",
        {"late": 28, "late_steps": 7},
    ),
    "late-as-well": ("modified-too-late", ledger(lambda s, n: {**BENT, "late": "callback"}), None, {}),
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
}
