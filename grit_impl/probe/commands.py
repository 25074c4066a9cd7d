"""`grit probe`: which callback events and hooks fire here, in which order, and whether GRIT can rely on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from grit_impl.probe.findings import ProbeReport


@click.command()
@click.option("--unsloth/--no-unsloth", default=None, help="Probe Unsloth's kernels.  [default: if there is a GPU]")
@click.option(
    "--optimizer", default=None, help="transformers' name of it.  [default: adamw_torch; on a GPU adamw_8bit]"
)
@click.option("--accumulation", type=click.IntRange(1), default=4, show_default=True, help="Micro-batches per step.")
@click.option("--checkpointing/--no-checkpointing", default=None, help="Gradient checkpointing.  [default: on a GPU]")
@click.option("--json", "target", type=click.Path(path_type=Path, dir_okay=False), help="Write the result here too.")
@click.pass_context
def probe(
    context: click.Context,
    unsloth: bool | None,
    optimizer: str | None,
    accumulation: int,
    checkpointing: bool | None,
    target: Path | None,
) -> None:
    """Train a small random Llama for 20 steps and show which callback events and hooks fire, in which order.

    Every hybrid run does this first. The order, the gradients' state at each event and the five checks below the table
    are what a callback that preconditions gradients depends on; libraries change them. Exit status 1: a check failed.
    """
    import torch

    from grit_impl.recipes.arms import TrainingSettings

    cuda = torch.cuda.is_available()
    use_unsloth = cuda if unsloth is None else unsloth
    if use_unsloth:
        from grit_impl.recipes.unsloth import import_unsloth

        import_unsloth()
    from grit_impl.probe.run import run_probe

    training = TrainingSettings(
        accumulation=accumulation,
        optimizer=optimizer or ("adamw_8bit" if cuda else "adamw_torch"),
        precision="bf16" if cuda else "fp32",
        gradient_checkpointing=cuda if checkpointing is None else checkpointing,
        threads=4 if cuda else 1,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    found = run_probe(training, unsloth=use_unsloth)
    if target is not None:
        found.write(target)
    show(found)
    context.exit(0 if found.good else 1)


def show(found: ProbeReport) -> None:
    """The table and the checks, on standard output."""
    from rich.console import Console
    from rich.table import Table

    named = [
        f"{name} {found.versions[name]}"
        for name in ("torch", "transformers", "trl", "peft", "unsloth")
        if name in found.versions
    ]
    table = Table(title=f"{found.stack}, {found.optimizer}: {', '.join(named)}", title_justify="left")
    for column in ("order", "event", "kind", "per step", "in all", "LoRA gradients"):
        table.add_column(column, justify="left" if column in ("event", "kind", "LoRA gradients") else "right")
    for event in found.events:
        least, most = event.per_step
        times = str(least) if least == most else f"{least}-{most}"
        table.add_row(str(event.order or "-"), event.name, event.kind, times, str(event.total), event.gradients or "-")
    # A log has no width: nothing there may be cut.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for check in found.checks:
        click.echo(f"{'ok  ' if check.good else 'FAIL'}  {check.name}: {check.found}")
