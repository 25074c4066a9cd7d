"""`grit evaluate`: measure models behind an Ollama API and decide thresholds, without training anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from grit_impl.errors import GRITError
from grit_impl.evaluate.options import Asking, Questions, Thresholds
from grit_impl.files import FIXTURES
from grit_impl.record import write_atomic
from grit_impl.settings import click_options, pick, within


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
@click.option("--timeout", type=within(0.1), default=120.0, show_default=True, help="Seconds per request.")
@click.option("--speed-rounds", type=click.IntRange(0), default=30, show_default=True, help="Speed samples per model.")
@click.option(
    "--repeats", type=click.IntRange(0), default=20, show_default=True, help="Answers per model to ask for again."
)
@click.option("--beside-url", default=None, help="Another server with the same models, to be asked these, too.")
@click.option("--junit", type=click.Path(path_type=Path), default=None, help="Write the thresholds as JUnit XML.")
@click_options(Asking)
@click_options(Questions)
@click_options(Thresholds)
def evaluate(models: tuple[str, ...], **options: Any) -> None:
    """Evaluate models behind an Ollama API.

    Exit status 1 if a threshold is refuted, 0 otherwise. An interrupted evaluation continues where it stopped.
    """
    limits, asked, how = pick(Thresholds, options), pick(Questions, options), pick(Asking, options)
    names = dict(_named(text) for text in models)
    if "base" not in names:
        raise GRITError("say which models: --model base=NAME --model pure=NAME ...; delta_AQI needs the base")
    questions, knowledge, scorer = _suites(asked, how, options)
    # What follows imports scipy, which takes longer than to find a mistake in what was asked.
    from grit_impl.evaluate.asking import EvaluationOptions
    from grit_impl.evaluate.gates import judge
    from grit_impl.evaluate.session import evaluate as run
    from grit_impl.evaluate.terminal import junit_xml, show, show_first

    settings = EvaluationOptions(
        aqi_metric=asked.aqi_metric,
        scorer=scorer,
        knowledge_by=how.knowledge_by,
        num_predict=how.max_tokens,
        system=how.system,
        think=how.think,
        in_flight=options["in_flight"],
        timeout=options["timeout"],
        speed_rounds=options["speed_rounds"],
        max_speed_loss=limits.max_speed_loss,
        repeats=options["repeats"],
    )
    evaluation = run(
        options["ollama_url"], names, questions, knowledge, options["out"], settings, preview=show_first,
        beside=options["beside_url"],
    )  # fmt: skip
    gates = judge(evaluation, limits, without=("retention",) if options["no_knowledge"] else ())
    show(evaluation, gates)
    if options["junit"]:
        write_atomic(options["junit"], junit_xml(gates))
    click.echo(f"answers and numbers: {options['out']}")
    if any(gate.judgement.verdict == "refuted" for gate in gates):
        sys.exit(1)


def _named(text: str) -> tuple[str, str]:
    label, _, name = text.partition("=")
    if not label or not name:
        raise GRITError(f"--model takes LABEL=NAME, not {text!r}")
    return label, name


def _suites(asked: Questions, how: Asking, options: dict[str, Any]) -> tuple[Any, Any, str]:
    """The questions, those about knowledge, and the scorer of the first; says on one line what is sent."""
    from grit_impl.evaluate.items import load_knowledge, load_questions, with_wrong
    from grit_impl.tables import read_table

    column, source = asked.features_field, options["training_dataset"]
    questions, scorer, template = load_questions(
        asked.aqi_dataset or FIXTURES / "aqi_test.jsonl",
        column,
        asked.answer_field,
        scorer=how.scorer,
        prompt=how.prompt,
        answer_format=how.answer_format,
        split=options["split"],
        limit=options["limit"],
        training=[row.text(column) for row in read_table(source, "train").rows] if source else [],
        allow_overlap=asked.allow_overlap,
    )
    click.echo(f"{len(questions.items)} questions, sent as {template!r}, read by the scorer {scorer}")
    if options["no_knowledge"]:
        return questions, None, scorer
    facts = options["knowledge_dataset"] or FIXTURES / "knowledge_test.jsonl"
    if how.knowledge_by == "likelihood":
        # The wrong answers come from all questions.
        return questions, with_wrong(load_knowledge(facts), options["limit"]), scorer
    return questions, load_knowledge(facts, limit=options["limit"]), scorer
