"""`grit evaluate`: measure models behind an Ollama API and decide thresholds, without training anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from grit_impl.errors import GRITError
from grit_impl.files import FIXTURES


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="LABEL=NAME",
    help="A model on the server and its label, e.g. base=llama3 and pure=grit-pure. Repeatable; one must be base.",
)
@click.option("--ollama-url", default=None, help="Address of the server.  [default: OLLAMA_HOST or 127.0.0.1:11434]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports/evaluation"), show_default=True)
@click.option("--aqi-dataset", default=None, help="JSONL, CSV, parquet or hub data set.  [default: the frozen AQI set]")
@click.option("--features-field", default="features", show_default=True, help="Column of the question.")
@click.option("--answer-field", default="", help="Column of the truth.  [default: aqi_value]")
@click.option(
    "--knowledge-dataset", default=None, help="Questions with `question` and `answer`.  [default: the project's]"
)
@click.option("--no-knowledge", is_flag=True, help="Do not measure retention.")
@click.option("--split", default="test", show_default=True, help="Split of a hub data set.")
@click.option("--training-dataset", default=None, help="Data set the models were trained on, to refuse overlap.")
@click.option("--allow-overlap", is_flag=True, help="Keep questions that occur in the training data set.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Ask only the first so many questions.")
@click.option(
    "--aqi-metric", type=click.Choice(["category", "exact", "within5"]), default="category", show_default=True
)
@click.option("--in-flight", type=click.IntRange(1, 64), default=2, show_default=True, help="Requests at a time.")
@click.option("--timeout", type=click.FloatRange(0.1), default=120.0, show_default=True, help="Seconds per request.")
@click.option("--speed-rounds", type=click.IntRange(0), default=30, show_default=True, help="Speed samples per model.")
@click.option("--min-delta-aqi", type=float, default=0.0, show_default=True, help="Points above the base.")
@click.option(
    "--min-delta-over-baseline", type=float, default=None, help="Points above plain LoRA.  [default: not asked]"
)
@click.option("--max-speed-loss", type=float, default=10.0, show_default=True, help="Percent of the base's speed.")
@click.option("--min-retention", type=float, default=70.0, show_default=True, help="Percent of the base's knowledge.")
def evaluate(models: tuple[str, ...], **options: Any) -> None:
    """Evaluate models behind an Ollama API.

    Exit status 1 if a threshold is refuted, 0 otherwise. An interrupted evaluation continues where it stopped.
    """
    from grit_impl.evaluate.gates import Thresholds, judge
    from grit_impl.evaluate.session import EvaluationOptions
    from grit_impl.evaluate.session import evaluate as run

    limits = Thresholds(
        options["min_delta_aqi"],
        options["min_delta_over_baseline"],
        options["max_speed_loss"],
        None if options["no_knowledge"] else options["min_retention"],
    )
    names = dict(_named(text) for text in models)
    if "base" not in names:
        raise GRITError("say which models: --model base=NAME --model pure=NAME ...; delta_AQI needs the base")
    aqi, knowledge = _suites(options)
    settings = EvaluationOptions(
        aqi_metric=options["aqi_metric"],
        in_flight=options["in_flight"],
        timeout=options["timeout"],
        speed_rounds=options["speed_rounds"],
    )
    evaluation = run(options["ollama_url"], names, aqi, knowledge, options["out"], settings)
    gates = judge(evaluation, limits)
    _print(evaluation, gates)
    click.echo(f"answers and numbers: {options['out']}")
    if any(gate.judgement.verdict == "refuted" for gate in gates):
        sys.exit(1)


def _named(text: str) -> tuple[str, str]:
    label, _, name = text.partition("=")
    if not label or not name:
        raise GRITError(f"--model takes LABEL=NAME, not {text!r}")
    return label, name


def _suites(options: dict[str, Any]) -> tuple[Any, Any]:
    from grit_impl.evaluate.items import aqi_fields, load_aqi, load_knowledge, read_rows

    column, source = options["features_field"], options["training_dataset"]
    training = [str(row.get(column, "")) for row in read_rows(source, "train")] if source else []
    aqi = load_aqi(
        options["aqi_dataset"] or FIXTURES / "aqi_test.jsonl",
        aqi_fields(column, options["answer_field"]),
        split=options["split"],
        limit=options["limit"],
        training=training,
        allow_overlap=options["allow_overlap"],
    )
    if options["no_knowledge"]:
        return aqi, None
    facts = options["knowledge_dataset"] or FIXTURES / "knowledge_test.jsonl"
    return aqi, load_knowledge(facts, limit=options["limit"])


def _print(evaluation: Any, gates: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("model", "AQI accuracy %", "delta_AQI points", "retention %", "tokens/s", "delta_speed %")
    for label, each in evaluation.metrics.items():
        cells = (each.aqi_accuracy, each.delta_aqi, each.retention, each.tokens_per_second, each.delta_speed)
        table.add_row(label, *(_cell(cell) for cell in cells))
    console.print(table)
    # Not through the console, which would break the lines.
    for label, each in evaluation.metrics.items():
        if each.unparsable:
            reasons = ", ".join(f"{count} {reason}" for reason, count in each.unparsable.items())
            click.echo(f"{label}: unparsable answers: {reasons}")
    for gate in gates:
        click.echo(f"{gate.judgement.verdict:13} {gate.judgement.summary}")
    click.echo(evaluation.winner()[1])


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value.estimate:.1f} [{value.low:.1f}, {value.high:.1f}]"
