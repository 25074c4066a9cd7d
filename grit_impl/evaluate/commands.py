"""`grit evaluate`: measure models behind an Ollama API and decide thresholds, without training anything."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from grit_impl.errors import GRITError
from grit_impl.evaluate.options import Questions, Thresholds
from grit_impl.files import FIXTURES
from grit_impl.settings import click_options, pick


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
@click.option(
    "--knowledge-dataset", default=None, help="Questions with `question` and `answer`.  [default: the project's]"
)
@click.option("--no-knowledge", is_flag=True, help="Do not measure retention.")
@click.option("--split", default="test", show_default=True, help="Split of a hub data set.")
@click.option("--training-dataset", default=None, help="Data set the models were trained on, to refuse overlap.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Ask only the first so many questions.")
@click.option("--in-flight", type=click.IntRange(1, 64), default=2, show_default=True, help="Requests at a time.")
@click.option("--timeout", type=click.FloatRange(0.1), default=120.0, show_default=True, help="Seconds per request.")
@click.option("--speed-rounds", type=click.IntRange(0), default=30, show_default=True, help="Speed samples per model.")
@click_options(Questions)
@click_options(Thresholds)
def evaluate(models: tuple[str, ...], **options: Any) -> None:
    """Evaluate models behind an Ollama API.

    Exit status 1 if a threshold is refuted, 0 otherwise. An interrupted evaluation continues where it stopped.
    """
    limits, asked = pick(Thresholds, options), pick(Questions, options)
    names = dict(_named(text) for text in models)
    if "base" not in names:
        raise GRITError("say which models: --model base=NAME --model pure=NAME ...; delta_AQI needs the base")
    aqi, knowledge = _suites(asked, options)
    # What follows imports scipy, which takes longer than to find a mistake in what was asked.
    from grit_impl.evaluate.gates import judge
    from grit_impl.evaluate.session import EvaluationOptions
    from grit_impl.evaluate.session import evaluate as run

    settings = EvaluationOptions(
        aqi_metric=asked.aqi_metric,
        in_flight=options["in_flight"],
        timeout=options["timeout"],
        speed_rounds=options["speed_rounds"],
    )
    evaluation = run(options["ollama_url"], names, aqi, knowledge, options["out"], settings)
    gates = judge(evaluation, limits, without=("retention",) if options["no_knowledge"] else ())
    _print(evaluation, gates)
    click.echo(f"answers and numbers: {options['out']}")
    if any(gate.judgement.verdict == "refuted" for gate in gates):
        sys.exit(1)


def _named(text: str) -> tuple[str, str]:
    label, _, name = text.partition("=")
    if not label or not name:
        raise GRITError(f"--model takes LABEL=NAME, not {text!r}")
    return label, name


def _suites(asked: Questions, options: dict[str, Any]) -> tuple[Any, Any]:
    from grit_impl.evaluate.items import aqi_fields, load_aqi, load_knowledge
    from grit_impl.tables import read_table

    column, source = asked.features_field, options["training_dataset"]
    training = [row.text(column) for row in read_table(source, "train").rows] if source else []
    aqi = load_aqi(
        asked.aqi_dataset or FIXTURES / "aqi_test.jsonl",
        aqi_fields(column, asked.answer_field),
        split=options["split"],
        limit=options["limit"],
        training=training,
        allow_overlap=asked.allow_overlap,
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
        errors = Counter(row["error"] for row in evaluation.answers if row["label"] == label and row.get("error"))
        for why, count in errors.most_common(1):
            click.echo(f"{label}: {errors.total()} questions without an answer, {count} of them because: {why}")
    for note in evaluation.meta["notes"]:
        click.echo(f"note: {note}")
    for gate in gates:
        click.echo(f"{gate.judgement.verdict:13} {gate.judgement.summary}")
    click.echo(evaluation.winner()[1])


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value.estimate:.1f} [{value.low:.1f}, {value.high:.1f}]"
