"""Run a blind round: cases by somebody who had read neither detectors nor zoo, committed before their first run.

    python tests/zoo/blind.py 1 [NAME ...] [--json FILE]     # the table of round 1, or of some of its cases

A fault is named rightly if the verdict has one of the causes that the case accepts, or names the link that broke first
according to the case. A sound run is judged rightly if the verdict is the expected one; `undecided` counts apart from
misjudged. A training is harmed if it ends with an exception under the ledger.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from grit_impl import gradient_ledger, judge
from grit_impl.statistics.intervals import wilson

UNDECIDED = ("undecided", "update-unexplained", "partly-seen")


def run_case(case: Any) -> dict[str, Any]:
    """One case under the ledger: what was expected, what was said."""
    opened: list[Any] = []

    def observe(model: torch.nn.Module) -> Any:
        opened.append(gradient_ledger(model))
        return _Kept(opened)

    row: dict[str, Any] = {"name": case.name, "kind": case.kind, "link": case.link, "causes": list(case.causes)}
    try:
        case.run(observe)
        verdict = judge(opened[-1])
    except Exception as error:
        return {
            **row,
            "cause": "harmed",
            "said_link": None,
            "summary": f"{type(error).__name__}: {error}",
            "right": False,
        }
    link = getattr(verdict, "link", None)
    named = verdict.cause in case.causes or (case.kind == "fault" and case.link is not None and link == case.link)
    return {**row, "cause": verdict.cause, "said_link": link, "summary": verdict.summary, "right": named}


class _Kept:
    """The ledger's context, which leaves the ledger behind for the judge."""

    def __init__(self, opened: list[Any]) -> None:
        self._opened, self._manager = opened, opened[-1]

    def __enter__(self) -> Any:
        self._opened[-1] = self._manager.__enter__()
        return self._opened[-1]

    def __exit__(self, *what: Any) -> Any:
        return self._manager.__exit__(*what)


def summary(rows: list[dict[str, Any]]) -> str:
    """Shares with their Wilson intervals."""
    faults, sound = ([r for r in rows if r["kind"] == kind] for kind in ("fault", "sound"))
    right = sum(r["right"] for r in faults)
    by_cause = sum(r["cause"] in r["causes"] for r in faults)
    unseen = Counter(r["cause"] for r in faults if r["cause"] in ("effective", "no-modifier"))
    wrong = [r for r in sound if not r["right"] and r["cause"] not in UNDECIDED]
    open_ = [r for r in sound if r["cause"] in UNDECIDED]
    lines = []
    for text, k, n in (
        ("faults named rightly", right, len(faults)),
        ("  by cause", by_cause, len(faults)),
        ("  called effective", unseen["effective"], len(faults)),
        ("  called no-modifier", unseen["no-modifier"], len(faults)),
        ("sound runs misjudged", len(wrong), len(sound)),
        ("  undecided", len(open_), len(sound)),
        ("trainings harmed", sum(r["cause"] == "harmed" for r in rows), len(rows)),
    ):
        if n:
            interval = wilson(k, n)
            lines.append(f"{text:24} {k:3} of {n:3}  {k / n:6.1%} [{interval.low:.1%}, {interval.high:.1%}]")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("round")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    cases = importlib.import_module(f"blind_round{options.round}").CASES
    rows = []
    for case in cases:
        if options.names and case.name not in options.names:
            continue
        rows.append(run_case(case))
        if not rows[-1]["right"]:
            said = f"{rows[-1]['cause']} / {rows[-1]['said_link']}"
            print(f"{case.kind:5} {case.name:45} want {case.causes[0]} / {case.link}; said {said}", flush=True)
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    main()
