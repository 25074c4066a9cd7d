"""A small real chat model, read end to end: it speaks in sentences, and its AQI is a formula as often as an index."""

from __future__ import annotations

from pathlib import Path

import pytest

from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.items import load_aqi, load_knowledge
from grit_impl.evaluate.scoring import score
from grit_impl.evaluate.session import evaluate

FIXTURES = Path(__file__).parents[2] / "fixtures"
FACTS, INDICES = 60, 10


@pytest.mark.slow
@pytest.mark.nightly
def test_what_a_chat_model_knows_is_found(tmp_path: Path) -> None:
    """Oracle: 40 of these 60 facts were labelled right by reading (Q4_1 weights, 3 by synonyms); the first line
    alone, which is all that `exact` reads, never is. No formula is taken for an index."""
    from grit_impl.export import export_merged, write_modelfile
    from grit_impl.recipes.bases import find_base
    from grit_impl.serve.server import EmbeddedOllama

    export_merged(find_base("smollm2").folder(), None, tmp_path / "base.gguf", dtype="q8_0")
    modelfile = write_modelfile(tmp_path / "base.gguf", tmp_path / "Modelfile")
    facts = load_knowledge(FIXTURES / "knowledge_test.jsonl", limit=FACTS)
    questions = load_aqi(FIXTURES / "aqi_test.jsonl", limit=INDICES)
    options = EvaluationOptions(progress=False, speed_rounds=0, in_flight=1)
    with EmbeddedOllama({"base": modelfile}) as server:
        evaluation = evaluate(server.url, {"base": "base"}, questions, facts, tmp_path / "out", options)
    assert evaluation.complete
    rows = evaluation.rows("base", "knowledge")
    print(evaluation.metrics["base"].knowledge, evaluation.metrics["base"].unparsable)
    assert 40 <= evaluation.metrics["base"].knowledge.estimate <= 80
    items = {item["id"]: item for item in facts.items}
    assert sum(score("exact", items[item], row["answer"])["correct"] for item, row in rows.items()) <= 3
    for row in evaluation.rows("base").values():
        assert row["scores"]["unparsable"] or row["scores"]["value"] is not None or row["scores"]["category"], row
        if "(AQI1" in row["answer"] and "So, the AQI" not in row["answer"]:
            assert row["scores"]["value"] is None, row["answer"]
