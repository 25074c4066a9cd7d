"""Which answer a model finds likeliest: on the real engine, and on next tokens that are known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.items import load_aqi, load_knowledge, with_wrong
from grit_impl.evaluate.likelihood import likeliest
from grit_impl.evaluate.session import evaluate
from grit_impl.serve.client import Endpoint, Unanswered

FIXTURES = Path(__file__).parents[2] / "fixtures"
FACTS = 20


class Known:
    """A server that writes the one string it may write, in tokens of known probability."""

    url = "known"

    def __init__(self, tokens: dict[str, list[tuple[str, float]]]) -> None:
        self.tokens = tokens

    def generate(self, model: str, prompt: str, options: Any, **fields: Any) -> Any:
        (text,) = fields["format"]["enum"]
        assert fields["logprobs"] is True
        assert options["temperature"] == 0
        return SimpleNamespace(logprobs=[(token, math.log(p)) for token, p in self.tokens[text]])


def test_the_probability_of_an_answer() -> None:
    """Oracle: products by hand, from behind the opening quote to the closing one; what follows does not count."""
    tokens = {
        "S": [('"', 0.01), ("S", 0.5), ('"', 0.2), ("\n", 0.1)],
        "Si": [('"', 0.01), ("Si", 0.4), ('"', 0.9)],
        "U": [('"U', 0.3), ('"', 1.0)],
    }
    chosen, found = likeliest(Known(tokens), "m", "Symbol?", ["S", "Si", "U"], {})  # type: ignore[arg-type]
    assert chosen == "Si"
    wanted = {"S": 0.5 * 0.2, "Si": 0.4 * 0.9, "U": 0.3}
    assert {text: math.exp(value) for text, value in found.items()} == pytest.approx(wanted)


def test_a_server_without_log_probabilities_is_named(fake_ollama) -> None:
    """Oracle: the fault; never a guess."""
    server = fake_ollama(lambda model, prompt: "late", {"base:latest": "d"}, lambda model: 1.0)
    with Endpoint(server.url, attempts=1) as endpoint, pytest.raises(Unanswered, match="gives no log-probabilities"):
        likeliest(endpoint, "base", "What is the opposite of early?", ["late", "soon"], {})


def test_retention_of_the_tiny_base(tmp_path: Path) -> None:
    """Oracle: two copies retain everything; the answer is the likeliest one, and right if it is the truth."""
    from grit_impl.export import export_merged, write_modelfile
    from grit_impl.serve.server import EmbeddedOllama

    export_merged(FIXTURES / "tiny_llama", None, tmp_path / "base.gguf")
    files = {name: write_modelfile(tmp_path / "base.gguf", tmp_path / f"Modelfile.{name}") for name in ("base", "pure")}
    facts = with_wrong(load_knowledge(FIXTURES / "knowledge_test.jsonl"), FACTS)
    options = EvaluationOptions(progress=False, speed_rounds=0, knowledge_by="likelihood")
    with EmbeddedOllama(files) as server:
        aqi = load_aqi(FIXTURES / "aqi_test.jsonl", limit=2)
        evaluation = evaluate(server.url, {name: name for name in files}, aqi, facts, tmp_path / "out", options)
    assert evaluation.complete
    assert evaluation.metrics["pure"].retention.estimate == 100
    truths = {item["id"]: item["answer"] for item in facts.items}
    for item, row in evaluation.rows("base", "knowledge").items():
        assert set(row["likelihoods"]) > {truths[item]}
        assert all(value < 0 for value in row["likelihoods"].values())
        assert row["answer"] == max(row["likelihoods"], key=row["likelihoods"].get)
        assert row["correct"] == (row["answer"] == truths[item])
