"""Claims and options as a page of documentation: `python -m grit_impl.verify.claims.document docs/claims.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import groupby
from typing import Any

from grit_impl.files import FIXTURES
from grit_impl.record import write_atomic
from grit_impl.settings import flag, shown
from grit_impl.statistics.intervals import wilson
from grit_impl.verify.claims import catalogue
from grit_impl.verify.options import Options

HEAD = """# Claims

Generated from `grit_impl/verify/claims/` and `grit_impl/verify/options.py`; edit there, then run
`python -m grit_impl.verify.claims.document docs/claims.md`.

A claim is judged on evidence (run records, gradient ledgers, exports, an evaluation) as one of **supported**,
**refuted**, **inconclusive** (with the sample size that would decide it) or **not exercised** (with the reason).
A *gate* must hold: refuted, it fails its test; open, it is skipped, or fails under `--strict-claims`. A *hypothesis*
is reported, and gates only under `--gate-hypotheses`. Where a number has an interval, the interval decides: all of it
on the right side of the bound supports, all of it on the wrong side refutes, anything else is inconclusive.
"""

BLIND = """
## How far the ledger's verdicts can be trusted

Blind rounds: cases by somebody who had read the vocabulary of causes and the libraries, but neither detectors nor zoo,
committed with their expectations before their first run (`tests/zoo/blind_round1.py` to `blind_round5.py`; all rows
are in `fixtures/blind_rounds.json`). A fault is named rightly by one of the causes that the case accepts or by the
link that broke first. *Before* is, in the first two rounds, the list of detectors that the chain of links has replaced,
and after that the chain as it was before what the rounds until then had missed was mended. At least 95% of the faults
and at most 1% of the sound runs were asked for: missed in all five, by 4 points and 1.9 points in the last. Intervals:
Wilson, 95%.

| round | | before | first contact |
|---|---|---|---|
"""

SINCE = """
What the first two rounds had missed was mended since, kind by kind; their cases are tests now
(`tests/zoo/test_blind_rounds.py`), and say nothing more about cases that nobody has seen. The kinds: weights that were
swapped for averages and not swapped back; updates that follow the raw gradient, in optimizers that cannot be replayed;
one matrix, or one hook, applied twice within one callback; a gradient put back within the code that turned it, or
recomputed by a closure; a filter's average written over it; gradients turned after a step inside backward or in a
post-hook; a lag of one or two steps, also where gradients are short of rank; every other step left as it was; adapters
that are off during the forward pass alone; models in which nothing is trained; an optimizer that holds tensors and
never steps; hooks that only read.

Of the third round's misses two were failures of the ledger itself: a rank that changes in mid-run, and adapters without
matrices. The others, too, are mended by kind: an optimizer that holds other tensors than the model's is followed by the
memory that they share, or by shape and value (masters, copies, parts of a flat buffer); gradients of function
transforms and of copies are raw gradients, and a copy that stays as it was is named; code that goes over the gradients
twice in a step is seen at work, whatever its second matrix is made of; what stands aside of the raw gradient and is far
larger is blown up at any size; a number in the place of a matrix is that, whoever divides it out; adapters that are
trained in turn are no break. One thing is as the cases' authors wanted it, not as AdamW takes it: a gradient ten
thousand times as large is called blown up although AdamW divides a constant factor out; the sentence says how large the
updates are.

The fourth round missed a result handed back one batch late where the matrix was seen at work, updates scaled to next to
nothing or B clipped by its own norm of zero, a matrix that Muon divides out but for the error of its iteration, factors
that take turns to be trained, and, after other runs in one process, hooks that another model had left behind. All are
mended by kind; and a run of one or two steps, in which A has no gradient yet because B is zero, says so, and is no
fault.

The fifth round, whose cases are the widest so far, missed one gradient that was written to several tensors, an average
so slow that it has nothing of the present gradient, one number of a million under AdamW, clipping by value to nothing,
one optimizer stepped twice in place of another, and small square tensors that autograd keeps, which were taken for a
preconditioner's statistics. These are mended by kind, and so is the worst of them: several tasks' gradients, cleared
between their backward passes and put together by the loop, were called effective in plain training too; they are raw
gradients now, and what is mixed of them after a matrix has overwritten it. On the way it was found that the ledger's
hash of a tensor added up signs so that two could cancel; it does not any more.

Left as they are, of the fifth round: a preconditioner that writes every gradient back as it was, and of whose hooks
nothing is left, is called plain training, for so is a loop that divides by one process (three cases; the sentence says
who wrote); and tensors that are frozen for good in mid-run are called a fault, where the case's author had frozen them
on purpose (one case).

Known to be open: gradients of samples that `torch.func.vmap` has made and a loop has averaged are not followed
(undecided); the update of an optimizer that holds parts of a flat buffer is not replayed, and said so; adapters of
rank 1 have no directions, so that their preconditioner is a number and is called that; a tensor of one element can be
turned by its sign alone. A composition of two matrices by one function that goes over all gradients twice, with
matrices alike, is taken for the same one applied twice.
"""

OPTIONS = """
## Options

Each is an option of pytest and a key of its configuration file: `--min-retention` here, `--grit-min-retention` in other
projects, whose own options may have such names (`grit_short_names = true` offers both), and `grit_min_retention` in the
file.

| option | default | sets |
|---|---|---|
"""


def document() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for family, claims in groupby(catalogue().values(), key=lambda claim: claim.family):
        module = sys.modules[f"grit_impl.verify.claims.{family}"]
        parts.append(f"\n## {family}\n\n{(module.__doc__ or '').strip()}\n")
        for claim in claims:
            kind = "gate" if claim.gates else "hypothesis"
            parts.append(f"\n### `{claim.id}` ({kind})\n\n{claim.statement}\n\n{claim.rationale}\n\n")
            parts.append(f"Needs: {', '.join(f'`{requirement}`' for requirement in claim.requires)}\n")
    parts += [BLIND, *_blind_rounds(), SINCE, OPTIONS]
    for each in fields(Options):
        default = "off" if isinstance(each.default, bool) else shown(each)
        parts.append(f"| `{flag(each.name)}` | {default} | {each.metadata['help']} |\n")
    return "".join(parts)


def _blind_rounds() -> Iterator[str]:
    for each in json.loads((FIXTURES / "blind_rounds.json").read_text())["rounds"]:
        rows = each["rows"]
        faults, sound = ([row for row in rows if row["kind"] == kind] for kind in ("fault", "sound"))
        made = f"cases {each['cases']}, detectors {each['before']}, chain {each['judged']}"
        name = f"{each['round']}, {each['date']}: {made}"
        for what, group, before, after in (
            ("faults named rightly", faults, "before_right", "right"),
            ("faults called `effective`", faults, ("before", "effective"), ("said", "effective")),
            ("sound runs misjudged", sound, ("before_right", False), ("right", False)),
            ("runs ended by the ledger", rows, ("before", "harmed"), ("said", "harmed")),
        ):
            yield f"| {name} | {what} | {_share(group, before)} | {_share(group, after)} |\n"
            name = ""


def _share(rows: list[dict[str, Any]], what: str | tuple[str, Any]) -> str:
    """How many rows have this value (True where none is given), of how many, with the interval."""
    key, wanted = (what, True) if isinstance(what, str) else what
    found = sum(row[key] == wanted for row in rows)
    interval = wilson(found, len(rows))
    return f"{found} of {len(rows)}, {found / len(rows):.1%} [{interval.low:.1%}, {interval.high:.1%}]"


if __name__ == "__main__":
    write_atomic(sys.argv[1], document())
