"""What checks say of gradients that were turned and delivered, on each side of each threshold."""

from __future__ import annotations

from ledgers import BENT, NAMES, Case, bent, ledger, some

from grit_impl.ledger.timeline import CLIP_VALUE

CASES: dict[str, Case] = {
    "overwritten": (
        "overwritten",
        some(20, {**BENT, "turn": 0.0, "undone_by": "restore"}, BENT),
        "GRIT turned 20 gradients by 46 degrees; restore put them back",
        {"overwritten": 20, "overwritten_by": "restore", "written_by": "GRIT"},
    ),
    "overwritten-some": ("overwritten", some(16, {**BENT, "turn": 0.0}, BENT), None, {}),
    "overwritten-at-the-limit": ("overwritten", bent(turn_written=1e-4, turn=0.0), None, {}),
    "overwritten-within-rounding": (
        "overwritten",
        bent(turn_written=2e-4, turn=1e-4),
        "GRIT turned 40 gradients by 1 degrees; someone put them back",
        {"overwritten": 40, "overwritten_by": "someone", "written_by": "GRIT"},
    ),
    "overwritten-lost": ("overwritten", bent(turn=0.0, lost=1), None, {}),
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
        "clipping left 5.0e-06 of the gradients' norm",
        {"room": 5e-6, "gain": 1e-5, "update_ratio": 1.0},
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
        some(20, {**BENT, "turn": 1.5}, BENT),
        "all 4 tensors until step 5 of 10 moved against their gradients (by 120 degrees); a preconditioner turns by "
        "less than 90",
        {"cosine": -0.5},
    ),
    "against-for-b": (
        "against-the-gradient",
        ledger(lambda s, n: {**BENT, "turn": 1.5} if n == NAMES[3] else BENT),
        "B of layer 1, q_proj in all 10 steps moved against their gradients (by 120 degrees); a preconditioner turns "
        "by less than 90",
        {"cosine": -0.5},
    ),
    "against-some": ("against-the-gradient", some(16, {**BENT, "turn": 1.5}, BENT), None, {}),
    "square": ("against-the-gradient", bent(turn=1.09), None, {}),
    "exactly-square": ("against-the-gradient", some(36, {**BENT, "turn": 1.0}, {**BENT, "turn": 1.4}), None, {}),
    "against-none": ("against-the-gradient", ledger(), None, {}),
    "stale": (
        "stale-gradient",
        some(20, {**BENT, "stale": 0.01, "fit": 0.5}, {**BENT, "stale": 0.9, "fit": 0.9}),
        "20 of 40 modified gradients that were looked into belong to the step before",
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
        "all 4 tensors got the same gradient as in the step before, bit for bit",
        {"stale": 0, "repeated": 20},
    ),
    "stale-repeated-less": ("stale-gradient", ledger(lambda s, n: {**BENT, "hash_entry": f"{n}{min(s, 9)}"}), None, {}),
    "stale-unknown": ("stale-gradient", bent(hash_entry=None), None, {}),
    "unrelated": (
        "unrelated-gradient",
        bent(turn=1.05, fit=0.3),
        "the written gradients stand at 93 degrees to the raw ones and are no r x r multiple of them",
        {"cosine": -0.05, "fit": 0.3},
    ),
    "unrelated-turned": ("unrelated-gradient", bent(turn=0.84, fit=0.8), None, {}),
    "unrelated-fits": ("unrelated-gradient", bent(turn=1.0, fit=0.29), None, {}),
    "one-for-two": (
        "unrelated-gradient",
        ledger(lambda s, n: {**BENT, "hash_entry": f"{s}"} if n in NAMES[:2] else BENT),
        "A of layer 0, q_proj and B of layer 0, q_proj got the same gradients as others of their shape, bit for bit, "
        "in all 10 steps: what was computed for one was written to several",
        {"shared": 20},
    ),
    "one-for-two-raw": (
        "unrelated-gradient",
        ledger(lambda s, n: {**BENT, "hash_entry": f"{s}", "hash_raw": f"{s}"} if n in NAMES[:2] else BENT),
        None,
        {},
    ),
    "one-for-two-zero": (
        "unrelated-gradient",
        ledger(lambda s, n: {**BENT, "hash_entry": "0", "entry": 0.0} if n in NAMES[:2] else BENT),
        None,
        {},
    ),
    "unrelated-none": ("unrelated-gradient", ledger(), None, {}),
    "clipped-by-value": (
        "clipped-to-nothing",
        ledger(
            lambda s, n: {**BENT, "entry": 1e-9},
            lambda s: {"events": [{"who": CLIP_VALUE, "phase": "before", "changed": 4}]},
        ),
        "clipping by value left 1.0e-09 of the gradients' norm",
        {"gain": 1e-9},
    ),
    "clipped-by-value-less": (
        "clipped-to-nothing",
        ledger(
            lambda s, n: {**BENT, "entry": 2e-6},
            lambda s: {"events": [{"who": CLIP_VALUE, "phase": "before", "changed": 4}]},
        ),
        None,
        {},
    ),
    "clipped-of-no-effect": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "entry": 2e-4, "update_exact": 2e-6}, lambda s: {"max_norm": 1.0}),
        "clipping left 2.0e-04 of the gradients' norm",
        {"room": 0.5, "gain": 2e-4, "update_ratio": 2e-5},
    ),
    "clipped-of-little-effect": (
        "clipped-to-nothing",
        ledger(lambda s, n: {**BENT, "entry": 2e-4, "update_exact": 2e-5}, lambda s: {"max_norm": 1.0}),
        None,
        {},
    ),
    "blown-up-where-updates-round-to-nothing": (
        "blown-up",
        ledger(lambda s, n: {**BENT, "update_raw": 0.0 if s > 4 else 1e-9, "update_exact": 1e-6}),
        None,
        {},
    ),
    "blown-up-where-few-round-to-nothing": (
        "blown-up",
        ledger(lambda s, n: {**BENT, "update_raw": 0.0 if s < 4 else 1e-3, "update_exact": 1.0}),
        "the updates are 1e+03 times as large as the raw gradients'",
        {"update_ratio": 1e3},
    ),
    "blown-up-by-a-number": (
        "blown-up",
        ledger(lambda s, n: {"mods": 1, "entry": 1e6, "by": "GRIT"}),
        "GRIT made the gradients of A of all 2 layers 1e+06 times as large",
        {"gain": 1e6, "update_ratio": float("nan")},
    ),
    "less-than-blown-up": ("blown-up", ledger(lambda s, n: {"mods": 1, "entry": 9e3, "by": "GRIT"}), None, {}),
    "averages-of-raw-ones": (
        "overwritten",
        bent(turns=2, fit=0.0, identity=0.5, mix=0.01),
        "GRIT turned the gradients, and then averages of raw ones were written over them, in 40 of 40 cases looked "
        "into",
        {"mixed": 40},
    ),
    "turned-once-more": ("overwritten", bent(turns=2, fit=0.0, identity=0.5, mix=0.3), None, {}),
}
