"""What `grit evaluate` prints, and its thresholds as JUnit XML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import click

from grit_impl.evaluate.gates import Gate
from grit_impl.evaluate.results import ANSWERED, Evaluation

Row = dict[str, Any]
SHOWN = 3
"""Answers of the base that are shown before the full run."""


def show_first(rows: Sequence[Row]) -> None:
    """The base's first answers, so that a wrong prompt or scorer is seen before the full run, and a warning if most
    of them say nothing that the scorer can read."""
    right, unread = sum(bool(row["correct"]) for row in rows), sum(row["scores"]["unparsable"] for row in rows)
    click.echo(f"base on the first {len(rows)} questions: {right} right, {unread} that answer nothing")
    for row in rows[:SHOWN]:
        verdict = "right" if row["correct"] else row["scores"]["note"] if row["scores"]["unparsable"] else "wrong"
        click.echo(f"  {_brief(row['prompt'])} -> {_brief(row['answer'])} ({verdict})")
    if 2 * unread > len(rows):
        click.echo(
            f"warning: {unread} of {len(rows)} answers say nothing that the scorer can read: "
            "see --scorer, --prompt, --system, --answer-format, --max-tokens",
            err=True,
        )


def show(evaluation: Evaluation, gates: Iterable[Gate]) -> None:
    """The table, what could not be read, the thresholds, and who is best."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    task = evaluation.aqi_metric == ANSWERED
    titles = ("accuracy %", "delta points") if task else ("AQI accuracy %", "delta_AQI points")
    table = Table("model", *titles, "retention %", "changed", "tokens/s", "delta_speed %")
    for label, each in evaluation.metrics.items():
        first, noise = (each.aqi_accuracy, each.delta_aqi, each.retention), evaluation.noise(label)
        changed = f"{noise.changed} of {noise.asked}" if noise.asked else "-"
        speed = (each.tokens_per_second, each.delta_speed)
        table.add_row(label, *map(_cell, first), changed, *map(_cell, speed))
    console.print(table)
    # Not through the console, which would break the lines.
    for label, each in evaluation.metrics.items():
        if each.unparsable:
            reasons = ", ".join(f"{count} {reason}" for reason, count in each.unparsable.items())
            click.echo(f"{label}: unparsable answers: {reasons}")
        if each.cut:
            click.echo(f"{label}: answers cut at the token limit: {each.cut}")
        errors = Counter(row["error"] for row in evaluation.answers if row["label"] == label and row.get("error"))
        for why, count in errors.most_common(1):
            click.echo(f"{label}: {errors.total()} questions without an answer, {count} of them because: {why}")
    for name, found in evaluation.noises().items():
        click.echo(f"{name or 'server'}: {found.told(name)}")
    for note in evaluation.meta["notes"]:
        click.echo(f"note: {note}")
    for gate in gates:
        click.echo(f"{gate.judgement.verdict:13} {gate.judgement.summary}")
    click.echo(evaluation.winner()[1])


def junit_xml(gates: Sequence[Gate]) -> str:
    """One test case per threshold and model: a refuted one fails, an undecided one is skipped with its reason."""
    verdicts = [gate.judgement.verdict for gate in gates]
    undecided = sum(verdict in ("inconclusive", "not exercised") for verdict in verdicts)
    counts = {"tests": len(gates), "failures": verdicts.count("refuted"), "errors": 0, "skipped": undecided}
    root = ET.Element("testsuites")
    suite = ET.SubElement(root, "testsuite", {"name": "grit.evaluate", **{k: str(v) for k, v in counts.items()}})
    for gate in gates:
        case = ET.SubElement(suite, "testcase", {"classname": f"evaluate.{gate.label}", "name": gate.name, "time": "0"})
        if gate.judgement.verdict == "refuted":
            ET.SubElement(case, "failure", {"message": gate.judgement.summary})
        elif gate.judgement.verdict != "supported":
            ET.SubElement(case, "skipped", {"message": f"{gate.judgement.verdict}: {gate.judgement.summary}"})
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _brief(text: str, most: int = 70) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= most else f"{line[: most - 3]}...")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value.estimate:.1f} [{value.low:.1f}, {value.high:.1f}]"
