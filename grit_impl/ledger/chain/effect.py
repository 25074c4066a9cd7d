"""Did the update follow from it, move the parameter and stay, for every tensor and to the end?"""

from __future__ import annotations

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.chain.links import REPLAYED, SAME_UPDATE, Breach, check, rows_of
from grit_impl.ledger.chain.words import degrees, median, number, of_all, since
from grit_impl.ledger.findings import Facts, lasting, transitions, update_ratio
from grit_impl.ledger.timeline import LOOP_SCALING, TURN, UNIFORM

APART, LEAD = 0.02, 0.003
"""1 - cos between the raw and the modified gradient from which on an update can follow one of them, and by how much."""
FURTHER = 2.0
"""So many times the way of the steps since the last time is more than a constraint on the weights takes back."""
FEW = 6
"""Steps from which on a run tells more than how it begins."""
ROUNDED = 2e-3
"""So much of its size a gradient may lose to a coarser type and back."""
SOME_STEPS = 0.7
"""Least share of the steps in which a gradient is modified, once that has begun."""
KEPT = 0.4
"""Least share of the way of the steps that is kept: of slow and fast weights, half is."""


@check("consumed", "not-consumed", "the optimizer used other gradients than those in `.grad`")
def _not_consumed(f: Facts) -> Breach | None:
    if idle := f.idle & set(f.touched.name) | f.idle & set(f.tensors[f.tensors.turns > 0].name):
        return Breach(f"the optimizer that holds {of_all(idle, f)} never steps", idle, {"idle": len(idle)}, "no-steps")
    rows = f.touched[f.touched.replay.notna()]
    replay, reaction = median(rows.replay), median(f.touched.reaction)
    numbers = {"replay": replay, "update_turn": median(rows.update_turn), "reaction": reaction}
    lead = follows(f)
    numbers |= {"lead": lead} if lead is not None else {}
    missed = rows[(rows.replay > REPLAYED) & ~(rows.replay_turn < SAME_UPDATE)]
    names = lasting(rows, rows.index.isin(missed.index) & pd.Series(True, rows.index))
    held = len(rows) > 0 and 2 * len(names) < rows.name.nunique() and not reaction < 1e-6
    if held or not (f.touched.update_exact > 0).any() or (lead or 0) > 0:
        return None
    if lead is not None or median(rows.update_turn) < SAME_UPDATE:
        return Breach("the optimizer moved the parameters as the raw gradients would have", None, numbers)
    if reaction < 1e-6:
        return Breach("the optimizer's update does not depend on `.grad`: it has gradients of its own", None, numbers)
    if not len(f.bent):
        return None
    text = f"the optimizer's replay misses the updates by {replay:.0%}: something else moves the parameters"
    if not len(rows):
        text = "the updates were not replayed, and nothing shows that they follow the modified gradients"
    return Breach(text, names or None, numbers, "update-unexplained")


def follows(f: Facts) -> float | None:
    """By how much more the updates follow the modified gradients than the raw ones, as a difference of cosines.

    Negative: they follow the raw ones. None: neither can be said, of three in four updates that were looked into.
    """
    rows = f.bent[(f.bent.turn > APART) & f.bent.along.notna() & f.bent.along_raw.notna()]
    lead = rows.along.abs() - rows.along_raw.abs()
    # Before an optimizer has a memory, its updates tell most.
    for part in (lead, lead[rows.step == rows.step.min()]):
        middle = median(part)
        if len(part) and abs(middle) > LEAD and (part * np.sign(middle) > 0).mean() >= 0.75:
            return middle
    return None


@check(
    "consumed", "cancelled-by-optimizer", "the update has the direction that the unmodified gradient would have given"
)
def _cancelled(f: Facts) -> Breach | None:
    touched = f.touched
    by_loop = {s["step"] for s in f.steps for e in s.get("events", ()) if e["who"] == LOOP_SCALING}
    if f.most("hooked_modules") and 2 * len(by_loop) > len(f.steps) and set(f.live.name) <= f.vectors:
        text = (
            "LoRA of rank 1 has no directions to weigh: a preconditioner's matrix is a number, as is what was seen here"
        )
        return Breach(text, None, {"scaled_steps": len(by_loop)}, "scaled-only")
    if not len(touched) or len(touched) < 0.05 * len(f.live) or _normalised(touched, f.sizes):
        return None
    made, tried = touched[touched.factor_turn.notna()], touched[touched.reaction.notna()]
    if 2 * len(made) > len(tried) and median(made.factor_turn) < SAME_UPDATE <= median(made.update_turn):
        numbers = {"factor_turn": median(made.factor_turn), "update_turn": median(made.update_turn)}
        text = "the optimizer makes each update orthogonal, which divides the matrix out again: what is left is the"
        return Breach(f"{text} error of its iteration, {degrees(made.update_turn)}", None, numbers)
    rows = touched[touched.update_turn.notna() & (touched.update_exact > 0)]
    turn, gradient = median(rows.update_turn), median(touched.turn)
    scaled = not len(f.bent)
    if not (scaled or (turn < SAME_UPDATE if len(rows) else gradient < TURN)):
        return None
    ratio = update_ratio(rows)
    if scaled and ((touched.gain - 1).abs() < ROUNDED).all() and abs(ratio - 1) <= 0.02:
        return None  # rounded to a coarser type
    numbers = {"update_turn": turn, "gradient_turn": gradient, "update_ratio": ratio, "gain": median(touched.gain)}
    if abs(ratio - 1) > 0.02 or turn > SAME_UPDATE:
        larger = (
            f"{ratio:.3g} times as large" if abs(ratio - 1) > 0.02 else "of the same size, and differ by its memory"
        )
        text = f"the gradients were multiplied by numbers, not by a matrix; the updates are {larger}"
        return Breach(text, None, numbers, "scaled-only")
    how = "turned" if gradient > TURN else "only scaled"
    text = f"the gradients were {how}, and the optimizer divides that out again: its updates are the unmodified ones"
    return Breach(text, None, numbers)


def _normalised(rows: pd.DataFrame, sizes: dict[str, int]) -> bool:
    """Whether gradients were scaled to one norm, all together or each by itself: a way of clipping, no modifier.

    Norms that differ between tensors of one size are no norm of a gradient's: they are their weights', say.
    """
    if len(rows[rows.bent]) or rows.step.nunique() < 3:
        return False
    total = np.sqrt((rows.entry**2).groupby(rows.step).sum())
    before = np.sqrt((rows.unscaled**2).groupby(rows.step).sum())
    # A bound may be the weights' norm, and only makes smaller.
    bound = bool((rows.gain <= 1 + UNIFORM).all())
    norms = rows.groupby(rows.name if bound else rows.name.map(sizes).fillna(0)).entry
    gains = rows.groupby("step").gain
    together = total.std() < 1e-2 * total.mean() and bool((gains.max() < gains.min() * (1 + UNIFORM)).all())
    same = together or bool((norms.std() < 1e-2 * norms.mean()).all())
    return bool(same and before.std() > 1e-2 * before.mean())


@check("moved", "learning-rate-zero", "the optimizer ran with a learning rate of zero")
def _rate_zero(f: Facts) -> Breach | None:
    rows = f.live[f.live.hash_after.notna()]
    still = rows.hash_before == rows.hash_after
    names = lasting(rows, still & rows.rate_zero & ~_warm_up(rows, still))
    rates = [s["lr"][1] for s in f.steps if s.get("lr")]
    if names:
        bad = rows_of(rows, names, still & rows.rate_zero)
        text = f"the learning rate of {of_all(names, f)} is 0 {since(bad, f)}"
        return Breach(text, names, {"still": len(bad), "highest_lr": max(rates, default=None)})
    if rates and max(rates) == 0 and len(rows) and still.mean() >= 0.99:
        numbers = {"still": int(still.sum()), "highest_lr": 0.0}
        return Breach(f"the learning rate is 0 in all {number(len(rates), 'step')}", None, numbers)
    return None


def _warm_up(rows: pd.DataFrame, still: pd.Series) -> pd.Series:
    """A rate that begins with zero, in runs so short that its first step may be half of them."""
    moved = rows.step.where(~still).groupby(rows.name).transform("min")
    short: pd.Series = rows.groupby("name").step.transform("size") < FEW
    return short & rows.rate_zero & (rows.step < moved)


@check("moved", "no-update", "the optimizer ran but changed no bit of the parameters, or rounding left nothing")
def _no_update(f: Facts) -> Breach | None:
    rows = f.live[f.live.hash_after.notna()]
    still = rows.hash_before == rows.hash_after
    names = lasting(rows, still & ~_warm_up(rows, still))
    # Small updates of a few tensors round to nothing, in plain training too: the table tells of them.
    if names and 2 * len(names) >= rows.name.nunique():
        bad = rows_of(rows, names, still)
        text = f"{len(bad)} of {number(len(rows), 'update')} changed no bit: {of_all(names, f)}, {since(bad, f)}"
        rates = [s["lr"][1] for s in f.steps if s.get("lr")]
        return Breach(text, names, {"still": len(bad), "highest_lr": max(rates, default=None)})
    # Rounding at random leaves the intended change on average alone.
    known = f.live[f.live.arrived.notna() & ~(f.live.noise > 0).any()]
    names = lasting(known, known.arrived < 0.2)
    if names and 2 * len(names) >= known.name.nunique():
        arrived = median(known[known.name.isin(names)].arrived)
        text = f"rounding to 16 bits left {arrived:.0%} of the updates that were looked into"
        return Breach(text, names, {"arrived": arrived})
    return None


@check("kept", "update-undone", "the parameters were put back after the optimizer had moved them")
def _undone(f: Facts) -> Breach | None:
    rows, moved, later = transitions(f)
    undone = moved & later.notna() & (later == rows.hash_before)
    if undone.sum() < 0.5 * max(1, (moved & later.notna()).sum()) or not undone.any():
        return None
    text = f"{int(undone.sum())} of {int((moved & later.notna()).sum())} updates were reverted"
    return Breach(text, rows[undone].name.unique(), {"undone": int(undone.sum())})


@check("kept", "not-kept", "the weights were replaced by earlier or other ones after the optimizer had moved them")
def _not_kept(f: Facts) -> Breach | None:
    rows, moved, later = transitions(f)
    seen: dict[tuple[str, str], int] = {}
    back, source = [], []
    for name, step, before, after, following in zip(
        rows.name, rows.step, rows.hash_before, rows.hash_after, later, strict=True
    ):
        seen.setdefault((name, before), int(step) - 1)
        # An optimizer whose update vanishes may come back to where it was; what counts is who did not step.
        back.append(isinstance(following, str) and following != after and (name, following) in seen)
        source.append(seen.get((name, following), -1))
        seen.setdefault((name, after), int(step))
    flags = pd.Series(back, rows.index, dtype=bool) & moved
    if flags.any():
        first = rows[flags].step.min()
        origin = int(pd.Series(source, rows.index)[flags & (rows.step == first)].min())
        names = rows[flags].name.unique()
        text = f"after step {int(first)} the weights of {of_all(names, f)} were put back to those after step {origin}"
        return Breach(text, names, {"reloaded": int(flags.sum()), "to_step": origin})
    taken = f.live[(f.live.kept < KEPT) & (f.live.back > 0.5)]
    end = {name: share for name, (share, cosine) in f.kept.items() if share < KEPT and cosine > 0.5}
    if len(taken) or end:
        names = [*dict.fromkeys([*taken.name, *end])]
        share = float(np.median([*taken.kept, *end.values()]))
        when = (
            f"before {number(taken.step.nunique(), 'step')} of {len(f.steps)}" if len(taken) else "after the last step"
        )
        text = f"{when} somebody wrote to the weights of {of_all(names, f)}, and left {max(share, 0):.0%} of the way"
        return Breach(f"{text} that the steps had gone", names, {"replaced_weights": len(taken) + len(end)})
    wandered = (1 - f.live.kept).abs() > f.live.back.abs() * FURTHER
    if len(f.bent) and (names := lasting(f.live, wandered)):
        text = f"between the steps somebody moved the weights of {of_all(names, f)} further than the optimizer had, "
        numbers = {"moved_further": int(wandered.sum())}
        return Breach(text + since(rows_of(f.live, names, wandered), f), names, numbers, "update-unexplained")
    other = f.live[f.live.drift > 1.2]
    if len(other):
        names = other.name.unique()
        text = f"before step {int(other.step.min())} the weights of {of_all(names, f)} were replaced by others"
        return Breach(text, names, {"replaced_weights": len(other)})
    return None


@check("throughout", "only-some-layers", "some layers or tensors are never modified though they have gradients")
def _some_layers(f: Facts) -> Breach | None:
    after = f.live[(f.live.step >= f.start) & ~f.live.name.isin(f.vectors)]
    shares = after.groupby("name").bent.mean()
    missing = set(shares[shares < 0.05 * shares.max()].index)
    if not len(f.bent) or not missing:
        return None
    groups = {g: set(rows.name) for g, rows in after.groupby("group") if g != "other"}
    idle = [g for g, names in groups.items() if names <= missing]
    # All of one factor, and less than half of the other.
    if len(groups) == 2 and len(idle) == 1 and 2 * len(missing - groups[idle[0]]) < len(groups[idle[0]]):
        return _one_factor(f, after, str(idle[0]), missing)
    whole = {layer for layer, rows in after.groupby("layer") if set(rows.name) <= missing}
    numbers = {"layers": after.layer.nunique(), "layers_missing": len(whole), "tensors_missing": len(missing)}
    if whole and set(after[after.layer.isin(whole)].name) == missing:
        text = f"{len(whole)} of {number(after.layer.nunique(), 'layer')} are never modified, e.g. {min(whole)}"
        return Breach(text, missing, numbers)
    return Breach(f"{of_all(missing, f)} are never modified; the others are", missing, numbers)


def _one_factor(f: Facts, after: pd.DataFrame, idle: str, missing: set[str]) -> Breach:
    shares = {str(g): float(rows.bent.mean()) for g, rows in after.groupby("group") if g != "other"}
    other = next(g for g in shares if g != idle)
    touched = f.touched[f.touched.group == idle]
    text = f"{other} is preconditioned ({shares[other]:.0%}), {idle} is not ({shares[idle]:.0%})"
    if len(touched) > 0.5 * len(after[after.group == idle]):
        text += f": {idle} is multiplied by one number, {median(touched.gain):.3g}, as by the inverse of a dead factor"
    return Breach(text, missing, {f"share_{g}": share for g, share in shares.items()}, "only-one-factor")


@check("throughout", "stopped", "modification ended during the run")
def _stopped(f: Facts) -> Breach | None:
    rows = f.live[f.live.step >= f.start]
    if not len(f.bent):
        return None
    rows = rows[rows.name.isin(f.bent.name)]
    idle = ~rows.bent
    names = lasting(rows, idle, half=False)  # every third step is a plan
    if not names:
        return None
    last = int(f.bent[f.bent.name.isin(names)].step.max())
    text = f"no gradient of {of_all(names, f)} was modified after step {last} of {int(f.live.step.max())}"
    return Breach(text, names, {"last_modified": last})


@check("throughout", "only-some-steps", "in many steps no gradient is modified, though in steps before and after it is")
def _some_steps(f: Facts) -> Breach | None:
    rows = f.live[(f.live.step >= f.start) & f.live.name.isin(f.bent.name)]
    shares = rows.groupby("name").bent.agg(["mean", "sum", "count"])
    names = list(shares[(shares["mean"] < SOME_STEPS) & (shares["sum"] > 1) & (shares["count"] >= 6)].index)
    if 2 * len(names) < max(1, f.bent.name.nunique()):
        return None
    mine = rows[rows.name.isin(names)]
    idle = mine.step.nunique() - mine[mine.bent].step.nunique()
    text = f"from step {int(f.start)} on the gradients of {of_all(names, f)} were left as they were in {idle} of "
    return Breach(f"{text}{number(mine.step.nunique(), 'step')}", names, {"idle_steps": idle})


@check("turned", "nothing-written", "a preconditioner is attached and ready, but no gradient was changed")
def _nothing_written(f: Facts) -> Breach | None:
    if len(f.bent) or not f.modifier_known or f.turned_in_vain:
        return None
    text = (
        "a preconditioner is attached, but changes no gradient before the optimizer: not called, or written to a copy"
    )
    return Breach(text, None, {"statuses": f.statuses})
