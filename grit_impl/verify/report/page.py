"""The report's two pages, from their templates: HTML for a browser, Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from grit_impl.verify.claims import Evidence
from grit_impl.verify.report import answer, content
from grit_impl.verify.store.database import JudgedClaim, Session

_FAULTS = (
    "Every known way to lose a gradient, planted on purpose: {named} of {fault_runs} runs with a fault were named "
    "right, {flagged} of {sound_runs} sound ones were flagged."
)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("grit_impl.verify.report", "."),
        autoescape=jinja2.select_autoescape(["html.j2", "html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _common(
    session: Session, judged: Sequence[JudgedClaim], evidence: Evidence, folder: Path, changes: Any
) -> dict[str, Any]:
    columns, rows = content.metrics_table(evidence)
    winner = evidence.evaluation.winner()[1] if evidence.evaluation is not None else ""
    arms = answer.arms(evidence, judged)
    return {
        "session": session,
        "arms": arms,
        "sentence": answer.sentence(arms),
        "models": answer.models(evidence, judged),
        "headline": content.headline(judged),
        "counts": content.counts(judged),
        "judged": judged,
        "columns": columns,
        "rows": rows,
        "seed_rows": content.seed_rows(judged),
        "primary": content.primary_accuracy(evidence),
        "groups": content.group_tables(evidence),
        "winner": winner,
        "records": evidence.records,
        "changes": changes,
        "faults": content.fault_matrix(folder),
        "metric_rows": content.metric_rows,
        "evidence_text": content.evidence_text,
    }


def render_html(
    session: Session, judged: Sequence[JudgedClaim], evidence: Evidence, folder: Path, changes: Any = None
) -> str:
    """The page."""
    drawn, accuracy = [], None
    values = _common(session, judged, evidence, folder, changes)
    if evidence.records or evidence.evaluation is not None:
        from grit_impl.verify.report.figures import accuracies, figures

        drawn, accuracy = figures(evidence), accuracies(evidence)
    if values["faults"]:
        from grit_impl.verify.report.figures import confusion

        drawn.append(
            {
                "svg": confusion(values["faults"]["confusion"]),
                "title": "Fault zoo",
                "caption": _FAULTS.format(**values["faults"]),
            }
        )
    cost = content.performance(folder)
    growths = [each for each in cost["figures"] if each.growth is not None] if cost else []
    plots = []
    if growths:
        from grit_impl.verify.report.figures import growth

        plots = [growth(each, f"growth-{i}") for i, each in enumerate(growths)]
    values |= {"figures": drawn, "cost": cost, "plots": plots, "accuracy": accuracy}
    values |= {"stored": answer.stored_answers(evidence)}
    values |= {"answering": list(evidence.evaluation.models) if evidence.evaluation is not None else []}
    return _environment().get_template("index.html.j2").render(**values, contents=_contents(values))


def _contents(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sections that the page has: anchor and title."""
    sections = (
        ("claims", "Claims", True),
        ("changes", "Changes", values["changes"]),
        ("models", "Models", values["rows"]),
        ("groups", "By group", values["groups"]),
        ("seeds", "Seeds", values["seed_rows"]),
        ("figures", "Figures", values["figures"]),
        ("answers", "Answers", values["stored"]),
        ("cost", "Cost", values["cost"]),
        ("runs", "Runs", values["records"]),
        ("environment", "Environment", True),
    )
    return [(id, title) for id, title, there in sections if there]


def render_markdown(
    session: Session, judged: Sequence[JudgedClaim], evidence: Evidence, folder: Path, changes: Any = None
) -> str:
    """The summary for a pull request: GitHub-flavoured Markdown, no figures."""
    values = _common(session, judged, evidence, folder, changes)
    return _environment().get_template("grit_evaluation.md.j2").render(**values)
