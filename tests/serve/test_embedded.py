"""The evaluation on the real thing: the tiny base as GGUF in llama.cpp behind the embedded server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.session import evaluate

FIXTURES = Path(__file__).parents[2] / "fixtures"
LABELS = ("base", "baseline", "hybrid", "pure")


@pytest.fixture(scope="module")
def modelfiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base four times, under four names: nobody can be better."""
    from grit_impl.export import export_merged, write_modelfile

    folder = tmp_path_factory.mktemp("gguf")
    export_merged(FIXTURES / "tiny_llama", None, folder / "base.gguf")
    return {label: write_modelfile(folder / "base.gguf", folder / f"Modelfile.{label}") for label in LABELS}


@pytest.mark.slow
def test_400_items_and_four_models_in_90_seconds(modelfiles, tmp_path: Path) -> None:
    """Oracle: the clock, and the identity of the four models: equal answers, no difference, no winner."""
    from grit_impl.evaluate.items import load_aqi
    from grit_impl.serve.server import EmbeddedOllama

    items = load_aqi(FIXTURES / "aqi_test.jsonl", limit=400)
    options = EvaluationOptions(progress=False, speed_rounds=0)
    with EmbeddedOllama(modelfiles) as server:
        start = time.monotonic()
        evaluation = evaluate(server.url, {label: label for label in LABELS}, items, None, tmp_path, options)
        seconds = time.monotonic() - start
    assert evaluation.complete
    assert seconds < 90
    base = {item: row["answer"] for item, row in evaluation.rows("base").items()}
    assert len(base) == 400
    for label in LABELS[1:]:
        assert {item: row["answer"] for item, row in evaluation.rows(label).items()} == base
        delta = evaluation.metrics[label].delta_aqi
        assert (delta.estimate, delta.gained, delta.lost, delta.p) == (0, 0, 0, 1)
    assert evaluation.winner()[0] is None


@pytest.mark.alone
def test_knowledge_and_speed_of_the_tiny_base(modelfiles, tmp_path: Path) -> None:
    """Oracle: what the base was pretrained to: it knows most facts; two copies of it are equally fast."""
    from grit_impl.evaluate.items import load_aqi, load_knowledge
    from grit_impl.serve.server import EmbeddedOllama

    aqi, facts = (
        load_aqi(FIXTURES / "aqi_test.jsonl", limit=6),
        load_knowledge(FIXTURES / "knowledge_test.jsonl", limit=80),
    )
    options = EvaluationOptions(progress=False, speed_rounds=15)
    with EmbeddedOllama({label: modelfiles[label] for label in ("base", "pure")}) as server:
        evaluation = evaluate(server.url, {"base": "base", "pure": "pure"}, aqi, facts, tmp_path, options)
    pure = evaluation.metrics["pure"]
    assert pure.knowledge.estimate > 60
    assert pure.retention.estimate == 100
    assert pure.tokens_per_second.n >= 14
    assert pure.tokens_per_second.estimate > 0
    assert pure.delta_speed.low <= 5
    assert pure.delta_speed.high >= -5
    assert {row["eval_count"] for row in evaluation.speed} == {options.speed_tokens}
