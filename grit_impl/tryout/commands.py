"""`grit try`: does GRIT help on my data?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grit_impl.errors import GRITError, RunFailed
from grit_impl.recipes.arms import TrainingSettings
from grit_impl.recipes.bases import find_base, require_base
from grit_impl.recipes.datasets import require_dataset
from grit_impl.settings import click_options
from grit_impl.tryout.options import SHARED, Trying, training_of
from grit_impl.tryout.plan import jobs_that_fit

PAGE = "answer.md"


@click.command("try", context_settings={"token_normalize_func": lambda text: text.replace("_", "-")})
@click.option(
    "--model-name-or-path",
    "--base-model",
    "base_model",
    default="tiny",
    show_default=True,
    help="tiny, smollm2, a folder, a .gguf file, a hub id.",
)
@click.option(
    "--dataset-name",
    "--dataset",
    "dataset",
    required=True,
    help="A .jsonl/.json/.csv/.parquet file, or alpaca, dolly, boolq, qnli, gsm8k, aqi.",
)
@click_options(Trying, given=True, defaults={"steps": "200, or what fits", "trials": "5, or what fits"})
@click_options(
    TrainingSettings,
    *SHARED,
    given=True,
    defaults={
        "batch_size": "8; 2 for large models on a GPU",
        "accumulation": "1; 4 for large models on a GPU",
        "learning_rate": "the middle of the search: the preset's on this base, else the base's own, else 2e-4",
        "alpha": "the rank",
    },
)
@click.option(
    "--output-dir", "--out", "out", type=click.Path(path_type=Path), default=None, help="[default: reports/try/DATASET]"
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=None,
    help="Runs at a time, as far as memory allows.  [default: cores, or GPUs]",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None, help="[default: a GPU if there is one]")
@click.option("--export", is_flag=True, help="Write the winner of the first pair as GGUF.")
@click.pass_context
def try_(context: click.Context, /, **options: Any) -> None:
    """Does GRIT help on my data?

    Tunes LoRA with AdamW, LoRA+, rsLoRA and GRIT over as many learning rates each, lets the best of the three meet GRIT
    on other seeds and on rows that neither has seen, and says yes, no, or how many more seeds would decide, with the
    ledger's verdict, the cost, and what to do next. Type the same again after an interruption.
    """
    out: Path = options["out"] or Path("reports/try") / (Path(options["dataset"]).stem or "data")
    own = {name: value for name, value in options.items() if value is not None}
    trying = Trying(**{name: own[name] for name in Trying.__dataclass_fields__ if name in own})
    if (trying.metric == "regex") != bool(trying.pattern):
        raise GRITError("--pattern and --metric regex go together: say what must be the same in answer and truth")
    require_dataset(options["dataset"])
    base = find_base(options["base_model"])
    from grit_impl.machine import available_memory, cores, has_gpu, leave_torch_to_runs, visible_gpus

    device = options["device"] or ("cuda" if has_gpu() and base.gpu else "cpu")
    if device == "cuda" and not has_gpu():
        raise GRITError("--device cuda: no NVIDIA GPU was found; use --device cpu")
    jobs = options["jobs"] or max(1, len(visible_gpus()) if device == "cuda" else cores())
    shared = {name: own[name] for name in SHARED if name in own}
    training = training_of(options["base_model"], cuda=device == "cuda", given=shared)
    require_base(options["base_model"])
    if device == "cpu":
        jobs = jobs_that_fit(jobs, base.size(), available_memory())
    leave_torch_to_runs(device)
    from grit_impl.runs.progress import ProgressLine
    from grit_impl.sweep.scheduler import Interrupted
    from grit_impl.tryout.page import markdown
    from grit_impl.tryout.session import Asked, claim_folder, run

    asked = Asked(options["base_model"], options["dataset"], trying, training, device)
    claim_folder(out, asked)
    line = ProgressLine()
    try:
        result = run(asked, out.resolve(), jobs=jobs, say=click.echo, progress=line)
    except Interrupted:
        click.echo("interrupted: the same command continues", err=True)
        raise SystemExit(130) from None
    except RunFailed as error:
        raise click.ClickException(f"{error}; the same command tries again") from None
    page = markdown(result)
    (out / PAGE).write_text(page, encoding="utf-8")
    click.echo(f"\n{page}\n{out / PAGE}")
    if options["export"]:
        from grit_impl.export.commands import export

        winner = "recommended" if result["answer"]["outcome"] == "yes" else result["reference"]
        context.invoke(export, run=out / f"adapter-{winner}", base_spec=options["base_model"], out=out / "gguf")
