"""Was the gradient turned as a preconditioner turns it, and did the optimizer find it so?"""

from __future__ import annotations

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.applied import OTHER
from grit_impl.ledger.chain.links import LIMIT_PASSED, REPLAYED, Breach, check, rows_of
from grit_impl.ledger.chain.words import degrees, median, most, number, of_all, since, steps_of
from grit_impl.ledger.findings import AWAY, MIXED, OTHERWISE, Facts, lasting, update_ratio
from grit_impl.ledger.timeline import CLIP, CLIP_VALUE, LOOP_SCALING, TURN

ASIDE = 0.9
"""1 - cos from which on what was written has next to nothing of the raw gradient; damped inverses stay below 0.5."""
UNRELATED = 0.15
"""Cosine below which two gradients have no more to do with each other than chance, in tensors of some 50 elements."""
BLOWN_UP = 1e4
"""So many times its size a gradient is nothing that clipping or an optimizer's epsilon were made for."""

ALIKE = 0.5
"""Cosine of two matrices, multiples of the identity apart, from which on they are made of the same statistics."""
NOTHING = 1e-6
"""A factor that no loss scale and no number of tokens in a step explains."""
ONE_NUMBER = 3e-4
"""Numbers that agree to this are one: rows have five digits."""


@check("turned", "scaled-only", "gradients and updates differ in size alone: a learning rate, not a preconditioner")
def _one_number(f: Facts) -> Breach | None:
    gains = f.touched.gain[~f.touched.lost]
    if len(f.bent) or f.turned_in_vain or not f.modifier_known or len(gains) < 2:
        return None
    if gains.max() > gains.min() * (1 + ONE_NUMBER):
        return None
    text = (
        f"each gradient was multiplied by one number, {median(gains):.3g}, as by a matrix in which damping drowns the "
    )
    return Breach(f"{text}statistics, or which none have reached", None, {"gain": median(gains)})


@check("turned", "against-the-gradient", "the modified gradient points away from the raw one")
def _against(f: Facts) -> Breach | None:
    names = lasting(f.bent, f.bent.turn > AWAY)
    if not names:
        return None
    bad = rows_of(f.bent, names, f.bent.turn > AWAY)
    text = f"{of_all(names, f)} {since(bad, f)} moved against their gradients (by {degrees(bad.turn)}); a "
    return Breach(f"{text}preconditioner turns by less than 90", names, {"cosine": 1 - median(bad.turn)})


@check("turned", "stale-gradient", "the optimizer was given an earlier step's gradient")
def _stale(f: Facts) -> Breach | None:
    known = f.bent[f.bent.stale.notna() & f.bent.own.notna()]
    old = known[(known.stale < 0.05) & (known.own > 0.2)]
    ordered = f.bent.sort_values(["name", "step"])
    repeated = (ordered.hash_entry == ordered.groupby("name").hash_entry.shift()) & ordered.hash_entry.notna()
    numbers = {"stale": len(old), "repeated": int(repeated.sum())}
    if len(old) >= 0.5 * max(1, len(known)):
        text = f"{len(old)} of {len(known)} modified gradients that were looked into belong to the step before"
        return Breach(text, None, numbers)
    if names := lasting(ordered, repeated):
        return Breach(f"{of_all(names, f)} got the same gradient as in the step before, bit for bit", names, numbers)
    return None


@check("turned", "unrelated-gradient", "what was written has nothing to do with this tensor's gradient")
def _unrelated(f: Facts) -> Breach | None:
    if breach := _one_for_several(f):
        return breach
    residual, cosine = median(f.bent.own), 1 - median(f.bent.turn)
    if len(f.bent) and abs(cosine) < UNRELATED and residual >= 0.3:
        text = (
            f"the written gradients stand at {degrees(f.bent.turn)} to the raw ones and are no r x r multiple of them"
        )
        return Breach(text, None, {"cosine": cosine, "fit": residual})
    known = f.bent[f.bent.fit < 0.1]
    names = lasting(known, known.positive < -0.1)
    if not names or 2 * len(names) < known.name.nunique() or 2 * len(known) < f.bent.fit.notna().sum():
        return None
    smallest = median(known[known.name.isin(names)].positive)
    text = "the gradients were multiplied by a matrix that is no inverse of any covariance: eigenvalues of both signs"
    who = None if len(names) == known.name.nunique() else names
    return Breach(text, who, {"cosine": cosine, "positive": smallest})


def _one_for_several(f: Facts) -> Breach | None:
    """Several tensors got one and the same gradient, bit for bit, where backward had left each its own."""
    rows = f.touched[f.touched.hash_entry.notna() & (f.touched.entry > 0) & ~f.touched.name.isin(f.tied)]
    same = rows.duplicated(["step", "hash_entry"], keep=False) & ~rows.duplicated(["step", "hash_raw"], keep=False)
    names = lasting(rows, same)
    if not names:
        return None
    bad = rows_of(rows, names, same)
    text = f"{of_all(names, f)} got the same gradients as others of their shape, bit for bit, {since(bad, f)}"
    return Breach(f"{text}: what was computed for one was written to several", names, {"shared": len(bad)})


@check("turned", "swapped-factors", "each factor's inverse was applied to the other side")
def _swapped(f: Facts) -> Breach | None:
    known = f.bent[f.bent.matrix.notna()]
    swapped = known[known.matrix.str.contains(OTHER, regex=False)]
    if len(swapped) < max(2, 0.5 * len(known)):
        return None
    text = f"in {len(swapped)} of {len(known)} cases looked into the matrix is the inverse of the other side's factor"
    return Breach(text, None, {"swapped": len(swapped), "known": len(known)})


@check("turned", "applied-twice", "the same preconditioner, or the same gradient, was applied twice in one step")
def _twice(f: Facts) -> Breach | None:
    stepped = f.tensors[f.tensors.stepped > 1]
    # Where another optimizer never steps, one was meant and the other called: `not-consumed` says so.
    if len(stepped) >= max(2, 0.2 * len(f.live)) and not f.idle:
        names = stepped.name.unique()
        text = f"optimizers stepped more than once on the same gradients of {of_all(names, f)}, {since(stepped, f)}"
        return Breach(text, names, {"stepped_again": len(stepped)})
    if breach := _once_for_each(f):
        return breach
    # Between two callbacks in each step, within one only in those in which foreign reads were looks.
    read = f.bent.step.isin({s["step"] for s in f.steps if s.get("read")})
    double = f.bent[f.bent.turns >= 2]
    again = double[double.twice < 0.2]
    known = double[double.twice.notna()]
    few = len(double) < 0.2 * len(f.bent) and not (f.bent[read].turns >= 2).mean() >= 0.5
    if not len(again) or few or len(again) < 0.5 * len(known):
        return None
    text = f"the same matrix was applied again to {len(double)} of {len(f.bent)} modified gradients"
    return Breach(text, double.name.unique(), {"twice": len(double), "twice_residual": median(again.twice)})


def _once_for_each(f: Facts) -> Breach | None:
    """One tensor under several names, turned under each; one hook registered several times."""
    tied = f.bent[f.bent.name.isin(f.tied)]
    double = tied[tied.turns >= 2]
    if len(double) >= max(2, 0.2 * len(tied)):
        names = double.name.unique()
        text = f"{of_all(names, f)} are one tensor under {f.tied[names[0]]} names, and it was turned for each of them"
        return Breach(text, names, {"tied": len(names)})
    over = {(s["step"], name) for s in f.steps for name in s.get("again") or ()}
    twice = pd.Series([pair in over for pair in zip(f.bent.step, f.bent.name, strict=True)], f.bent.index, dtype=bool)
    double = f.bent[twice & (f.bent.turns >= 2)]
    read = f.bent[f.bent.step.isin({s["step"] for s in f.steps if s.get("read")})]
    if len(double) >= max(2, 0.5 * len(read)) and median(double.alike) > ALIKE:
        names = double.name.unique()
        text = f"the same code went over the gradients of {of_all(names, f)} twice in a step, with matrices alike"
        return Breach(text, names, {"again": len(double), "alike": median(double.alike)})
    repeated = {name for s in f.steps for name in s.get("repeated") or ()}
    again = f.bent[f.bent.name.isin(repeated) & f.bent.by.astype(str).str.endswith(" hook")]
    if len(again) < 0.2 * len(f.bent) or not len(again):
        return None
    names = again.name.unique()
    text = f"the same {most(again.by)} is registered several times on {of_all(names, f)}"
    return Breach(text, names, {"hooked_again": len(names)})


@check(
    "turned", "blown-up", "the modified gradient is far larger than the clipped one: the clipping limit means nothing"
)
def _blown_up(f: Facts) -> Breach | None:
    limits = pd.Series({s["step"]: s["max_norm"] for s in f.steps if s.get("max_norm")}, dtype=float)
    norms = np.sqrt((f.live.entry**2).groupby(f.live.step).sum())
    over = (norms / limits).dropna()
    far = over[over > LIMIT_PASSED]
    # Inside an optimizer, or where no matrix was applied (a sign, an Adam step), a norm is no size of anything.
    inside = f.touched.by.astype(str).str.endswith(".step")
    if not len(f.touched) or inside.mean() > 0.5:
        return None
    explained = f.bent[f.bent.replay <= REPLAYED]
    ratio = update_ratio(explained)
    weights = f"; the updates are {ratio:.3g} times as large as the raw gradients'" if np.isfinite(ratio) else ""
    aside = f.bent[(f.bent.turn > ASIDE) & (f.bent.gain > LIMIT_PASSED)]
    if 2 * len(aside) > len(f.bent):
        text = f"{most(aside.by)} made of what had no size in the gradients {median(aside.gain):.3g} times their size: "
        text += f"{of_all(aside.name.unique(), f)} stand at {degrees(aside.turn)} to the raw ones{weights}"
        return Breach(text, aside.name.unique(), {"gain": median(aside.gain), "update_ratio": ratio})
    if median(f.touched.fit) > 0.1:
        return None
    touched = f.touched[f.touched.step.isin(far.index) & ~inside]
    if len(touched) and (2 * len(far) >= len(over) or ratio > 100):
        text = f"{most(touched.by)} left {far.median():.3g} times the clipping limit at the optimizer's entry in "
        return Breach(f"{text}{steps_of(far.index, f)}", touched.name.unique(), {"over_limit": float(far.median())})
    if ratio > 100:
        return Breach(weights.removeprefix("; "), None, {"update_ratio": ratio})
    made = f.bent if len(f.bent) else f.touched
    gains = made[~made.by.astype(str).str.endswith(".step")].groupby("group").gain.median()
    if gains.max() > BLOWN_UP:
        names = made[made.group == gains.idxmax()].name.unique()
        text = f"{most(made.by)} made the gradients of {of_all(names, f)} {gains.max():.3g} times as large{weights}"
        return Breach(text, names, {"gain": float(gains.max()), "update_ratio": ratio})
    return None


@check("delivered", "dropped", "gradients were zeroed or removed before the optimizer ran")
def _dropped(f: Facts) -> Breach | None:
    names = lasting(f.live, f.live.lost)
    if not names:
        return None
    lost = rows_of(f.live, names, f.live.lost)
    by = most(lost.undone_by)
    text = f"{by} removed {len(lost)} of {len(f.live)} gradients before the optimizer ran"
    return Breach(text, names, {"dropped": len(lost)}, "clipped-to-nothing" if by in (CLIP, CLIP_VALUE) else None)


@check("delivered", "applied-on-micro-steps", "gradients were changed between the backward passes of one step")
def _micro(f: Facts) -> Breach | None:
    rows = f.tensors[f.tensors.micro.notna()]
    steps = rows.step.nunique()
    if not len(rows) or steps < 0.2 * max(1, len(f.steps)):
        return None
    text = f"{most(rows.micro)} changed partial sums, to which the next backward adds, in {steps_of(rows.step, f)}"
    return Breach(text, rows.name.unique(), {"micro_steps_modified": int(steps)})


@check("delivered", "modified-too-late", "gradients were changed, or looked for, after the parameters had moved")
def _too_late(f: Facts) -> Breach | None:
    if len(f.bent):
        return None
    rows = f.tensors[f.tensors.late.notna()]
    reads: dict[str, int] = {}
    for step in f.steps:
        for who, count in (step.get("late_reads") or {}).items():
            reads[who] = reads.get(who, 0) + count
    if len(rows):
        text = f"{most(rows.late)} changed gradients after the optimizer step, in {steps_of(rows.step, f)}"
        return Breach(text, rows.name.unique(), {"late": len(rows), "late_steps": int(rows.step.nunique())})
    if reads and (f.modifier_known or f.most("hooked_modules")):
        who = max(reads, key=lambda k: reads[k])
        text = f"{who} looked for gradients after they had been used and cleared"
        return Breach(text, None, {"late_reads": reads[who]})
    return None


@check("delivered", "accumulated-across-steps", "gradients are not cleared: each step adds to the last one's")
def _leftover(f: Facts) -> Breach | None:
    steps = [s for s in f.steps if s.get("leftover")]
    if len(steps) < 0.5 * max(2, len(f.steps) - 1):
        return None
    text = f"{len(steps)} of {len(f.steps)} steps began with the gradients of the step before"
    return Breach(text, None, {"leftover_steps": len(steps)})


@check("delivered", "overwritten", "a modified gradient was put back before the optimizer ran")
def _overwritten(f: Facts) -> Breach | None:
    rows = f.live[~f.live.lost & ((f.live.mods > 0) | (f.live.turn_written > TURN))]
    flags = (rows.turn_written > TURN) & ~(rows.turn > TURN)
    names = lasting(rows, flags)
    if not names:
        return _mixed(f)
    back = rows_of(rows, names, flags)
    by, writer = most(back.undone_by), most(back.by)
    if f.most("stand_ins"):
        text = (
            f"{writer} turned {number(len(back), 'gradient')} by {degrees(back.turn_written)}, but the optimizer holds "
        )
        return Breach(f"{text}copies of the tensors, with the raw gradients", names, {"raw": len(back)}, "not-consumed")
    text = f"{writer} turned {number(len(back), 'gradient')} by {degrees(back.turn_written)}; {by} put them back"
    return Breach(text, names, {"overwritten": len(back), "overwritten_by": by, "written_by": writer})


def _mixed(f: Facts) -> Breach | None:
    """What came after a matrix is a mix of raw gradients: of this step's passes, or of this step and earlier ones."""
    rows = f.live[f.live.passes.notna()]
    names = lasting(rows, (rows.passes < MIXED) & (rows.passed > OTHERWISE))
    if names:
        text = (
            f"the gradients of {of_all(names, f)} were turned, and then what the step's passes had left was mixed and "
        )
        return Breach(f"{text}written over them", names, {"mixed": len(names)})
    known = f.bent[f.bent.mix.notna() & (f.bent.turns >= 2) & (f.bent.fit < 0.1) & (f.bent.identity > 0.05)]
    names = lasting(known, known.mix < 0.1)
    if not names:
        return None
    back = rows_of(known, names, known.mix < 0.1)
    text = f"{most(back.by)} turned the gradients, and then averages of raw ones were written over them"
    who = None if len(names) == known.name.nunique() else names
    return Breach(f"{text}, in {len(back)} of {len(known)} cases looked into", who, {"mixed": len(back)})


@check(
    "delivered", "clipped-to-nothing", "clipping, or a step size of the modifier's own, left nothing of the gradient"
)
def _clipped(f: Facts) -> Breach | None:
    limits = {s["step"]: s["max_norm"] for s in f.steps if s.get("max_norm")}
    rows = f.bent if len(f.bent) else f.live
    if not (limits or len(f.bent)) or not len(rows):
        return None
    norms = f.live.groupby("step").unscaled.apply(lambda x: float(np.sqrt((x**2).sum())))
    room = float(np.median([limits[s] / n for s, n in norms.items() if s in limits and n > 0] or [np.inf]))
    by_hand = {s["step"]: float(e["factor"]) for s in f.steps for e in s.get("events", ()) if e["who"] == LOOP_SCALING}
    scaled = rows.step.map(by_hand).astype(float).fillna(1.0)
    # A training loop may unscale by hand, or divide by a count; what differs from step to step and is next to nothing
    # is neither.
    if not limits and (scaled.median() > NOTHING or 2 * rows.step.map(by_hand).nunique() < rows.step.nunique()):
        rows = rows.assign(gain=rows.gain / scaled)
    gain, effect = median(rows.gain), update_ratio(rows)
    by_value = {s["step"] for s in f.steps for e in s.get("events", ()) if e["who"] == CLIP_VALUE}
    if gain < NOTHING and 2 * len(by_value) > len(f.steps):
        return Breach(f"{CLIP_VALUE} left {gain:.1e} of the gradients' norm", None, {"gain": gain})
    if room < 1e-4 or (gain < 1e-4 and effect < 0.05) or (gain < 1e-2 and effect < 1e-4):
        text = f"{'clipping' if limits else most(rows.by)} left {min(room, gain):.1e} of the gradients' norm"
        return Breach(text, None, {"room": room, "gain": gain, "update_ratio": effect})
    return _one_side_clipped(f, rows)


def _one_side_clipped(f: Facts, rows: pd.DataFrame) -> Breach | None:
    """One factor hardly moves, and the other, whose gradient is in proportion to it, with it."""
    raw = f.live.groupby("group").raw.median()
    for group, mine in rows.groupby("group"):
        gain, effect = median(mine.gain), update_ratio(mine)
        others = raw[raw.index != group]
        if gain < 1e-4 and effect < 0.05 and len(others) and others.max() < 1e-3 * raw[group]:
            names = mine.name.unique()
            text = f"{most(mine.by)} left {gain:.1e} of the gradients' norm of {of_all(names, f)}: it stays where it "
            text += "was, and the other factor has next to no gradient"
            return Breach(text, names, {"gain": gain, "update_ratio": effect})
    return None
