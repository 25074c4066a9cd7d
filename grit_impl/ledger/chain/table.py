"""Every link for every tensor and step: held, broken, or not seen. What the chain's table and picture are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.ledger.chain.effect import follows
from grit_impl.ledger.chain.links import LINKS, REPLAYED, SAME_UPDATE
from grit_impl.ledger.chain.words import number, of_all
from grit_impl.ledger.findings import AWAY, Facts, transitions, waiting
from grit_impl.ledger.timeline import TURN


@dataclass(frozen=True)
class LinkRow:
    """One link of the chain.

    Attributes:
        link: Its name.
        held: Tensor-steps in which it was seen to hold.
        seen: Tensor-steps in which it was looked at.
        first: The first step in which it was broken, or None.
        who: Where it was broken, in words; empty if nowhere.
    """

    link: str
    held: int
    seen: int
    first: int | None = None
    who: str = ""


def states(f: Facts) -> pd.DataFrame:
    """A column per link, 1 (held), 0 (broken) or NaN (not seen, or nothing to see), for each row of `f.tensors`."""
    t = f.tensors
    nan, modified = pd.Series(np.nan, t.index), bool(len(f.touched)) or bool((t.turn_written > TURN).any())
    arrived = (t.raw > 0) & np.isfinite(t.raw)
    written = (t.turn > TURN) & (t.mods > 0) | (t.turn_written > TURN)
    late = t.late.notna() & ~t.bent
    begun = (
        t.live
        & ~t.name.isin(f.vectors)
        & (t.step >= min(f.start, float(t[written | late].step.min()) if (written | late).any() else np.inf))
    )
    table = pd.DataFrame(index=t.index)
    table["used"] = nan.mask(arrived, 1.0).mask(t.why.notna() & (t.why != "frozen"), 0.0)
    table["arrived"] = arrived.astype(float)
    table["read"] = nan.mask(written | late, 1.0)
    if f.modifier_known and not modified and not late.any():
        calls = {s["step"]: s.get("module_calls") for s in f.steps}
        table["read"] = nan.mask(t.live, (t.step.map(calls).astype(float) > 0).astype(float))
    table["turned"] = nan.mask(begun | (t.mods > 0), (written | late).astype(float)).mask(t.turn > AWAY, 0.0)
    gone = t.lost | t.micro.notna() | late | (written & ~(t.turn > TURN)) | t.unheld
    table["delivered"] = nan.mask(arrived & (t.entry.notna() | t.unheld), (~gone).astype(float))
    known = t.replay.notna() & t.live
    agrees = (t.replay <= REPLAYED) | (t.replay_turn < SAME_UPDATE)
    same = t.bent & (t.update_turn < SAME_UPDATE)
    table["consumed"] = nan.mask(known & (agrees | (not f.most("foreign"))), (agrees & ~same).astype(float))
    table["moved"] = nan.mask(t.hash_after.notna() & arrived, (t.hash_before != t.hash_after).astype(float))
    rows, moved, later = transitions(f)
    undone = (later == rows.hash_before) & moved
    table["kept"] = nan.mask(later.notna().reindex(t.index, fill_value=False) & arrived, 1.0)
    table["kept"] = table.kept.mask(undone.reindex(t.index, fill_value=False), 0.0)
    return table


def chain_of(f: Facts) -> tuple[LinkRow, ...]:
    """The table: one row per link; the last one counts tensors that are the same at the end as before."""
    table, out = states(f), []
    for link in LINKS[:-1]:
        column = table[link]
        broken = f.tensors[column == 0]
        first = int(broken.step.min()) if len(broken) else None
        who = of_all(broken.name.unique(), f) if len(broken) else ""
        out.append(LinkRow(link, int((column == 1).sum()), int(column.notna().sum()), first, who))
    started = f.live[(f.live.step >= f.start) & ~f.live.name.isin(f.vectors)]
    if len(started):
        last = started.step.max() - max(1, (started.step.max() - f.start) // 10)
        ends = started[started.step >= last].groupby("name").bent.any()
        missing = list(ends[~ends].index)
        who = of_all(missing, f) if missing else ""
        first = int(f.bent.step.max()) + 1 if missing else None
        out.append(LinkRow(LINKS[-1], int(ends.sum()), len(ends), first, who))
    else:
        out.append(LinkRow(LINKS[-1], 0, 0))
    return tuple(out)


def custody(f: Facts) -> list[tuple[int, int, list[tuple[int, int, str]]]]:
    """The picture: tensors by steps, by the first link that broke.

    Returns:
        (first row, rows, spans) of neighbouring tensors to which the same happened; a span is (first step, steps,
        what): a link, "held" or "unmodified".
    """
    table = states(f)
    broken = (table == 0).to_numpy()
    what = np.where(broken.any(1), np.array(LINKS)[broken.argmax(1)], np.where(table.turned == 1, "held", "unmodified"))
    if not (len(f.touched) or (table.turned == 1).any()):  # where nobody modifies, nothing fails to be modified
        what = np.where(what == "turned", "unmodified", what)
    seen = pd.DataFrame({"name": f.tensors.name, "step": f.tensors.step.astype(int), "what": what})
    rows: list[tuple[int, int, list[tuple[int, int, str]]]] = []
    for _, group in seen.groupby("name", sort=False):
        spans: list[tuple[int, int, str]] = []
        for step, state in zip(group.step, group.what, strict=True):
            if spans and spans[-1][2] == state and spans[-1][0] + spans[-1][1] == step:
                spans[-1] = (spans[-1][0], spans[-1][1] + 1, state)
            else:
                spans.append((step, 1, state))
        if rows and rows[-1][2] == spans:
            rows[-1] = (rows[-1][0], rows[-1][1] + 1, spans)
        else:
            rows.append((rows[-1][0] + rows[-1][1] if rows else 0, 1, spans))
    return rows


def unmoved(f: Facts) -> str:
    """Of which tensors no gradient could be seen, because their partners were zero until then; empty: of none."""
    names = set(f.tensors[waiting(f)].name) - set(f.live.name)
    sides = " and ".join(sorted(set(f.tensors[f.tensors.name.isin(names)].group)))
    return f"{of_all(names, f)} (too few steps to see {sides}: the other factor was zero until then)" if names else ""


def not_checked(f: Facts, chain: tuple[LinkRow, ...]) -> list[str]:
    """Links that nobody could see, and why, for a run in which something is modified."""
    seen, out = {row.link: row.seen for row in chain}, []
    if not seen["consumed"]:
        problem = next((s["shadow_problem"] for s in f.steps if s.get("shadow_problem")), None)
        optimizer = next((s["optimizer"] for s in f.steps if s.get("optimizer")), "the optimizer")
        text = problem or f"the update of {optimizer} was not replayed"
        if lead := follows(f):
            text += f" (it follows the modified gradients more than the raw ones, by {lead:.2g} of a cosine)"
        out.append(text)
    if not seen["moved"]:
        out.append("whether the parameters moved")
    if not seen["kept"]:
        out.append("whether the weights were kept")
    if late := unmoved(f):
        out.append(late)
    unsampled = len(f.steps) - f.tensors[f.tensors.hash_raw.notna()].step.nunique()
    if unsampled > 0:
        out.append(f"{number(unsampled, 'step')} in which only the sample was followed")
    if unwatched := f.run.get("unwatched"):
        out.append(f"{number(int(unwatched), 'tensor')} beyond the ledger's size")
    return out
