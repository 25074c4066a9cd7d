"""From the fingerprints of one optimizer step to rows: who changed which gradient, between which two moments.

A probe is a look at all gradients. Two consecutive probes delimit a segment; whatever differs between them was done by
the code that ran in between. Phases, per tensor: `micro` (between two backward passes of one step), `before` (after the
last backward, before the optimizer that holds the tensor), `inside` it, and `late` (after it, until gradients are
cleared or the next backward).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grit_impl.ledger.applied import Explainer
from grit_impl.ledger.structure import Grams

# Columns of a probe's table (fingerprints.py makes them; reading them needs no torch): hash, norm, inner products with
# the gradient at the probe before, and with the unmodified one. In the parameters' tables the third is a distance:
# from the parameters that the step before left, and from those that the optimizer found.
NORM, PREVIOUS, RAW = 1, 2, 3
COLUMNS = 4

# Closer than this to the same direction is "only scaled": bf16 rounding of a scaled gradient stays below 2e-6.
TURN = 1e-4
# Factors of one common scaling agree to this, even in bf16.
UNIFORM = 2e-2
SAME, SCALED, TURNED, ZEROED, NONFINITE, APPEARED, GONE = range(7)
AUTOGRAD, CLIP, CLIP_VALUE, SCALER, ZERO_GRAD, TENSOR_HOOK = (
    "autograd",
    "clipping",
    "clipping by value",
    "GradScaler",
    "zero_grad",
    "tensor hook",
)
ACCUMULATED_HOOK = "post-accumulate hook"
LOOP, LOOP_SCALING = "training loop", "uniform scaling in the training loop"
NOT_MODIFIERS = {AUTOGRAD, CLIP, CLIP_VALUE, SCALER, ZERO_GRAD, LOOP_SCALING}
Table = NDArray[np.float64]


@dataclass(eq=False)
class Probe:
    """One look at all gradients.

    Attributes:
        who: The code that ran since the previous probe.
        moment: What comes next, e.g. `backward`, `step:AdamW`.
        table: Fingerprints (N, 4), rows of missing gradients NaN; on the device until the step is closed.
        missing: (N,) the gradient was None.
        look: The gradients themselves; until the step is closed.
        written: Somebody has written to a gradient since the previous probe, as versions say.
        samples: Gradients of the tensors whose structure is looked at; until the step is closed.
        like: The probe whose table this one shares, because no gradient's version had changed; None: it has its own.
    """

    who: str
    moment: str
    table: Any
    missing: NDArray[np.bool_]
    samples: dict[int, Any] = field(default_factory=dict)
    like: Probe | None = None
    look: Any = None
    written: bool = False

    @property
    def hash(self) -> NDArray[np.int64]:
        """(N,) bit hashes; 0 where missing."""
        bits = np.ascontiguousarray(self.table[:, 0]).view(np.int64).copy()
        bits[self.missing] = 0
        return bits

    @property
    def norm(self) -> Table:
        """(N,) norms; 0 where missing."""
        return np.where(self.missing, 0.0, self.table[:, NORM])


def empty_table(n: int) -> Table:
    """Fingerprints of nothing."""
    return np.full((n, COLUMNS), np.nan)


def turn(inner: Table, a: Table, b: Table) -> Table:
    """(N,) 1 - cos from inner products and norms; NaN where one is zero, missing or not finite."""
    with np.errstate(all="ignore"):
        return np.asarray(1.0 - inner / a / b)


def turn_at(step: StepData, raw: int, j: int) -> Table:
    """(N,) 1 - cos between the unmodified gradients and those of probe j, which is no earlier."""
    before, now = step.probes[raw], step.probes[j]
    inner = now.norm**2 if now.table is before.table else now.table[:, RAW]
    return turn(inner, before.norm, now.norm)


def classify(a: Probe, b: Probe) -> NDArray[np.int64]:
    """(N,) what happened between two probes."""
    code = np.full(len(a.missing), SAME)
    if a.table is b.table:
        return code
    norm_a, norm_b = a.norm, b.norm
    differs = a.hash != b.hash
    with np.errstate(invalid="ignore"):
        turned = ~(turn(b.table[:, PREVIOUS], norm_a, norm_b) <= TURN)
    code[differs] = SCALED
    code[differs & turned] = TURNED
    code[differs & (norm_a == 0) & (norm_b > 0)] = APPEARED
    code[differs & (norm_a > 0) & (norm_b == 0)] = ZEROED
    code[differs & (norm_a == 0) & (norm_b == 0)] = SAME  # None and zero are the same to an optimizer's direction
    code[b.missing & ~a.missing & (norm_a > 0)] = GONE
    code[differs & ~b.missing & ~np.isfinite(norm_b)] = NONFINITE
    return code


@dataclass
class StepData:
    """Everything seen in one optimizer step, on the host.

    Attributes:
        number: 1-based.
        probes: In order of time; empty if the step was not sampled.
        raw: Position of the probe after each backward pass, before any gradient hook.
        entry: (N,) probe at the entry of the innermost optimizer that holds the tensor; -1: none.
        stepped: (N,) how often an optimizer stepped on the gradient.
        expected: (N,) the tensor is trained, or was when the ledger was opened.
        rate_zero: (N,) the learning rate of the tensor's group was 0.
        why: Position of a tensor that takes no part in the forward pass -> why.
        moved: Fingerprints of the parameters at the optimizer's entry and after it.
        left: Fingerprints of the parameters as the step before left them.
        kept: What is left of the way of earlier steps, (N, 2), see watches/kept.py.
        shadow: Position of a sampled tensor -> what `Shadows.after` returns.
        grams: Position of a tensor whose structure is looked at -> inner products of its gradients.
        places: The same -> where in them the gradient of probe j is (absent: it was None), and earlier steps'
            unmodified ones under negative keys, see `structure.Memory`.
        facts: What else goes into the step's row.
        witness: By layer, the ledger's own statistics (see applied.py).
    """

    number: int
    probes: list[Probe]
    raw: list[int]
    entry: NDArray[np.int64]
    stepped: NDArray[np.int64]
    expected: NDArray[np.bool_]
    rate_zero: NDArray[np.bool_]
    why: dict[int, str]
    moved: tuple[Table, Table] | None
    left: Table | None
    kept: Table | None
    shadow: dict[int, list[float]]
    facts: dict[str, Any]
    grams: dict[int, Grams] = field(default_factory=dict)
    places: dict[int, dict[int, int]] = field(default_factory=dict)
    witness: dict[str, dict[str, Any]] = field(default_factory=dict)


def rows(step: StepData, names: list[str], explainer: Explainer | None = None) -> list[dict[str, Any]]:
    """The rows of one step: one of kind `step`, then one of kind `tensor` per tensor with something to tell.

    Args:
        step: The step.
        names: The tensors' names.
        explainer: Names what was applied; it has seen the steps before.
    """
    head: dict[str, Any] = {"kind": "step", "step": step.number, **step.facts}
    if not step.probes or not step.raw:
        tensors = [
            {"kind": "tensor", "step": step.number, "name": names[i], **_shadow(values)}
            for i, values in step.shadow.items()
        ]
        return [head, *tensors] if step.shadow else [head]
    codes = [classify(a, b) for a, b in zip(step.probes, step.probes[1:], strict=False)]
    _name_uniform_scalings(step, codes)
    head["order"] = _order(step)
    head["events"] = _events(step, codes)
    explainer = explainer or Explainer()
    squares = {
        names[i]: g.square(step.places[i][step.raw[-1]])
        for i, g in step.grams.items()
        if step.raw[-1] in step.places[i]
    }
    explainer.see(step.witness, squares)
    return [head, *_tensors(step, codes, names, explainer)]


def _name_uniform_scalings(step: StepData, codes: list[NDArray[np.int64]]) -> None:
    """Clipping, unscaling or averaging written out in a training loop: one factor, at most 1, for all tensors."""
    for j, code in enumerate(codes, 1):
        if step.probes[j].who == LOOP and (code == SCALED).any() and np.isin(code, (SAME, SCALED)).all():
            factor = step.probes[j].norm[code == SCALED] / step.probes[j - 1].norm[code == SCALED]
            if factor.max() <= min(1.0, factor.min() * (1 + UNIFORM)):
                step.probes[j].who = LOOP_SCALING


def _phase(step: StepData, j: int) -> str:
    """Phase of the segment that ends at probe j, for most tensors."""
    held = step.entry[step.entry >= 0]
    entry = int(np.median(held)) if len(held) else len(step.probes)
    if j <= step.raw[-1]:
        return "micro"
    return "before" if j <= entry else "inside" if j == entry + 1 else "late"


def _order(step: StepData) -> str:
    kept: list[str] = []
    for probe in step.probes:
        if not kept or kept[-1] != probe.moment:
            kept.append(probe.moment)
    return " < ".join(kept)


def _events(step: StepData, codes: list[NDArray[np.int64]]) -> list[dict[str, Any]]:
    events = []
    for j, code in enumerate(codes, 1):
        who, changed = step.probes[j].who, code != SAME
        through = who in NOT_MODIFIERS or who in (TENSOR_HOOK, ACCUMULATED_HOOK)
        if step.probes[j].written and not changed.any() and not through and j > step.raw[-1]:
            events.append({"who": who, "phase": _phase(step, j), "changed": 0})
        if who == AUTOGRAD or not changed.any():
            continue
        event: dict[str, Any] = {"who": who, "phase": _phase(step, j), "changed": int(changed.sum())}
        for key, value in (("turned", TURNED), ("zeroed", ZEROED), ("nonfinite", NONFINITE), ("appeared", APPEARED)):
            if (code == value).any():
                event[key] = int((code == value).sum())
        event["gone"] = int((code == GONE).sum())
        a, b = step.probes[j - 1], step.probes[j]
        if (code == SCALED).any():
            factor = b.norm[code == SCALED] / a.norm[code == SCALED]
            event["factor"] = short(float(np.median(factor)))
            event["uniform"] = bool(factor.max() <= factor.min() * (1 + UNIFORM) and (code[changed] == SCALED).all())
        events.append({k: v for k, v in event.items() if v != 0 or k == "changed"})
    return events


def _tensors(
    step: StepData, codes: list[NDArray[np.int64]], names: list[str], explainer: Explainer
) -> list[dict[str, Any]]:
    raw = step.raw[-1]
    # Lists: one number at a time is read from them, which costs an array ten times as much.
    own = {id(p.table): j for j, p in enumerate(step.probes)}
    read = {key: (step.probes[j].hash.tolist(), step.probes[j].norm.tolist()) for key, j in own.items()}
    hashes, norms = ([read[id(p.table)][kind] for p in step.probes] for kind in (0, 1))
    turned_to = {key: turn_at(step, raw, j) for key, j in own.items()}
    angles = np.stack([turned_to[id(p.table)] for p in step.probes[raw:]])
    turns = dict(enumerate(angles.tolist(), raw))
    farthest = np.nan_to_num(angles, nan=-1.0, posinf=-1.0, neginf=-1.0).T.tolist()
    segments_of: dict[int, list[tuple[int, int, str]]] = {}
    for j, code in enumerate(codes):
        for i in np.flatnonzero(code != SAME).tolist():
            segments_of.setdefault(i, []).append((j + 1, int(code[i]), step.probes[j + 1].who))
    never = np.all(np.stack([p.missing for p in step.probes]), axis=0).tolist()
    entries = step.entry.tolist()
    moved = None if step.moved is None else [_all_bits(t) for t in step.moved]
    updates = None if step.moved is None else step.moved[1][:, PREVIOUS].tolist()
    scales = [math.nan] * len(names)
    if step.moved is not None and step.left is not None:
        scales = np.fmax(step.moved[0][:, NORM], step.left[:, NORM]).tolist()
    drifts = [math.nan] * len(names) if step.moved is None else step.moved[0][:, PREVIOUS].tolist()
    out = []
    for i, name in enumerate(names):
        entry = entries[i]
        end = max(entry, raw) if entry >= 0 else len(step.probes) - 1
        if never[i] and not step.expected[i]:
            continue
        row: dict[str, Any] = {"kind": "tensor", "step": step.number, "name": name}
        if i in step.why:
            row["why"] = step.why[i]
        if step.probes[raw].missing[i]:
            row["absent"] = True
        else:
            row["raw"], row["hash_raw"] = short(norms[raw][i]), _hex(hashes[raw][i])
        if entry < 0:
            row["unheld"] = True
        elif not never[i]:
            row["entry"] = short(norms[entry][i])
            if hashes[entry][i] != hashes[raw][i]:
                row["hash_entry"] = _hex(hashes[entry][i])
                row["turn"] = short(turns[entry][i])
        segments = segments_of.get(i, [])
        mine = [(j, c, w) for j, c, w in segments if w not in NOT_MODIFIERS]
        # The unmodified gradient may be seen through hooks first: a probe before them and one after.
        changes = [(j, c, w) for j, c, w in mine if raw < j <= end]
        turned = [j for j, c, w in changes if c in (TURNED, APPEARED)]
        if turned:
            row["turns"] = len(turned)
        far = farthest[i][: end + 1 - raw]
        peak = raw + far.index(max(far))
        if far[peak - raw] > far[-1] + TURN:
            row["written"], row["turn_written"] = short(norms[peak][i]), short(turns[peak][i])
            row["by"] = step.probes[peak].who
        if math.isfinite(norms[raw][i]) and any(c == NONFINITE for j, c, w in changes):
            row["nonfinite"] = True
            row["by"] = next(w for j, c, w in changes if c == NONFINITE)
        if changes:
            row["mods"] = len(changes)
            row.setdefault("by", changes[-1][2])
        if norms[raw][i] > 0 and norms[end][i] == 0:
            row["lost"] = True
        undone = [w for j, c, w in segments if peak < j <= end and c != SCALED]
        scaled_back = [w for j, c, w in segments if peak < j <= end and c == SCALED and w not in NOT_MODIFIERS]
        if ("written" in row or "lost" in row or "nonfinite" in row) and (undone or scaled_back):
            row["undone_by"] = (undone or scaled_back)[-1]
        micro = [(j, w) for j, c, w in mine if j <= raw and c in (TURNED, ZEROED, APPEARED) and w != TENSOR_HOOK]
        cleared = [j for j, c, w in segments if j <= raw and c in (ZEROED, GONE)]
        if micro and cleared and cleared[-1] >= micro[-1][0]:
            j, row["by"] = micro[-1]
            before, after = step.probes[j - 1], step.probes[j]
            changed = turn(after.table[:, PREVIOUS], before.norm, after.norm)[i]
            row["written"], row["turn_written"] = short(norms[j][i]), short(changed)
            row["undone_by"] = "clearing and another backward"
        elif micro:
            row["micro"] = micro[0][1]
        late = [w for j, c, w in mine if entry >= 0 and j > entry + 1 and c in (TURNED, APPEARED, SCALED)]
        if late:
            row["late"] = late[0]
        if updates is not None and moved is not None and entry >= 0:
            row["update"] = short(updates[i])
            if drifts[i] > 0 and scales[i] > 0:
                row["drift"] = short(drifts[i] / scales[i])
            if step.rate_zero[i]:
                row["rate_zero"] = True
            if step.stepped[i] > 1:
                row["stepped"] = int(step.stepped[i])
            row["hash_before"], row["hash_after"] = _hex(moved[0][i]), _hex(moved[1][i])
        if step.kept is not None and math.isfinite(step.kept[i, 0]):
            row["kept"], row["back"] = short(step.kept[i, 0]), short(step.kept[i, 1])
        row |= _shadow(step.shadow.get(i, []))
        if turned and i in step.grams:
            row |= _structure(step.grams[i], step.places[i], raw, end, turned, name, explainer)
            if any(step.raw[0] < j for j in cleared):
                row |= _of_passes(step.grams[i], step.places[i], step.raw, end, turned)
        out.append(row)
    return out


def _structure(
    grams: Grams, places: dict[int, int], raw: int, end: int, turned: list[int], name: str, explainer: Explainer
) -> dict[str, Any]:
    before, first, last = (places.get(j) for j in (raw, turned[0], end))
    if before is None:
        return {}
    row: dict[str, Any] = {}
    operator = None if first is None else grams.fit(before, first)
    if first is not None and operator is not None:
        row = {"fit": operator.residual}
        if operator.determined:
            row |= {"condition": operator.condition, "identity": operator.identity_distance}
            row["positive"] = operator.positive
        second = places.get(turned[1]) if len(turned) > 1 else None
        if second is not None:
            # Against the residual of a mere scaling: near 0, the second change is the first one again.
            scaled = grams.scaling_residual(first, second)
            row["twice"] = grams.scaling_residual(first, second, operator.matrix) / max(scaled, 1e-12)
            if (other := grams.fit(first, second)) is not None and max(other.residual, operator.residual) < 0.1:
                row["alike"] = operator.likeness(other)
    if last is not None and (earlier := sorted(place for j, place in places.items() if j < 0)):
        fits = [grams.fit(places[j], last) for j in (-1, -2)]
        if len(turned) > 1 and (own := grams.fit(before, last)) is not None:
            row["own"] = own.residual
        row["stale"] = min((fit.residual for fit in fits if fit is not None), default=math.nan)
        row["mix"] = grams.mix(last, [before, *earlier])
    row = {k: short(v) for k, v in row.items() if math.isfinite(v)}
    if operator is not None:
        layer, _, rest = name.partition(".lora_")
        row["matrix"] = explainer.explain(name, layer, "A" if "A" in rest.split(".")[0] else "B", operator)
    return row


def _of_passes(
    grams: Grams, places: dict[int, int], raw: list[int], end: int, turned: list[int]
) -> dict[str, float | str]:
    """How far from a mix of the step's passes is what the optimizer found, and the farthest of what came before it.

    Where gradients are cleared between the passes of a step, each pass is raw, and code that adds them up, or takes
    their conflicts out, is no preconditioner.
    """
    passes, last = [places[j] for j in raw if j in places], places.get(end)
    if len(passes) < 2 or last is None:
        return {}
    before = [grams.mix(places[j], passes) for j in turned if places.get(j, last) != last]
    found = {"passes": grams.mix(last, passes), "passed": max(before, default=math.nan)}
    return {k: short(v) for k, v in found.items() if math.isfinite(v)}


def _shadow(values: list[float]) -> dict[str, Any]:
    if not values or not np.isfinite(values[0]):
        return {}
    u, raw, cosine, replay, agreement, reaction, noise, arrived, along, along_raw, orthogonal = values
    row = {"update_exact": u, "update_raw": raw, "update_turn": 1 - cosine, "replay": replay, "reaction": reaction}
    row |= {"replay_turn": 1 - agreement, "noise": noise, "arrived": arrived}
    row |= {"along": along, "along_raw": along_raw, "factor_turn": 1 - orthogonal}
    return {k: short(v) for k, v in row.items() if np.isfinite(v)}


def _all_bits(table: Table) -> list[int]:
    bits: list[int] = np.ascontiguousarray(table[:, 0]).view(np.int64).tolist()
    return bits


def hexes(table: Table) -> list[str]:
    """The hash column, as rows show it."""
    return [_hex(value) for value in _all_bits(table)]


def _hex(value: int) -> str:
    # Both halves: a sign changes the upper ones alone.
    return f"{(int(value) ^ int(value) >> 32) & 0xFFFFFFFF:08x}"


def short(value: float) -> float | str:
    """Five significant digits; JSON has no non-finite numbers."""
    return float(f"{value:.5g}") if math.isfinite(value) else str(float(value))
