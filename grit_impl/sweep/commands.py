"""`grit sweep`: run a plan, and turn its results into tables and figures."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grit_impl.errors import GRITError
from grit_impl.machine import cores, leave_torch_to_runs
from grit_impl.settings import within
from grit_impl.sweep.plan import Plan, load_plan

if TYPE_CHECKING:
    from grit_impl.sweep.store import Store

DATABASE = "sweep.db"


def _database(path: Path) -> Path:
    """The results in a sweep's folder, or the file itself.

    Raises:
        GRITError: there are none.
    """
    file = path / DATABASE if path.is_dir() else path
    if not file.is_file():
        raise GRITError(f"{file} is not there: run grit sweep run first")
    return file


@click.group()
def sweep() -> None:
    """Many small trainings with paired seeds: which update rule wins, and what it is worth."""


@sweep.command("run")
@click.argument("plan")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where results go.")
@click.option("--jobs", type=click.IntRange(1), default=cores(), show_default="cores", help="Runs at a time.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where runs train."
)
@click.option("--budget", type=within(1), help="Seconds until the sweep ends itself.  [default: none]")
@click.option("--base", help="Another base model than the plan's: a folder.")
@click.option(
    "--tuned-by",
    type=click.Path(path_type=Path, exists=True),
    help="Take the tuning runs of this sweep (a folder or sweep.db file), say for other seeds.  [default: tune]",
)
@click.option("--task", "tasks", multiple=True, help="Only this task of the plan (repeatable).")
@click.option("--seed", "seeds", type=int, multiple=True, help="After tuning, only this seed (repeatable).")
@click.option("--retry", is_flag=True, help="Run again what failed.")
@click.option("--dry", is_flag=True, help="Say what would run, and run nothing.")
def run(
    plan: str,
    out: Path,
    jobs: int,
    device: str,
    budget: float | None,
    base: str | None,
    tuned_by: Path | None,
    tasks: tuple[str, ...],
    seeds: tuple[int, ...],
    retry: bool,
    dry: bool,
) -> None:
    """Run PLAN (a plan of the project by name, or a .toml file), or what is still missing of it.

    Every run is a process of its own, and its result is in OUT/sweep.db as soon as it ends. Start the same command
    again after an interruption. The exit status is 0 when every run is finished, else 3. Several machines share a
    sweep: give each a copy of OUT with the tuning done, other seeds or tasks, and bring the results together with
    `grit sweep merge`.
    """
    leave_torch_to_runs(device)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import dataclasses

    from grit_impl.machine import git_commit, versions
    from grit_impl.sweep.scheduler import Interrupted, Sweep, check_device
    from grit_impl.sweep.store import Store

    chosen = load_plan(plan)
    if base is not None:
        chosen = dataclasses.replace(chosen, base=base)
    selected = chosen.only(tasks, seeds)
    if dry:
        counts = Counter((job.phase, job.task, job.arm) for job in selected.jobs())
        for (phase, task, arm), count in counts.items():
            click.echo(f"{phase:10s} {task:20s} {arm:20s} {count:4d} runs")
        click.echo(f"{sum(counts.values())} runs of {selected.common.get('steps', 'their own')} steps")
        return
    check_device(device)
    with Store(out / DATABASE) as store:
        before = store.meta.get("plan")
        if before is not None and (changed := chosen.changed_since(json.loads(before))):
            raise GRITError(f"{out} holds runs of a plan with another {changed}: give another --out")
        if tuned_by is not None:
            click.echo(f"{tuned_by}: {take_tuning(store, selected, tuned_by)} tuning runs taken")
        store.set_meta(
            plan=dataclasses.asdict(chosen),
            versions=versions(),
            git_commit=git_commit(Path(__file__).parent),
            machine={"platform": platform.platform(), "cpus": os.cpu_count(), "processor": platform.processor()},
            jobs=jobs,
        )
        sweeping = Sweep(
            selected,
            store,
            jobs=jobs,
            device=device,
            budget=budget,
            retry=retry,
            progress=lambda done, total, line: click.echo(f"[{done}/{total}] {line}"),
        )
        try:
            missing = sweeping.run()
        except Interrupted:
            click.echo("interrupted: the same command continues", err=True)
            raise SystemExit(130) from None
        failed = sum(status == "failed" for status in store.statuses().values())
    if failed:
        click.echo(f"{failed} runs failed: see the column error in {out / DATABASE}; --retry runs them again", err=True)
    if missing:
        click.echo(f"{missing} runs are missing: the same command continues", err=True)
    if missing or failed:
        raise SystemExit(3)


def take_tuning(store: Store, plan: Plan, path: Path) -> int:
    """Copy the tuning runs of the plan from another sweep, and keep the commit that made them.

    Returns:
        How many were new.

    Raises:
        GRITError: its runs are not the plan's, or it has none of them.
    """
    from grit_impl.sweep.store import Store

    with Store(_database(path)) as source:
        if "plan" not in source.meta:
            raise GRITError(f"{path} holds no sweep: run grit sweep run first")
        if changed := plan.changed_since(json.loads(source.meta["plan"])):
            raise GRITError(f"{path} holds runs of a plan with another {changed}")
        wanted = {job.key for job in plan.jobs() if job.phase == "tuning"}
        if not wanted & source.statuses().keys():
            raise GRITError(f"{path} has no tuning run of this plan")
        try:
            taken = store.take(source, wanted)
        except GRITError as error:
            raise GRITError(f"cannot take the tuning of {path}: {error}") from None
        if taken:
            store.set_meta(tuned_by=source.meta.get("git_commit", "unknown"))
        return taken


@sweep.command("merge")
@click.argument("into", type=click.Path(path_type=Path, exists=True))
@click.argument("others", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def merge(into: Path, others: tuple[Path, ...]) -> None:
    """Copy the finished runs of OTHERS that INTO lacks (folders or sweep.db files), all of the same plan.

    A run that both have stays as it is: nothing is replaced by a second try. Parts that were tuned apart, and chose
    other settings, are refused.
    """
    from grit_impl.sweep.store import Store

    with Store(_database(into)) as store:
        for other in map(_database, others):
            with Store(other) as source:
                for path, each in ((into, store), (other, source)):
                    if "plan" not in each.meta:
                        raise GRITError(f"{path} holds no sweep: run grit sweep run first")
                if changed := Plan(**json.loads(store.meta["plan"])).changed_since(json.loads(source.meta["plan"])):
                    raise GRITError(f"{other} holds runs of a plan with another {changed}")
                try:
                    added = store.take(source)
                except GRITError as error:
                    raise GRITError(f"cannot merge {other} into {into}: {error}") from None
            click.echo(f"{other}: {added} runs added")


@sweep.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--document", type=click.Path(path_type=Path, dir_okay=False), help="Markdown file whose block to fill in."
)
@click.option("--block", default="sweep", show_default=True, help="Name of that block.")
@click.option("--figures", type=click.Path(path_type=Path, file_okay=False), help="Folder for the plots (SVG).")
def report(folders: tuple[Path, ...], document: Path | None, block: str, figures: Path | None) -> None:
    """Tables with intervals and verdicts, from the sweep.db of each of FOLDERS (or files), as Markdown.

    With --document, the block between `<!-- sweep:begin -->` and `<!-- sweep:end -->` is replaced, or that of another
    name (--block).
    """
    from grit_impl.sweep.report import markdown, plots, replace_block
    from grit_impl.sweep.store import Store

    files = [_database(path) for path in folders]
    stores = [Store(file) for file in files]
    text = markdown(stores)
    if figures is not None:
        for path in plots(stores, figures):
            click.echo(f"wrote {path}", err=True)
    if document is None:
        click.echo(text)
    else:
        replace_block(document, text, block)
        click.echo(f"wrote {document}", err=True)
