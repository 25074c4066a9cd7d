"""`grit train`: one arm, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grit_impl.config import PRESETS, GRITConfig
from grit_impl.errors import GRITError
from grit_impl.recipes.arms import ARMS, RunSpec, default_training, find_arm, grit_options
from grit_impl.recipes.datasets import require_dataset


@click.command(epilog="Options of GRIT are set with --set, e.g. --set kfac_update_freq=5; --explain lists them.")
@click.option("--arm", type=click.Choice(list(ARMS)), default="pure", show_default=True, help="Way of training.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default=None,
    help="GRIT's options.  [default: recommended; precondition for arms that train with a callback]",
)
@click.option("--set", "overrides", multiple=True, metavar="OPTION=VALUE", help="Replace one option of the preset.")
@click.option(
    "--base-model",
    default="tiny",
    show_default=True,
    help="tiny, smollm2, a folder, a .gguf file, a hub id, random:llama-1b.",
)
@click.option(
    "--dataset",
    default="aqi",
    show_default=True,
    help="alpaca, dolly, boolq, qnli, gsm8k, aqi, or a .jsonl/.json/.csv/.parquet file with one of their schemas.",
)
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True, help="Sequences per micro-batch.")
@click.option("--accumulation", type=click.IntRange(1), default=4, show_default=True, help="Micro-batches per step.")
@click.option("--lr", type=float, default=None, help="Peak learning rate.  [default: the base's own, else 2e-4]")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default=None, help="[default: bf16 on a GPU, else fp32]"
)
@click.option("--max-length", type=click.IntRange(8), default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="LoRA rank.")
@click.option("--seed", type=int, default=3407, show_default=True, help="Seed of adapters and data order.")
@click.option("--save-every", type=click.IntRange(0), default=50, show_default=True, help="Steps between checkpoints.")
@click.option("--ledger/--no-ledger", default=True, show_default=True, help="Record what happens to the gradients.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Record folder.  [default: reports/runs/ARM-seedSEED]"
)
@click.option("--fresh", is_flag=True, help="Move the run that is in the folder aside, and begin anew.")
@click.option("--explain", is_flag=True, help="List GRIT's options with their ranges and exit.")
def train(**options: Any) -> None:
    """Train one arm and leave a run record.

    Run it again after an interruption: it continues from the last checkpoint, or says that the run is complete. With
    other options, or after an upgrade, it names what differs and leaves the folder as it is.
    """
    if options["explain"]:
        for name, line in GRITConfig.help().items():
            click.echo(f"{name:28} {line}")
        return
    arm = find_arm(options["arm"])
    # A callback cannot put another optimizer in the place of the loop's.
    preset = options["preset"] or ("precondition" if arm.grit == "callback" else "recommended")
    config = GRITConfig.preset(preset, **dict(_override(text) for text in options["overrides"]))
    require_dataset(options["dataset"])
    from grit_impl.machine import has_gpu
    from grit_impl.runs.execute import finished, request_for, run_arms, with_tokens
    from grit_impl.runs.restart import refusal, request_of, set_aside

    names = ("steps", "batch_size", "accumulation", "max_length", "rank", "save_every")
    chosen = {name: options[name] for name in names} | {"alpha": options["rank"]}
    if options["lr"] is not None:
        chosen["learning_rate"] = options["lr"]
    if options["precision"] is not None:
        chosen["precision"] = options["precision"]
    spec = RunSpec(
        arm=arm.name,
        base_model=options["base_model"],
        dataset=options["dataset"],
        seed=options["seed"],
        training=default_training(options["base_model"], cuda=has_gpu(), **chosen),
        grit=grit_options(arm, config),
    )
    out = (options["out"] or Path("reports/runs") / f"{arm.name}-seed{spec.seed}").resolve()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    spec = with_tokens(spec, out.parent)
    request = request_for(spec, ledger=options["ledger"])
    if options["fresh"] and request_of(out) is not None:
        if aside := set_aside(out):
            click.echo(f"the run that was in {out} is now in {aside}")
    elif (record := finished(out, request["fingerprint"])) is not None:
        if why := record.diverged:
            raise click.ClickException(f"{out} is complete, but {why}")
        click.echo(f"{out} is complete")
        return
    elif why := refusal(out, request):
        raise GRITError(why)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(f"training {arm.name}", total=spec.training.steps)

        def progress(label: str, done: int, total: int) -> None:
            bar.update(task, completed=done)

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
