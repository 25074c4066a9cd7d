"""Was the tensor used, did a gradient arrive, and did anybody read what a preconditioner needs?"""

from __future__ import annotations

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.chain.links import Breach, check, rows_of
from grit_impl.ledger.chain.words import most, number, of_all, since
from grit_impl.ledger.findings import Facts, lasting, waiting


@check("used", "wrong-parameters", "gradients were written to tensors that no optimizer of this model uses")
def _wrong_parameters(f: Facts) -> Breach | None:
    t = f.tensors[~f.tensors.skipped & ~f.tensors.name.isin(f.idle)]
    unheld = t[t.unheld & (t.turns > 0)]
    # Optimizers may take turns.
    in_vain = set(t.name) - set(t[~t.unheld].name) | set(lasting(t, t.unheld, half=False))
    unheld = unheld[unheld.name.isin(in_vain)]
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
    left = int(f.most("left_behind"))
    if not len(f.touched) and not f.tensors.late.notna().any() and left >= max(2, f.tensors.name.nunique() / 2):
        text = f"somebody looked for the gradients of {number(left, 'parameter')} that are no longer in the model"
        return Breach(text, None, {**numbers, "left_behind": left})
    if not len(f.bent) and orphans:
        text = f"gradients of {number(orphans, 'tensor')} that are no longer in the model were written"
        return Breach(text, None, numbers)
    return None


@check("used", "not-used", "tensors take no part in the forward pass: merged, switched off, inactive or taken out")
def _not_used(f: Facts) -> Breach | None:
    rows = f.tensors[~f.tensors.unheld & ~f.tensors.skipped]
    flags = rows.why.notna() & (rows.why != "frozen")
    # Adapters that are trained in turn: in the place of this one another one of its layer is.
    place = rows.groupby(["layer", "group", "step"], dropna=False).ngroup()
    flags &= ~(place.isin(place[rows.live & ~flags]) & rows.name.isin(rows[rows.live & ~flags].name))
    names = lasting(rows, flags)
    if not names:
        return None
    bad = rows_of(rows, names, flags)
    text = f"{of_all(names, f)} took no part in the forward pass ({most(bad.why)}), {since(bad, f)}"
    return Breach(text, names, {"unused": len(bad)})


@check("arrived", "no-steps", "no torch optimizer stepped on the watched parameters")
def _no_steps(f: Facts) -> Breach | None:
    skipped = f.total("skipped")
    if f.tensors.nonfinite.any() or (len(f.steps) != skipped and any(s.get("held") for s in f.steps)):
        return None
    if len(f.tensors) and (f.tensors.why == "frozen").all():
        return None  # nobody could have held them
    text = f"{number(len(f.steps), 'step')} seen, {skipped} skipped by GradScaler, none by a torch optimizer that holds"
    return Breach(f"{text} a watched parameter", None, {"skipped": skipped})


@check("arrived", "non-finite", "NaN or infinity in a gradient: the step was dropped, or the parameters are lost")
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
        bad = rows_of(rows, names, flags)
        text = f"backward left NaN or infinity in {of_all(names, f)}, {since(bad, f)}: the loss is not finite"
        return Breach(text, names, {"nonfinite": len(bad)})
    if f.statuses.get("non-finite", 0) * 2 > sum(f.statuses.values()):
        return Breach("the preconditioner's factors are not finite", None, {"statuses": f.statuses})
    return None


@check("arrived", "no-gradient", "backward left no gradient: absent or all zero, though the tensor is being trained")
def _no_gradient(f: Facts) -> Breach | None:
    rows = f.tensors[(~f.tensors.unheld | (f.tensors.why == "frozen")) & ~f.tensors.skipped]
    if f.steps and not len(rows):
        return Breach("no backward pass left a gradient in any watched tensor", None, {"without": 0})
    flags = (rows.absent & (rows.why.isna() | (rows.why == "frozen"))) | (rows.raw == 0)
    flags &= ~(_in_turn(rows) | waiting(f).reindex(rows.index))
    names = lasting(rows, flags)
    if not names:
        return None
    bad = rows_of(rows, names, flags)
    never = not (rows[rows.name.isin(names)].raw > 0).any()
    what = "never got a gradient" if never else f"got no gradient {since(bad, f)}"
    frozen = " (frozen)" if (bad.why == "frozen").any() else ""
    rest = rows.name.nunique() - len(names)
    others = f"; the other {number(rest, 'tensor')} did" if rest else ""
    return Breach(f"{of_all(names, f)} {what}{frozen}{others}", names, {"without": len(bad)})


def _in_turn(rows: pd.DataFrame) -> pd.Series:
    """Rows of tensors that are frozen for a while: until they are trained, or while others that were frozen are."""
    rows = rows.sort_values(["name", "step"])
    off, frozen = rows.absent, rows.why == "frozen"
    run = ((off != off.shift()) | (rows.name != rows.name.shift())).cumsum()
    by_run = rows.assign(frozen=frozen, off=off, run=run).groupby("run")
    runs = by_run.agg(name=("name", "first"), off=("off", "first"), frozen=("frozen", "any"), first=("step", "min"))
    runs["frozen"] &= runs.off
    thawed = runs.frozen.shift(fill_value=False) & (runs.name == runs.name.shift())
    began = runs["first"] > rows.step.min()
    with_others = began & runs["first"].isin(runs["first"][thawed])
    planned = runs.frozen & (thawed.shift(-1, fill_value=False) | with_others)
    return run.map(planned).reindex(rows.index)


@check("read", "starved", "no statistics reach the preconditioner: its hooks never fire")
def _starved(f: Facts) -> Breach | None:
    if len(f.bent) or f.turned_in_vain:
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
    if dead := int(f.most("dead_hooks")):
        text = f"hooks sit on {number(dead, 'module')} that are in no model any more, as of an adapter that was deleted"
        return Breach(text, None, {**numbers, "dead_hooks": dead})
    return None


@check("read", "not-ready", "the factors were never ready: too few samples, or not inverted yet")
def _not_ready(f: Facts) -> Breach | None:
    ready, known = f.statuses.get("ready", 0), sum(f.statuses.values())
    if len(f.bent) or f.turned_in_vain or not known or ready * 2 > known:
        return None
    samples = [layer.get("samples", 0) for layer in (f.report or {}).get("layers", [])]
    numbers = {"statuses": f.statuses, "most_samples": max(samples, default=None)}
    return Breach(f"{known - ready} of {known} layers have no ready factor", None, numbers)
