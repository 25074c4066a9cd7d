"""`grit compare`: two trainings that already exist, from their logs. Heavy imports stay inside; torch is not needed."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grit_impl.curves.names import existing
from grit_impl.errors import GRITError

if TYPE_CHECKING:
    from grit_impl.curves.logs import RunLog
    from grit_impl.curves.result import CurveComparison
    from grit_impl.ledger.verdict import Verdict


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, metavar="[A B]")
@click.option(
    "--rerun",
    "reruns",
    multiple=True,
    metavar="RUN",
    help="A trained again: the noise floor. Repeatable; 3 are best.",
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    metavar="RUN",
    help="Another run on the same batches (their difficulty), e.g. of another optimizer. Repeatable.",
)
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="NAME=DIR",
    help="A run of an arm, or a quoted pattern of several. Repeatable; the first arm is the reference.",
)
@click.option("--loss", metavar="NAME", help="Column, tag or metric of the training loss, where its name is unusual.")
@click.option("--until", type=click.IntRange(min=1), help="Ignore everything after this step.")
@click.option(
    "--first-update",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Step of the first update that can differ (the first preconditioned one).",
)
@click.option("--anyway", is_flag=True, help="Go on where the comparison is not fair; the report says so.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--html", "html_out", type=click.Path(path_type=Path, dir_okay=False), help="Write a self-contained page."
)
@click.option("--plot", "plot_out", type=click.Path(path_type=Path, dir_okay=False), help="Write the plots as one SVG.")
def compare(
    runs: tuple[str, ...],
    reruns: tuple[str, ...],
    references: tuple[str, ...],
    arms: tuple[str, ...],
    loss: str | None,
    until: int | None,
    first_update: int,
    anyway: bool,
    as_json: bool,
    html_out: Path | None,
    plot_out: Path | None,
) -> None:
    """Compare two trainings by their logs: are they comparable, the same, decorrelated, and is one better?

    A run is a TensorBoard folder or event file, a trainer_state.json or the output folder it lies in, LLaMA-Factory's
    trainer_log.jsonl, Lightning's metrics.csv, MLflow's run folder, a CSV or JSONL with columns step and loss
    (grad_norm, learning_rate, tokens if there), or a run record of grit. FILE::RUN is one of several runs in a table,
    such as wandb's CSV export.

    \b
      grit compare out/lora out/grit --rerun out/lora-again
      grit compare wandb.csv::lora wandb.csv::grit
      grit compare --arm "lora=runs/lora-seed*" --arm "grit=runs/grit-seed*" --html grit.html

    Two curves on the same batches correlate whatever the optimizers do, so correlation is described and never
    decides. What decides "same or different" is the paired difference against the difference between reruns: train
    one arm twice. What decides "better" is several seeds per arm, at least 7. Two run records with gradient ledgers are
    compared tensor by tensor as well, which curves cannot do.

    Exit status: 0 answered, 1 refused as incomparable, 2 unusable input.
    """
    if arms and (runs or reruns or references):
        raise GRITError("give either two runs (with --rerun, --reference) or --arm options, not both")
    if not arms and len(runs) != 2:
        for run in runs[:1]:
            _read(run, until=until, loss=loss)  # if it holds several runs, that is the better message
        raise GRITError(f"grit compare takes two runs, A and B, got {len(runs)}; see `grit compare --help`")
    named = _named(arms)
    for path in (*runs, *reruns, *references, *(path for paths in named.values() for path in paths)):
        existing(path)
    # What follows imports scipy and matplotlib, which takes longer than to find a mistake in what was asked.
    from grit_impl.curves import report as compare_report
    from grit_impl.record import write_atomic

    read = partial(_read, until=until, loss=loss)
    results = (
        _from_arms(named, read, first_update, anyway)
        if arms
        else [_from_runs(runs, reruns, references, read, first_update, anyway)]
    )
    if html_out:
        write_atomic(html_out, compare_report.page(results))
    if plot_out:
        if len(results) > 1:
            raise GRITError("--plot draws one pair of arms; use --html for more")
        write_atomic(plot_out, compare_report.figure_svg(results[0]))
    gradients = _gradients(runs)
    if as_json:
        data = [r.to_dict() | ({"gradients": asdict(gradients)} if gradients else {}) for r in results]
        click.echo(json.dumps(data if arms else data[0], indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for result in results:
            compare_report.to_terminal(result, console)
        if gradients:
            console.print(f"gradients: {gradients}", markup=False, soft_wrap=True)
    if any(r.verdict == "incomparable" for r in results):
        raise SystemExit(1)


def _gradients(runs: tuple[str, ...]) -> Verdict | None:
    """What the ledgers of B and A say about each other, if both have one."""
    from grit_impl.record import RunRecord

    ledgers = [RunRecord(Path(path)).ledger for path in runs]
    if len(ledgers) != 2 or not all(map(Path.is_file, ledgers)):
        return None
    from grit_impl.ledger.verdict import judge_pair

    return judge_pair(ledgers[1], ledgers[0])


def _read(path: str, *, until: int | None, loss: str | None, name: str | None = None) -> RunLog:
    from grit_impl.curves.logs import read_log

    return read_log(path, until=until, loss=loss, name=name)


def _from_runs(
    runs: tuple[str, ...],
    reruns: tuple[str, ...],
    references: tuple[str, ...],
    read: Callable[..., RunLog],
    first_update: int,
    anyway: bool,
) -> CurveComparison:
    from grit_impl.curves.compare import compare_logs

    a, b = (read(path) for path in runs)
    if a.name == b.name:
        a, b = (read(path, name=path) for path in runs)
    again, others = ([read(p) for p in paths] for paths in (reruns, references))
    _refuse_copies("--rerun", again, [a, b])
    _refuse_copies("--reference", others, [a, b, *again])
    return compare_logs(a, b, again, others, first_update=first_update, anyway=anyway)


def _refuse_copies(option: str, given: Sequence[RunLog], before: Sequence[RunLog]) -> None:
    """A copy measures nothing: as a rerun it would make the noise floor zero, or the two runs equal."""
    from grit_impl.curves.logs import is_copy

    for at, log in enumerate(given):
        for other in (*before, *given[:at]):
            if is_copy(other, log):
                raise GRITError(
                    f"{option} {log.path} holds the very values of {other.path}: a copy measures no noise. Give the "
                    f"log of another training, or leave {option} out (a rerun that repeats to the bit is believed if "
                    "both logs carry a clock: run records, event files)"
                )


def _named(arms: tuple[str, ...]) -> dict[str, list[str]]:
    """`lora=runs/lora-seed*` as the arm's name and its runs."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        name, equals, value = arm.partition("=")
        if not equals or not name or not value:
            raise GRITError(f"--arm {arm!r}: expected NAME=DIR, e.g. --arm grit=runs/grit-seed1")
        for pattern in value.split(","):
            paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not paths:
                raise GRITError(f"--arm {name}: nothing matches {pattern}")
            found.setdefault(name, []).extend(paths)
    return found


def _from_arms(
    arms: dict[str, list[str]], read: Callable[..., RunLog], first_update: int, anyway: bool
) -> list[CurveComparison]:
    from grit_impl.curves.arms import compare_arms

    logs = {name: [read(path) for path in paths] for name, paths in arms.items()}
    for name, runs in logs.items():
        _refuse_copies(f"--arm {name}", runs, [])
    return compare_arms(logs, first_update=first_update, anyway=anyway)
