"""Claims and options as a page of documentation: `python -m grit_impl.verify.claims.document docs/claims.md`."""

from __future__ import annotations

import sys
from dataclasses import fields
from itertools import groupby

from grit_impl.record import write_atomic
from grit_impl.settings import flag, shown
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

OPTIONS = """
## Options

Each is an option of pytest (`--grit-min-retention` is the same as `--min-retention`), and `grit_min_retention` in the
configuration file of pytest.

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
    parts.append(OPTIONS)
    for each in fields(Options):
        default = "off" if isinstance(each.default, bool) else shown(each)
        parts.append(f"| `{flag(each.name)}` | {default} | {each.metadata['help']} |\n")
    return "".join(parts)


if __name__ == "__main__":
    write_atomic(sys.argv[1], document())
