"""The chain of custody: each link that a modified gradient passes, and how it can break.

A breach says which link broke, under which name, for which tensors and since when. Breaches are looked for in the
order of the links; for most, each tensor is judged by itself (`lasting`), so that one of 28 is reported as one of 28.

Thresholds: a direction is "the same" below `TURN` = 1e-4 for gradients (1 - cos), and below `SAME_UPDATE` = 1e-3 for
updates, which are differences of parameters and carry their rounding. Real preconditioning was measured at 0.1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.findings import AWAY, Facts, lasting
from grit_impl.ledger.timeline import TURN
from grit_impl.ledger.words import degrees, median, most, number, of_all, since, steps_of

SAME_UPDATE = 1e-3
REPLAYED = 0.05
"""Largest relative distance of an update from its replay."""
LIMIT_PASSED = 10.0
"""So many times the clipping limit at the optimizer's entry is no longer clipped."""
LINKS = ("used", "arrived", "read", "turned", "delivered", "consumed", "moved", "kept", "throughout")


@dataclass(frozen=True)
class Breach:
    """A link that broke.

    Attributes:
        summary: What happened, for people.
        tensors: Names; None: all of them.
        numbers: The evidence.
        cause: If not the breach's own.
    """

    summary: str
    tensors: Iterable[str] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    cause: str | None = None


@dataclass(frozen=True)
class Check:
    """One way for a link to break: the link, the cause's name, what it means, and the function that sees it."""

    link: str
    cause: str
    meaning: str
    find: Callable[[Facts], Breach | None]


CHECKS: list[Check] = []


def _check(link: str, cause: str, meaning: str) -> Callable[[Callable[[Facts], Breach | None]], Callable[..., Any]]:
    def register(find: Callable[[Facts], Breach | None]) -> Callable[[Facts], Breach | None]:
        CHECKS.append(Check(link, cause, meaning, find))
        return find

    return register


def _of(rows: pd.DataFrame, names: Iterable[str], flags: pd.Series) -> pd.DataFrame:
    return rows[flags & rows.name.isin(set(names))]


# --- used ---------------------------------------------------------------------------------------------------------


@_check("used", "wrong-parameters", "gradients were written to tensors that no optimizer of this model uses")
def _wrong_parameters(f: Facts) -> Breach | None:
    t = f.tensors[~f.tensors.skipped]
    unheld = t[t.unheld & (t.turns > 0)]
    dead = set(t.groupby("name").raw.max().pipe(lambda s: s[~(s > 0)]).index)
    inactive = t[t.name.isin(dead) & (t.turns > 0)]
    orphans, replaced = f.total("orphans"), int(f.most("replaced"))
    lost = t[t.unheld & (t.raw > 0)]
    numbers = {"unheld": len(unheld), "inactive": len(inactive), "orphans": orphans, "replaced": replaced}
    if len(unheld):
        names = unheld.name.unique()
        return Breach(f"no optimizer holds {number(len(names), 'modified tensor')}", names, numbers)
    if replaced and len(lost):
        text = f"{number(replaced, 'tensor')} were re-created after the optimizer was built"
        return Breach(text, lost.name.unique(), numbers)
    if not len(f.bent) and len(inactive):
        names = inactive.name.unique()
        return Breach(f"somebody wrote to {number(len(names), 'tensor')} that are not trained", names, numbers)
    if not len(f.bent) and orphans:
        text = f"gradients of {number(orphans, 'tensor')} that are no longer in the model were written"
        return Breach(text, None, numbers)
    return None


@_check("used", "not-used", "tensors take no part in the forward pass: merged, switched off, inactive or taken out")
def _not_used(f: Facts) -> Breach | None:
    rows = f.tensors[~f.tensors.unheld & ~f.tensors.skipped]
    flags = rows.why.notna() & (rows.why != "frozen")
    names = lasting(rows, flags)
    if not names:
        return None
    bad = _of(rows, names, flags)
    text = f"{of_all(names, f)} took no part in the forward pass ({most(bad.why)}), {since(bad, f)}"
    return Breach(text, names, {"unused": len(bad)})


# --- arrived ------------------------------------------------------------------------------------------------------


@_check("arrived", "no-steps", "no torch optimizer stepped on the watched parameters")
def _no_steps(f: Facts) -> Breach | None:
    skipped = f.total("skipped")
    if f.tensors.nonfinite.any() or (len(f.steps) != skipped and any(s.get("held") for s in f.steps)):
        return None
    text = f"{number(len(f.steps), 'step')} seen, {skipped} skipped by GradScaler, none by a torch optimizer that holds"
    return Breach(f"{text} a watched parameter", None, {"skipped": skipped})


@_check("arrived", "non-finite", "NaN or infinity in a gradient: the step was dropped, or the parameters are lost")
def _non_finite(f: Facts) -> Breach | None:
    bad = f.tensors[f.tensors.nonfinite]
    skipped = f.total("skipped")
    if len(bad):
        text = f"{most(bad.by)} wrote NaN or infinity into {number(len(bad), 'gradient')}"
        text += f"; {number(skipped, 'step')} were skipped" if skipped else ""
        return Breach(text, bad.name.unique(), {"nonfinite": len(bad)})
    rows = f.tensors[~f.tensors.skipped & ~f.tensors.unheld]
    flags = ~rows.absent & rows.hash_raw.notna() & ~np.isfinite(rows.raw)
    if names := lasting(rows, flags):
        bad = _of(rows, names, flags)
        text = f"backward left NaN or infinity in {of_all(names, f)}, {since(bad, f)}: the loss is not finite"
        return Breach(text, names, {"nonfinite": len(bad)})
    if f.statuses.get("non-finite", 0) * 2 > sum(f.statuses.values()):
        return Breach("the preconditioner's factors are not finite", None, {"statuses": f.statuses})
    return None


@_check("arrived", "no-gradient", "backward left no gradient: absent or all zero, though the tensor is being trained")
def _no_gradient(f: Facts) -> Breach | None:
    rows = f.tensors[~f.tensors.unheld & ~f.tensors.skipped]
    if f.steps and not len(rows):
        return Breach("no backward pass left a gradient in any watched tensor", None, {"without": 0})
    flags = (rows.absent & (rows.why.isna() | (rows.why == "frozen"))) | (rows.raw == 0)
    names = lasting(rows, flags)
    if not names:
        return None
    bad = _of(rows, names, flags)
    never = len(bad) == len(rows[rows.name.isin(names)])
    what = "never got a gradient" if never else f"got no gradient {since(bad, f)}"
    frozen = " (frozen)" if (bad.why == "frozen").any() else ""
    rest = rows.name.nunique() - len(names)
    others = f"; the other {number(rest, 'tensor')} did" if rest else ""
    return Breach(f"{of_all(names, f)} {what}{frozen}{others}", names, {"without": len(bad)})


# --- read ---------------------------------------------------------------------------------------------------------


@_check("read", "starved", "no statistics reach the preconditioner: its hooks never fire")
def _starved(f: Facts) -> Breach | None:
    if len(f.bent) or _written_elsewhere(f):
        return None
    hooked, calls = int(f.most("hooked_modules")), f.total("module_calls")
    samples = [layer["samples"] for layer in (f.report or {}).get("layers", []) if "samples" in layer]
    # A factor that was never inverted may call itself starved; what counts is whether anything reached it.
    without = sum(not count for count in samples) if samples else f.statuses.get("starved", 0)
    numbers = {"hooked_modules": hooked, "module_calls": calls, "statuses": f.statuses}
    if hooked and not calls and len(f.live):
        text = f"gradients reach {number(f.live.name.nunique(), 'LoRA tensor')}, but the {number(hooked, 'module')} "
        text += "with hooks were called 0 times: something computes these layers without calling them (fused kernels)"
        return Breach(text, None, numbers)
    if without * 2 > sum(f.statuses.values()):
        return Breach(f"the preconditioner reports {number(without, 'layer')} without samples", None, numbers)
    return None


def _written_elsewhere(f: Facts) -> bool:
    """Somebody wrote, at the wrong moment or for a while: what broke is not the reading."""
    return bool(f.tensors.late.notna().any() or f.tensors.micro.notna().any() or (f.tensors.turn_written > TURN).any())


@_check("read", "not-ready", "the factors were never ready: too few samples, or not inverted yet")
def _not_ready(f: Facts) -> Breach | None:
    ready, known = f.statuses.get("ready", 0), sum(f.statuses.values())
    if len(f.bent) or _written_elsewhere(f) or not known or ready * 2 > known:
        return None
    samples = [layer.get("samples", 0) for layer in (f.report or {}).get("layers", [])]
    numbers = {"statuses": f.statuses, "most_samples": max(samples, default=None)}
    return Breach(f"{known - ready} of {known} layers have no ready factor", None, numbers)


# --- turned -------------------------------------------------------------------------------------------------------


@_check("turned", "against-the-gradient", "the modified gradient points away from the raw one")
def _against(f: Facts) -> Breach | None:
    names = lasting(f.bent, f.bent.turn > AWAY)
    if not names:
        return None
    bad = _of(f.bent, names, f.bent.turn > AWAY)
    text = f"{of_all(names, f)} {since(bad, f)} moved against their gradients (by {degrees(bad.turn)}); a "
    return Breach(f"{text}preconditioner turns by less than 90", names, {"cosine": 1 - median(bad.turn)})


@_check("turned", "stale-gradient", "the optimizer was given an earlier step's gradient")
def _stale(f: Facts) -> Breach | None:
    known = f.bent[f.bent.stale.notna() & f.bent.fit.notna()]
    old = known[(known.stale < 0.05) & (known.fit > 0.2)]
    ordered = f.bent.sort_values(["name", "step"])
    repeated = (ordered.hash_entry == ordered.groupby("name").hash_entry.shift()) & ordered.hash_entry.notna()
    numbers = {"stale": len(old), "repeated": int(repeated.sum())}
    if len(old) >= 0.5 * max(1, len(known)):
        text = f"{len(old)} of {len(known)} modified gradients that were looked into belong to the step before"
        return Breach(text, None, numbers)
    if names := lasting(ordered, repeated):
        return Breach(f"{of_all(names, f)} got the same gradient as in the step before, bit for bit", names, numbers)
    return None


@_check("turned", "unrelated-gradient", "what was written has nothing to do with this tensor's gradient")
def _unrelated(f: Facts) -> Breach | None:
    residual, cosine = median(f.bent.fit), 1 - median(f.bent.turn)
    if not len(f.bent) or not abs(cosine) < 0.1 or not residual >= 0.3:
        return None
    text = f"the written gradients stand at {degrees(f.bent.turn)} to the raw ones and are no r x r multiple of them"
    return Breach(text, None, {"cosine": cosine, "fit": residual})


@_check("turned", "swapped-factors", "each factor's inverse was applied to the other side")
def _swapped(f: Facts) -> Breach | None:
    known = f.bent[f.bent.matrix.notna()]
    swapped = known[known.matrix.str.contains("the other side's", na=False)]
    if len(swapped) < max(2, 0.5 * len(known)):
        return None
    text = f"in {len(swapped)} of {len(known)} cases looked into the matrix is the inverse of the other side's factor"
    return Breach(text, None, {"swapped": len(swapped), "known": len(known)})


@_check("turned", "applied-twice", "the same preconditioner, or the same gradient, was applied twice in one step")
def _twice(f: Facts) -> Breach | None:
    stepped = f.tensors[f.tensors.stepped > 1]
    if len(stepped) >= max(2, 0.2 * len(f.live)):
        names = stepped.name.unique()
        text = f"optimizers stepped more than once on the same gradients of {of_all(names, f)}, {since(stepped, f)}"
        return Breach(text, names, {"stepped_again": len(stepped)})
    double = f.bent[f.bent.turns >= 2]
    again = double[double.twice < 0.2]
    known = double[double.twice.notna()]
    if not len(again) or len(double) < 0.2 * len(f.bent) or len(again) < 0.5 * len(known):
        return None
    text = f"the same matrix was applied again to {len(double)} of {len(f.bent)} modified gradients"
    return Breach(text, double.name.unique(), {"twice": len(double), "twice_residual": median(again.twice)})


@_check("turned", "blown-up", "the modified gradient is far larger than the clipped one: the clipping limit means nothing")
def _blown_up(f: Facts) -> Breach | None:
    limits = pd.Series({s["step"]: s["max_norm"] for s in f.steps if s.get("max_norm")}, dtype=float)
    norms = np.sqrt((f.live.entry**2).groupby(f.live.step).sum())
    over = (norms / limits).dropna()
    far = over[over > LIMIT_PASSED]
    touched = f.touched[f.touched.step.isin(far.index)]
    ratio = median(f.touched.update_exact / f.touched.update_raw)
    if len(touched) and (2 * len(far) >= len(over) or ratio > 100):
        text = f"{most(touched.by)} left {far.median():.3g} times the clipping limit at the optimizer's entry in "
        return Breach(f"{text}{steps_of(far.index, f)}", touched.name.unique(), {"over_limit": float(far.median())})
    if ratio > 100:
        text = f"the updates are {ratio:.3g} times as large as the raw gradients'"
        return Breach(text, None, {"update_ratio": ratio})
    return None


# --- delivered ----------------------------------------------------------------------------------------------------


@_check("delivered", "dropped", "gradients were zeroed or removed before the optimizer ran")
def _dropped(f: Facts) -> Breach | None:
    names = lasting(f.live, f.live.lost)
    if not names:
        return None
    lost = _of(f.live, names, f.live.lost)
    text = f"{most(lost.undone_by)} removed {len(lost)} of {len(f.live)} gradients before the optimizer ran"
    return Breach(text, names, {"dropped": len(lost)})


@_check("delivered", "applied-on-micro-steps", "gradients were changed between the backward passes of one step")
def _micro(f: Facts) -> Breach | None:
    rows = f.tensors[f.tensors.micro.notna()]
    steps = rows.step.nunique()
    if not len(rows) or steps < 0.2 * max(1, len(f.steps)):
        return None
    text = f"{most(rows.micro)} changed partial sums, to which the next backward adds, in {steps_of(rows.step, f)}"
    return Breach(text, rows.name.unique(), {"micro_steps_modified": int(steps)})


@_check("delivered", "modified-too-late", "gradients were changed, or looked for, after the parameters had moved")
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
    if reads and f.modifier_known:
        who = max(reads, key=lambda k: reads[k])
        text = f"{who} looked for gradients after they had been used and cleared"
        return Breach(text, None, {"late_reads": reads[who]})
    return None


@_check("delivered", "accumulated-across-steps", "gradients are not cleared: each step adds to the last one's")
def _leftover(f: Facts) -> Breach | None:
    steps = [s for s in f.steps if s.get("leftover")]
    if len(steps) < 0.5 * max(2, len(f.steps) - 1):
        return None
    text = f"{len(steps)} of {len(f.steps)} steps began with the gradients of the step before"
    return Breach(text, None, {"leftover_steps": len(steps)})


@_check("delivered", "overwritten", "a modified gradient was put back before the optimizer ran")
def _overwritten(f: Facts) -> Breach | None:
    rows = f.live[~f.live.lost & ((f.live.mods > 0) | (f.live.turn_written > TURN))]
    flags = (rows.turn_written > TURN) & ~(rows.turn > TURN)
    names = lasting(rows, flags)
    if not names:
        return None
    back = _of(rows, names, flags)
    by, writer = most(back.undone_by), most(back.by)
    text = f"{writer} turned {number(len(back), 'gradient')} by {degrees(back.turn_written)}; {by} put them back"
    return Breach(text, names, {"overwritten": len(back), "overwritten_by": by, "written_by": writer})


@_check("delivered", "clipped-to-nothing", "clipping left nothing of the gradient")
def _clipped(f: Facts) -> Breach | None:
    limits = {s["step"]: s["max_norm"] for s in f.steps if s.get("max_norm")}
    rows = f.bent if len(f.bent) else f.live
    if not limits or not len(rows):
        return None
    norms = f.live.groupby("step").unscaled.apply(lambda x: float(np.sqrt((x**2).sum())))
    room = float(np.median([limits[s] / n for s, n in norms.items() if s in limits and n > 0] or [np.inf]))
    effect, gain = median(rows.update_exact / rows.update_raw), median(rows.gain)
    if room < 1e-4 or (gain < 1e-4 and effect < 0.05):
        text = f"clipping left {min(room, gain):.1e} of the gradients' norm"
        return Breach(text, None, {"room": room, "gain": gain, "update_ratio": effect})
    return None


# --- consumed -----------------------------------------------------------------------------------------------------


@_check("consumed", "not-consumed", "the optimizer used other gradients than those in `.grad`")
def _not_consumed(f: Facts) -> Breach | None:
    rows = f.touched[f.touched.replay.notna()]
    replay, raw, reaction = median(rows.replay), median(rows.update_turn), median(f.touched.reaction)
    numbers = {"replay": replay, "update_turn": raw, "reaction": reaction}
    if reaction < 1e-6:
        return Breach("the optimizer's update does not depend on `.grad`: it has gradients of its own", None, numbers)
    missed = rows[(rows.replay > REPLAYED) & ~(rows.replay_turn < SAME_UPDATE)]
    names = lasting(rows, rows.index.isin(missed.index) & pd.Series(True, rows.index))
    if 2 * len(names) < rows.name.nunique() or not names:
        return None
    if raw < SAME_UPDATE:
        return Breach("the optimizer moved the parameters as the raw gradients would have", None, numbers)
    if f.most("foreign"):  # it may draw random numbers, or couple tensors: see `unseen`
        return None
    text = f"the optimizer's replay misses the updates by {replay:.0%}: something else moves the parameters"
    return Breach(text, names, numbers, "update-unexplained")


@_check("consumed", "cancelled-by-optimizer", "the update has the direction that the unmodified gradient would have given")
def _cancelled(f: Facts) -> Breach | None:
    touched = f.touched
    if not len(touched) or len(touched) < 0.05 * len(f.live) or _normalised(touched):
        return None
    rows = touched[touched.update_turn.notna() & (touched.update_exact > 0)]
    turn, gradient = median(rows.update_turn), median(touched.turn)
    scaled = not len(f.bent)
    if not (scaled or (turn < SAME_UPDATE if len(rows) else gradient < TURN)):
        return None
    ratio = median(rows.update_exact / rows.update_raw)
    numbers = {"update_turn": turn, "gradient_turn": gradient, "update_ratio": ratio, "gain": median(touched.gain)}
    if abs(ratio - 1) > 0.02 or turn > SAME_UPDATE:
        larger = f"{ratio:.3g} times as large" if abs(ratio - 1) > 0.02 else "of the same size, and differ by its memory"
        text = f"the gradients were multiplied by numbers, not by a matrix; the updates are {larger}"
        return Breach(text, None, numbers, "scaled-only")
    how = "turned" if gradient > TURN else "only scaled"
    text = f"the gradients were {how}, and the optimizer divides that out again: its updates are the unmodified ones"
    return Breach(text, None, numbers)


def _normalised(rows: pd.DataFrame) -> bool:
    """Whether gradients were scaled to one norm, all together or each by itself: a way of clipping, no modifier."""
    if len(rows[rows.bent]) or rows.step.nunique() < 3:
        return False
    total = np.sqrt((rows.entry**2).groupby(rows.step).sum())
    before = np.sqrt((rows.unscaled**2).groupby(rows.step).sum())
    spread = rows.groupby("name").entry.agg(lambda x: x.std() / x.mean())
    same = total.std() < 1e-2 * total.mean() or bool((spread < 1e-2).all())
    return bool(same and before.std() > 1e-2 * before.mean())


# --- moved --------------------------------------------------------------------------------------------------------


@_check("moved", "learning-rate-zero", "the optimizer ran with a learning rate of zero")
def _rate_zero(f: Facts) -> Breach | None:
    rows = f.live[f.live.hash_after.notna()]
    still = rows.hash_before == rows.hash_after
    names = lasting(rows, still & rows.rate_zero)
    rates = [s["lr"][1] for s in f.steps if s.get("lr")]
    if names:
        bad = _of(rows, names, still & rows.rate_zero)
        text = f"the learning rate of {of_all(names, f)} is 0 {since(bad, f)}"
        return Breach(text, names, {"still": len(bad), "highest_lr": max(rates, default=None)})
    if rates and max(rates) == 0 and len(rows) and still.mean() >= 0.99:
        numbers = {"still": int(still.sum()), "highest_lr": 0.0}
        return Breach(f"the learning rate is 0 in all {number(len(rates), 'step')}", None, numbers)
    return None


@_check("moved", "no-update", "the optimizer ran but changed no bit of the parameters, or rounding left nothing")
def _no_update(f: Facts) -> Breach | None:
    rows = f.live[f.live.hash_after.notna()]
    still = rows.hash_before == rows.hash_after
    if names := lasting(rows, still):
        bad = _of(rows, names, still)
        text = f"{len(bad)} of {number(len(rows), 'update')} changed no bit: {of_all(names, f)}, {since(bad, f)}"
        rates = [s["lr"][1] for s in f.steps if s.get("lr")]
        return Breach(text, names, {"still": len(bad), "highest_lr": max(rates, default=None)})
    known = f.live[f.live.arrived.notna()]
    names = lasting(known, known.arrived < 0.2)
    if names and 2 * len(names) >= known.name.nunique():
        arrived = median(known[known.name.isin(names)].arrived)
        text = f"rounding to 16 bits left {arrived:.0%} of the updates that were looked into"
        return Breach(text, names, {"arrived": arrived})
    return None


# --- kept ---------------------------------------------------------------------------------------------------------


@_check("kept", "update-undone", "the parameters were put back after the optimizer had moved them")
def _undone(f: Facts) -> Breach | None:
    rows, moved, later = _transitions(f)
    undone = moved & later.notna() & (later == rows.hash_before)
    if undone.sum() < 0.5 * max(1, (moved & later.notna()).sum()) or not undone.any():
        return None
    text = f"{int(undone.sum())} of {int((moved & later.notna()).sum())} updates were reverted"
    return Breach(text, rows[undone].name.unique(), {"undone": int(undone.sum())})


@_check("kept", "not-kept", "the weights were replaced by earlier or other ones after the optimizer had moved them")
def _not_kept(f: Facts) -> Breach | None:
    rows, moved, later = _transitions(f)
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
    other = f.live[f.live.drift > 1.2]
    if len(other):
        names = other.name.unique()
        text = f"before step {int(other.step.min())} the weights of {of_all(names, f)} were replaced by others"
        return Breach(text, names, {"replaced_weights": len(other)})
    return None


def _transitions(f: Facts) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Updates that were seen; which of them moved the tensor; and its hash when it was seen next."""
    rows = f.tensors[f.tensors.hash_after.notna() & ~f.tensors.unheld].sort_values(["step", "name"], kind="stable")
    following = rows.groupby("name")[["hash_before", "step"]].shift(-1)
    later = following.hash_before.where(following.step == rows.step + 1).astype(object)
    last = following.step.isna()
    if f.weights and not f.most("masters"):
        later = later.where(~last, rows.name.map(f.weights))
    return rows, rows.hash_before != rows.hash_after, later


# --- throughout ---------------------------------------------------------------------------------------------------


@_check("throughout", "only-some-layers", "some layers or tensors are never modified though they have gradients")
def _some_layers(f: Facts) -> Breach | None:
    after = f.live[f.live.step >= f.start]
    shares = after.groupby("name").bent.mean()
    missing = set(shares[shares < 0.05 * shares.max()].index)
    if not len(f.bent) or not missing:
        return None
    groups = {g: set(rows.name) for g, rows in after.groupby("group") if g != "other"}
    idle = [g for g, names in groups.items() if names <= missing]
    if idle and len(groups) == 2 and len(idle) == 1 and missing == groups[idle[0]]:
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


@_check("throughout", "stopped", "modification ended during the run")
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


# --- nothing broke ------------------------------------------------------------------------------------------------


@_check("turned", "nothing-written", "a preconditioner is attached and ready, but no gradient was changed")
def _nothing_written(f: Facts) -> Breach | None:
    if len(f.bent) or not f.modifier_known:
        return None
    text = "a preconditioner is attached, but changes no gradient before the optimizer: not called, or written to a copy"
    return Breach(text, None, {"statuses": f.statuses})


CAUSES: dict[str, str] = {
    **{check.cause: check.meaning for check in CHECKS},
    "only-one-factor": "only A's or only B's gradients are modified",
    "scaled-only": "gradients and updates differ in size alone: a learning rate, not a preconditioner",
    "update-unexplained": "the parameters move in a way that the optimizer does not explain",
    "effective": "modified gradients reached the optimizer and changed the direction of its updates",
    "no-modifier": "plain training: nothing changes gradients but clipping and scaling",
    "partly-seen": "the run was resumed, and its ledger saw less than half of it",
    "undecided": "the ledger itself failed",
}
