"""The causes, one detector each, in the order in which they exclude each other.

Thresholds: a direction is "the same" below `TURN` = 1e-4 for gradients (1 - cos), and below `SAME_UPDATE` = 1e-3 for
updates, which are differences of parameters and carry their rounding. Real preconditioning was measured at 0.1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.findings import Facts
from grit_impl.ledger.timeline import TURN

SAME_UPDATE = 1e-3
PARTLY_SEEN = "partly-seen"
UNDECIDED = ("no-steps", "update-unexplained", "no-modifier", "undecided", PARTLY_SEEN)


@dataclass(frozen=True)
class Finding:
    """A detector's answer: a sentence, the numbers behind it, and the cause if it is not the detector's own."""

    summary: str
    numbers: dict[str, Any] = field(default_factory=dict)
    cause: str | None = None


@dataclass(frozen=True)
class Detector:
    """One cause: its name, what it means, and the function that recognises it."""

    cause: str
    meaning: str
    find: Callable[[Facts], Finding | None]


DETECTORS: list[Detector] = []


def _detector(cause: str, meaning: str) -> Callable[[Callable[[Facts], Finding | None]], Callable[..., Any]]:
    def register(find: Callable[[Facts], Finding | None]) -> Callable[[Facts], Finding | None]:
        DETECTORS.append(Detector(cause, meaning, find))
        return find

    return register


def _most(rows: pd.Series) -> str:
    """The most frequent value, or 'someone'."""
    counts = rows.dropna().value_counts()
    return str(counts.index[0]) if len(counts) else "someone"


def _median(values: pd.Series) -> float:
    return float(values.median()) if values.notna().any() else float("nan")


def _idle(f: Facts) -> bool:
    """No direction was changed, at the optimizer's entry, in 99% of the gradients."""
    return f.share(f.bent, f.live) < 0.01


@_detector("non-finite", "the modifier wrote NaN or infinity; the step was dropped, or the parameters are lost")
def _non_finite(f: Facts) -> Finding | None:
    bad = f.tensors[f.tensors.nonfinite]
    skipped = f.total("skipped")
    if not len(bad):
        if f.statuses.get("non-finite", 0) * 2 > sum(f.statuses.values()):
            return Finding("the preconditioner's factors are not finite", {"statuses": f.statuses})
        return None
    text = f"{len(bad)} gradients were finite after backward and not after {_most(bad.by)} wrote them"
    return Finding(text + (f"; {skipped} steps were skipped" if skipped else ""), {"nonfinite": len(bad)})


@_detector("wrong-parameters", "gradients were written to tensors that no optimizer of this model uses")
def _wrong_parameters(f: Facts) -> Finding | None:
    t = f.tensors
    unheld = t[t.unheld & (t.turns > 0)]
    dead = set(t.groupby("name").raw.max().pipe(lambda s: s[~(s > 0)]).index)
    inactive = t[t.name.isin(dead) & (t.turns > 0)]
    orphans, replaced = f.total("orphans"), int(max((s.get("replaced") or 0 for s in f.steps), default=0))
    lost = t[t.unheld & (t.raw > 0)]
    numbers = {"unheld": len(unheld), "inactive": len(inactive), "orphans": orphans, "replaced": replaced}
    if len(unheld):
        return Finding(f"{unheld.name.nunique()} modified tensors are held by no optimizer", numbers)
    if replaced and len(lost):
        return Finding(f"{replaced} tensors were re-created after the optimizer was built", numbers)
    if _idle(f) and len(inactive):
        return Finding(f"{inactive.name.nunique()} tensors that are not trained were written to", numbers)
    if _idle(f) and orphans:
        return Finding(f"gradients of {orphans} tensors that are no longer in the model were written", numbers)
    return None


@_detector("no-steps", "no torch optimizer stepped on the watched parameters")
def _no_steps(f: Facts) -> Finding | None:
    skipped = f.total("skipped")
    if len(f.steps) == skipped or not any(s.get("held") for s in f.steps):
        return Finding(
            f"{len(f.steps)} steps seen, {skipped} skipped by GradScaler, none by a torch optimizer that holds a "
            "watched parameter",
            {"skipped": skipped},
        )
    return None


@_detector("dropped", "gradients were zeroed or removed before the optimizer ran")
def _dropped(f: Facts) -> Finding | None:
    lost = f.live[f.live.lost]
    if not len(lost) or len(lost) < 0.9 * len(f.live):
        return None
    return Finding(f"{_most(lost.undone_by)} removed {len(lost)} of {len(f.live)} gradients", {"dropped": len(lost)})


@_detector("learning-rate-zero", "the optimizer ran but could not move the parameters")
def _no_update(f: Facts) -> Finding | None:
    live = f.live[f.live.hash_after.notna()]
    still = live[live.hash_before == live.hash_after]
    if not len(live) or len(still) < 0.99 * len(live):
        return None
    rates = [s["lr"][1] for s in f.steps if s.get("lr")]
    numbers = {"still": len(still), "highest_lr": max(rates, default=None)}
    if rates and max(rates) == 0:
        return Finding(f"the learning rate is 0 in all {len(rates)} steps", numbers)
    return Finding(f"{len(still)} of {len(live)} updates changed no bit", numbers, "no-update")


@_detector("applied-on-micro-steps", "gradients were changed between the backward passes of one step")
def _micro(f: Facts) -> Finding | None:
    rows = f.tensors[f.tensors.micro.notna()]
    steps = rows.step.nunique()
    if not len(rows) or steps < 0.2 * max(1, len(f.steps)):
        return None
    text = (
        f"{_most(rows.micro)} changed partial sums, to which the next backward adds, in {steps} of {len(f.steps)} steps"
    )
    return Finding(text, {"micro_steps_modified": int(steps)})


@_detector("modified-too-late", "gradients were changed, or looked for, after the optimizer had moved the parameters")
def _too_late(f: Facts) -> Finding | None:
    if not _idle(f):
        return None
    rows = f.tensors[f.tensors.late.notna()]
    reads: dict[str, int] = {}
    for step in f.steps:
        for who, count in (step.get("late_reads") or {}).items():
            reads[who] = reads.get(who, 0) + count
    if len(rows):
        text = f"{_most(rows.late)} changed gradients after the optimizer step, in {rows.step.nunique()} steps"
        return Finding(text, {"late": len(rows), "late_steps": int(rows.step.nunique())})
    if reads and f.modifier_known:
        who = max(reads, key=lambda k: reads[k])
        return Finding(f"{who} looked for gradients after they had been used and cleared", {"late_reads": reads[who]})
    return None


@_detector("accumulated-across-steps", "gradients are not cleared: each step adds to the last one's")
def _leftover(f: Facts) -> Finding | None:
    steps = [s for s in f.steps if s.get("leftover")]
    if len(steps) < 0.5 * max(2, len(f.steps) - 1):
        return None
    text = f"{len(steps)} of {len(f.steps)} steps began with the gradients of the step before"
    return Finding(text, {"leftover_steps": len(steps)})


@_detector("overwritten", "a modified gradient was put back before the optimizer ran")
def _overwritten(f: Facts) -> Finding | None:
    live = f.live
    written = live[live.turn_written > TURN]
    back = written[~(written.turn > TURN) & ~written.lost]
    if not len(back) or len(back) < 0.5 * len(f.touched):
        return None
    by, writer = _most(back.undone_by), _most(back.by)
    text = f"{writer} changed {len(back)} gradients by 1 - cos = {_median(back.turn_written):.2g}; {by} put them back"
    return Finding(text, {"overwritten": len(back), "overwritten_by": by, "written_by": writer})


@_detector("starved", "no statistics reach the preconditioner: its hooks never fire")
def _starved(f: Facts) -> Finding | None:
    hooked = max((s.get("hooked_modules") or 0 for s in f.steps), default=0)
    calls = f.total("module_calls")
    samples = [layer["samples"] for layer in (f.report or {}).get("layers", []) if "samples" in layer]
    # A factor that was never inverted may call itself starved; what counts is whether anything reached it.
    without = sum(not count for count in samples) if samples else f.statuses.get("starved", 0)
    starved = without * 2 > sum(f.statuses.values())
    silent = hooked > 0 and calls == 0 and len(f.live) > 0
    if not _idle(f) or not (starved or silent):
        return None
    numbers = {"hooked_modules": hooked, "module_calls": calls, "statuses": f.statuses}
    if silent:
        return Finding(
            f"gradients reach {f.live.name.nunique()} LoRA tensors, but the {hooked} modules with hooks were called 0 "
            "times: something computes these layers without calling them (fused kernels)",
            numbers,
        )
    return Finding(f"the preconditioner reports {without} layers without samples", numbers)


@_detector("not-ready", "the factors were never ready: too few samples, or not inverted yet")
def _not_ready(f: Facts) -> Finding | None:
    ready = f.statuses.get("ready", 0)
    if not _idle(f) or not f.statuses or ready * 2 > sum(f.statuses.values()):
        return None
    samples = [layer.get("samples", 0) for layer in (f.report or {}).get("layers", [])]
    text = f"{sum(f.statuses.values()) - ready} of {sum(f.statuses.values())} layers have no ready factor"
    return Finding(text, {"statuses": f.statuses, "most_samples": max(samples, default=None)})


@_detector("clipped-to-nothing", "clipping left nothing of the modified gradient")
def _clipped(f: Facts) -> Finding | None:
    bent = f.bent
    limits = {s["step"]: s["max_norm"] for s in f.steps if s.get("max_norm")}
    if not limits or not len(bent):
        return None
    norms = f.live.groupby("step").unscaled.apply(lambda x: float(np.sqrt((x**2).sum())))
    room = np.median([limits[s] / n for s, n in norms.items() if s in limits and n > 0] or [np.inf])
    effect = _median(bent.update_exact / bent.update_raw)
    gain = _median(bent.gain)
    if room < 1e-4 or (gain < 1e-4 and effect < 0.05):
        text = f"clipping left {min(float(room), gain):.1e} of the gradients' norm"
        return Finding(text, {"room": float(room), "gain": gain, "update_ratio": effect})
    return None


@_detector("applied-twice", "the same preconditioner was applied twice in one step")
def _twice(f: Facts) -> Finding | None:
    double = f.bent[f.bent.turns >= 2]
    again = double[double.twice < 0.2]
    known = double[double.twice.notna()]
    if not len(again) or len(double) < 0.2 * len(f.bent) or len(again) < 0.5 * len(known):
        return None
    text = f"the same matrix was applied again to {len(double)} of {len(f.bent)} modified gradients"
    return Finding(text, {"twice": len(double), "twice_residual": _median(again.twice)})


@_detector("against-the-gradient", "the modified gradient points away from the raw one: a preconditioner is positive")
def _against(f: Facts) -> Finding | None:
    away = f.bent[f.bent.turn > 1.0]
    cosine = 1 - _median(f.bent.turn)
    if len(away) < 0.8 * max(1, len(f.bent)) or not cosine < -0.1:
        return None
    return Finding(f"{len(away)} of {len(f.bent)} modified gradients have a negative cosine", {"cosine": cosine})


@_detector("stale-gradient", "the optimizer was given an earlier step's gradient")
def _stale(f: Facts) -> Finding | None:
    bent = f.bent
    known = bent[bent.stale.notna() & bent.fit.notna()]
    old = known[(known.stale < 0.05) & (known.fit > 0.2)]
    ordered = bent.sort_values(["name", "step"])
    repeated = ordered[(ordered.hash_entry == ordered.groupby("name").hash_entry.shift()) & ordered.hash_entry.notna()]
    if len(old) >= 0.5 * max(1, len(known)):
        text = f"{len(old)} of {len(known)} modified gradients belong to the step before"
    elif len(repeated) >= 0.5 * max(1, len(bent)):
        text = f"{len(repeated)} of {len(bent)} gradients are bit-equal to those of the step before"
    else:
        return None
    return Finding(text, {"stale": len(old), "repeated": len(repeated)})


@_detector("unrelated-gradient", "what was written has nothing to do with this tensor's gradient")
def _unrelated(f: Facts) -> Finding | None:
    bent = f.bent
    residual = _median(bent.fit)
    cosine = 1 - _median(bent.turn)
    if not len(bent) or not abs(cosine) < 0.1 or not residual >= 0.3:
        return None
    text = f"the written gradients have cosine {cosine:.2f} with the raw ones and are no r x r multiple of them"
    return Finding(text, {"cosine": cosine, "fit": residual})


@_detector("update-undone", "the parameters were put back after the optimizer had moved them")
def _undone(f: Facts) -> Finding | None:
    rows = f.live[f.live.hash_after.notna()].sort_values(["name", "step"])
    later = rows.groupby("name")[["hash_before", "step"]].shift(-1)
    moved = (rows.hash_before != rows.hash_after) & (later.step == rows.step + 1)
    undone = moved & (later.hash_before == rows.hash_before)
    if undone.sum() < 0.5 * max(1, moved.sum()):
        return None
    return Finding(f"{int(undone.sum())} of {int(moved.sum())} updates were reverted", {"undone": int(undone.sum())})


@_detector("not-consumed", "the optimizer used other gradients than those in `.grad`")
def _not_consumed(f: Facts) -> Finding | None:
    rows = f.touched[f.touched.replay.notna()]
    replay, raw, reaction = _median(rows.replay), _median(rows.update_turn), _median(f.touched.reaction)
    numbers = {"replay": replay, "update_turn": raw, "reaction": reaction}
    if reaction < 1e-6:
        return Finding("the optimizer's update does not depend on `.grad`: it has gradients of its own", numbers)
    if not replay > 0.05:
        return None
    if raw < SAME_UPDATE:
        return Finding(f"the updates are those of the raw gradients (replay residual {replay:.2g})", numbers)
    text = f"the optimizer's replay misses the updates by {replay:.0%}: something else moves the parameters"
    return Finding(text, numbers, "update-unexplained")


@_detector("cancelled-by-optimizer", "the update has the direction that the unmodified gradient would have given")
def _cancelled(f: Facts) -> Finding | None:
    touched = f.touched
    rows = touched[touched.update_turn.notna() & (touched.update_exact > 0)]
    if not len(touched) or len(touched) < 0.05 * len(f.live):
        return None
    turn, gradient = _median(rows.update_turn), _median(touched.turn)
    same = turn < SAME_UPDATE if len(rows) else gradient < TURN
    if not same:
        return None
    ratio = _median(rows.update_exact / rows.update_raw)
    numbers = {"update_turn": turn, "gradient_turn": gradient, "update_ratio": ratio, "gain": _median(touched.gain)}
    if abs(ratio - 1) > 0.02:
        text = f"the updates are {ratio:.3g} times as large, in the same direction (1 - cos = {turn:.1e})"
        return Finding(text, numbers, "scaled-only")
    how = "turned" if gradient > TURN else "only scaled"
    return Finding(f"the gradients were {how}, the updates are the unmodified ones (1 - cos = {turn:.1e})", numbers)


@_detector("only-some-layers", "some layers are never modified though they have gradients")
def _some_layers(f: Facts) -> Finding | None:
    if _idle(f):
        return None
    live, first = f.live, f.bent.step.min()
    after = live[live.step >= first]
    layers, covered = set(after.layer), set(f.bent.layer)
    missing = sorted(layers - covered)
    if len(missing) < 0.02 * len(layers) or not missing:
        return None
    text = f"{len(missing)} of {len(layers)} layers are never modified, e.g. {missing[0]}"
    return Finding(text, {"layers": len(layers), "layers_missing": len(missing)})


@_detector("only-one-factor", "only A's or only B's gradients are modified")
def _one_factor(f: Facts) -> Finding | None:
    if _idle(f):
        return None
    after = f.live[f.live.step >= f.bent.step.min()]
    shares = {str(g): float(rows.bent.mean()) for g, rows in after.groupby("group") if g != "other"}
    idle = [g for g, share in shares.items() if share < 0.05]
    if len(shares) < 2 or not idle:
        return None
    other = next(g for g in shares if g not in idle)
    text = f"{other} is preconditioned ({shares[other]:.0%}), {idle[0]} is not ({shares[idle[0]]:.0%})"
    return Finding(text, {f"share_{g}": share for g, share in shares.items()})


@_detector("stopped", "modification ended during the run")
def _stopped(f: Facts) -> Finding | None:
    steps = sorted(f.live.step.unique())
    tail = steps[-max(2, len(steps) // 3) :] if len(steps) >= 6 else []
    if _idle(f) or not tail or f.bent.step.max() >= tail[0]:
        return None
    last = int(f.bent.step.max())
    return Finding(f"no gradient was modified after step {last} of {int(steps[-1])}", {"last_modified": last})


@_detector("effective", "modified gradients reached the optimizer and changed the direction of its updates")
def _effective(f: Facts) -> Finding | None:
    if _idle(f):
        return None
    bent = f.bent
    update, replay = _median(bent.update_turn), _median(bent.replay)
    text = (
        f"{f.share(bent, f.live):.0%} of all gradients were turned (1 - cos = {_median(bent.turn):.2g}), "
        f"in {bent.step.nunique()} of {len(f.steps)} steps"
    )
    if np.isfinite(update):
        text += f"; the optimizer consumed them (replay {replay:.0e}) and its updates turned by {update:.2g}"
    return Finding(text, {"by": _most(bent.by)})


@_detector("nothing-written", "a preconditioner is attached and ready, but no gradient was changed")
def _nothing_written(f: Facts) -> Finding | None:
    if not f.modifier_known:
        return None
    return Finding(
        "a preconditioner is attached, but changes no gradient before the optimizer: not called, or written to a copy",
        {"statuses": f.statuses},
    )


@_detector("no-modifier", "plain training: nothing changes gradients but clipping and scaling")
def _no_modifier(f: Facts) -> Finding | None:
    return Finding(f"no gradient was modified in {len(f.steps)} steps")


CAUSES: dict[str, str] = {
    **{d.cause: d.meaning for d in DETECTORS},
    "no-update": "the optimizer ran but changed no bit of the parameters",
    "scaled-only": "updates differ in size alone: a learning rate, not a preconditioner",
    PARTLY_SEEN: "the run was resumed, and its ledger saw less than half of it",
    "update-unexplained": "the parameters move in a way that the optimizer does not explain",
}
