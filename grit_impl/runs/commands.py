"""`grit train`: one arm, from the command line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from grit_impl.config import PRESETS, TUNED, GRITConfig
from grit_impl.errors import GRITError
from grit_impl.processes import place
from grit_impl.recipes.arms import ARMS, RunSpec, TrainingSettings, default_training, find_arm, grit_options
from grit_impl.recipes.bases import find_base
from grit_impl.recipes.datasets import require_dataset
from grit_impl.runs.options import read_options, require_loggers, require_package
from grit_impl.settings import click_options

SAVE_EVERY = 50
"""Optimizer steps between checkpoints."""


def _from_file(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Options from a YAML file, under the names that the command line has for them, which comes before the file."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read_options(path, context.command.params)}


@click.command(
    epilog="Options of GRIT are set with --set, e.g. --set kfac_update_freq=5; --explain lists them. An option may be "
    "written with underscores, as transformers' are.",
    context_settings={"token_normalize_func": lambda text: text.replace("_", "-")},
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_from_file,
    help="YAML file with options of this command, e.g. learning_rate: 1e-3; GRIT's stand under grit:.",
)
@click.option("--arm", type=click.Choice(list(ARMS)), default="pure", show_default=True, help="Way of training.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default=None,
    help="GRIT's options, and the training options that they were tuned with on this base.  "
    "[default: recommended; precondition for arms that train with a callback]",
)
@click.option("--set", "overrides", multiple=True, metavar="OPTION=VALUE", help="Replace one option of the preset.")
@click.option(
    "--model-name-or-path",
    "--base-model",
    "base_model",
    default="tiny",
    show_default=True,
    help="tiny, smollm2, a folder, a .gguf file, a hub id, random:llama-1b.",
)
@click.option(
    "--dataset-name",
    "--dataset",
    "dataset",
    default="aqi",
    show_default=True,
    help="alpaca, dolly, boolq, qnli, gsm8k, aqi, or a .jsonl/.json/.csv/.parquet file with one of their schemas.",
)
@click_options(
    TrainingSettings,
    given=True,
    defaults={
        "learning_rate": "what the preset was tuned with on this base, else the base's own, else 2e-4",
        "alpha": "the rank",
        "precision": "bf16 on a GPU, else fp32",
        "save_every": str(SAVE_EVERY),
    },
)
@click.option("--seed", type=int, default=3407, show_default=True, help="Seed of adapters and data order.")
@click.option("--ledger/--no-ledger", default=True, show_default=True, help="Record what happens to the gradients.")
@click.option(
    "--output-dir",
    "--out",
    "out",
    type=click.Path(path_type=Path),
    default=None,
    help="Record folder.  [default: reports/runs/ARM-seedSEED]",
)
@click.option("--fresh", is_flag=True, help="Move the run that is in the folder aside, and begin anew.")
@click.option("--explain", is_flag=True, help="List GRIT's options, and what its presets were tuned with, and exit.")
def train(**options: Any) -> None:
    """Train one arm and leave a run record.

    Run it again after an interruption: it continues from the last checkpoint, or says that the run is complete. With
    other options, or after an upgrade, it names what differs and leaves the folder as it is.
    """
    if options["explain"]:
        _explain()
        return
    arm = find_arm(options["arm"])
    # A callback cannot put another optimizer in the place of the loop's.
    preset = options["preset"] or arm.preset or ("precondition" if arm.grit == "callback" else "recommended")
    config = GRITConfig.preset(preset, **dict(_override(text) for text in options["overrides"]))
    require_dataset(options["dataset"])
    find_base(options["base_model"])
    require_loggers(options["report_to"] or "")
    if arm.grit != "trainer":
        require_package("trl", "train")
    from grit_impl.machine import has_gpu

    asked = {each.name: options[each.name] for each in fields(TrainingSettings)}
    asked = {"steps": 200, "save_every": SAVE_EVERY} | {k: v for k, v in asked.items() if v is not None}
    asked = {"alpha": asked.get("rank")} | asked
    uses = None if arm.grit == "none" else preset
    spec = RunSpec(
        arm=arm.name,
        base_model=options["base_model"],
        dataset=options["dataset"],
        seed=options["seed"],
        training=default_training(options["base_model"], cuda=has_gpu(), preset=uses, **asked),
        grit=grit_options(arm, config),
    )
    rank, _ = place()
    if rank == 0 and uses in TUNED and options["base_model"] not in TUNED[uses] and "learning_rate" not in asked:
        click.echo(
            f"note: preset {uses} was tuned on {', '.join(TUNED[uses])}; on {spec.base_model} the learning rate "
            f"{spec.training.learning_rate:g} is a guess: try several, and as many for plain LoRA (--arm baseline)",
            err=True,
        )
    from grit_impl.runs.execute import finished, request_for, run_arms, train_beside, with_tokens
    from grit_impl.runs.restart import refusal, request_of, set_aside

    out = (options["out"] or Path("reports/runs") / f"{arm.name}-seed{spec.seed}").resolve()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    spec = with_tokens(spec, out.parent)
    request = request_for(spec, ledger=options["ledger"])
    if options["fresh"] and rank:
        pass  # the first process moves it
    elif options["fresh"] and request_of(out) is not None:
        if aside := set_aside(out):
            click.echo(f"the run that was in {out} is now in {aside}")
    elif (record := finished(out, request["fingerprint"])) is not None:
        if why := record.diverged:
            raise click.ClickException(f"{out} is complete, but {why}")
        if rank == 0:
            click.echo(f"{out} is complete")
        return
    elif why := refusal(out, request):
        raise GRITError(why)
    if rank:
        train_beside(spec, out, request)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task(f"training {arm.name}", total=spec.training.steps, loss="")

        def progress(label: str, done: int, total: int) -> None:
            bar.update(task, completed=done, loss=_last_loss(out))

        result = run_arms(
            [spec], out.parent, jobs=1, progress=progress, name=lambda _: out.name, ledger=options["ledger"]
        )
    trained = result[arm.name]
    if isinstance(trained, str):
        raise click.ClickException(f"{arm.name} did not finish: {trained}")
    record = trained
    last = record.steps[-1]
    click.echo(
        f"{record.path}: {len(record.steps)} steps, last loss {last['loss']:.4f}, {record.run['train_seconds']:.0f} s"
    )


def _last_loss(folder: Path) -> str:
    """The loss of the last step that a run has written, for people; empty before the first one."""
    import json

    try:
        line = (folder / "steps.jsonl").read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
        return f"loss {float(json.loads(line)['loss']):.4f}"
    except (OSError, ValueError, KeyError, TypeError):  # half a line is being written
        return ""


def _explain() -> None:
    for name, line in GRITConfig.help().items():
        click.echo(f"{name:28} {line}")
    for preset, bases in TUNED.items():
        for base, options in bases.items():
            click.echo(f"\npreset {preset} on base {base} trains with")
            for name, tuned in options.items():
                click.echo(f"  {name:26} {tuned.value!s:8} {tuned.source}")


def _override(text: str) -> tuple[str, Any]:
    """`kfac_damping=1e-3` as a name and a value of the option's kind."""
    import ast

    name, separator, value = text.partition("=")
    if not separator:
        raise GRITError(f"--set {text}: write it as OPTION=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
