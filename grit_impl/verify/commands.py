"""`grit verify`, `grit report` and `grit baseline`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grit_impl.errors import GRITError
from grit_impl.settings import click_options
from grit_impl.verify.claims import Claim, Evidence, Judgement, catalogue
from grit_impl.verify.options import Options
from grit_impl.verify.store.database import Database, JudgedClaim, Session

if TYPE_CHECKING:
    from grit_impl.verify.store.history import Answers

HELP = {"help_option_names": ["-h", "--help"]}
REPORTS = click_options(Options, "reports_dir")


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF PYTEST]")
def verify(arguments: tuple[str, ...]) -> None:
    """Train, export, evaluate and judge: pytest on the suites, with pytest's options and the group 'grit' of them.

    `grit verify -k gradients --steps 50` trains and judges only what these claims need.
    """
    suites = Path("suites")
    if not suites.is_dir():
        raise GRITError("no folder suites/ here; run this in the project's root, or pytest on tests of your own")
    given = [] if "-m" in arguments else ["-m", "verify and not gpu"]
    command = [sys.executable, "-m", "pytest", str(suites), *given, *arguments]
    sys.exit(subprocess.run(command).returncode)


@click.command(context_settings=HELP)
@REPORTS
@click.option("--session", "name", default=None, help="Session to report: a number or a label.  [default: the latest]")
@click.option("--against", default=None, metavar="REV|RUN|baseline", help="Show what changed since that session.")
@click.option("--fail-if-worse", is_flag=True, help="Exit with status 1 if a claim lost its support.")
def report(reports_dir: Path, name: str | None, against: str | None, fail_if_worse: bool) -> None:
    """Write index.html and grit_evaluation.md again from what is stored; judge nothing anew.

    --against takes a session's number, a git revision, or `baseline`; with a path to another reports folder, its
    latest session. Where both sessions kept answers, models are compared item by item (McNemar).
    """
    from grit_impl.verify.report import write_report
    from grit_impl.verify.store.history import compare_items, compare_sessions, find_session

    with Database(reports_dir / "results.db", readonly=True) as store:
        number = find_session(store, name or _latest(store))
        session, judged, evidence = load_session(store, number, reports_dir)
        changes = None
        if against is not None:
            after = {each.claim.id: each.judgement for each in judged}
            title, before, answers = _other(store, against)
            changes = compare_sessions(title, before, after, compare_items(answers, store.answers(number)))
    path = write_report(reports_dir, session, judged, evidence, changes)
    for row in changes.rows if changes else ():
        click.echo(f"{row.claim}: {row.text}")
    if changes and not changes.rows:
        click.echo(f"no claim changed against {changes.name}")
    for item in changes.items if changes else ():
        if item.gained or item.lost:
            click.echo(str(item))
    click.echo(f"report: {path}")
    if fail_if_worse and changes and changes.worse:
        sys.exit(1)


def _latest(store: Database) -> str:
    sessions = store.sessions()
    if not sessions:
        raise GRITError(f"{store.path} has no session yet; run the verification first")
    return str(sessions[-1]["id"])


def _other(store: Database, name: str) -> tuple[str, dict[str, Judgement], Answers]:
    from grit_impl.verify.store.history import find_session

    folder = Path(name)
    if (folder / "results.db").is_file():
        with Database(folder / "results.db", readonly=True) as other:
            number = int(_latest(other))
            return f"{name}, session {number}", other.judged(number), other.answers(number)
    number = find_session(store, name)
    title = f"{name} (session {number})" if name != str(number) else f"session {name}"
    return title, store.judged(number), store.answers(number)


def load_session(store: Database, number: int, folder: Path) -> tuple[Session, list[JudgedClaim], Evidence]:
    """A stored session with its claims, and the evidence that still lies in `folder`."""
    from grit_impl.verify.evidence.stored import stored_evidence

    row = next(row for row in store.sessions() if row["id"] == number)
    options = json.loads(row["options"])
    environment = {r["name"]: r["value"] for r in store.query("SELECT * FROM environment WHERE session_id = ?", number)}
    session = Session(row["started"], row["finished"], row["git_commit"], options, environment, row["exit_status"])
    claims = {r["id"]: r for r in store.query("SELECT * FROM claims")}
    judged = [JudgedClaim(_claim(claims[name]), each) for name, each in store.judged(number).items()]
    evaluation = store.query("SELECT path FROM artifacts WHERE session_id = ? AND kind = 'evaluation'", number)
    requires = {need for each in judged for need in each.claim.requires}
    known = Options.parse({key: value for key, value in options.items() if key in Options.__dataclass_fields__})
    where = Path(evaluation[0]["path"]).parent if evaluation else None
    return session, judged, stored_evidence(replace(known, reports_dir=folder), requires, where)


def _claim(row: Any) -> Claim:
    found = catalogue().get(row["id"])
    decide = found.decide if found else _gone
    return Claim(
        row["id"], row["statement"], tuple(json.loads(row["requires"])), row["rationale"], decide, bool(row["gates"])
    )


def _gone(_: Evidence) -> Judgement:
    raise GRITError("this claim is no longer in the catalogue")


@click.group(context_settings=HELP)
def baseline() -> None:
    """The results that later ones are compared with."""


@baseline.command()
@REPORTS
@click.argument("session", required=False)
@click.option("--force", is_flag=True, help="Promote it although a gating claim is not supported.")
def promote(reports_dir: Path, session: str | None, force: bool) -> None:
    """Make SESSION (default: the latest) the baseline; a number, a label or a git revision."""
    from grit_impl.verify.store.history import BASELINE, find_session

    with Database(reports_dir / "results.db") as store:
        number = find_session(store, session or _latest(store))
        gates = {row["id"]: row["gates"] for row in store.query("SELECT id, gates FROM claims")}
        judged = store.judged(number)
        doubtful = [name for name, each in judged.items() if gates[name] and each.verdict != "supported"]
        if doubtful and not force:
            raise GRITError(
                f"session {number} is no baseline: {', '.join(doubtful)} not supported; --force promotes it anyway"
            )
        store.label(number, BASELINE)
    click.echo(f"session {number} is the baseline now")


@baseline.command("show")
@REPORTS
def show(reports_dir: Path) -> None:
    """Say which session is the baseline."""
    from grit_impl.verify.store.history import BASELINE, find_session

    with Database(reports_dir / "results.db", readonly=True) as store:
        number = find_session(store, BASELINE)
        row = next(row for row in store.sessions() if row["id"] == number)
    click.echo(f"session {number}, {row['finished']}, commit {row['git_commit'] or 'unknown'}")
