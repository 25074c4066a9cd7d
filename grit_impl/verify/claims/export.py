"""That what was trained is what is served: every model is exported, loads in llama.cpp and generates."""

from __future__ import annotations

from pathlib import Path

from grit_impl.record import sha256_file
from grit_impl.statistics.decision import Judgement, Metric
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.claims.registry import claim
from grit_impl.verify.options import PLAN_MODELS


@claim("export.{model}-generates", needs=["export:{model}", "evaluation:{model}"], model=PLAN_MODELS)
def generates(evidence: Evidence, model: str) -> Judgement:
    """The GGUF export of {model} loads in llama.cpp and generates through Ollama's API.

    The evaluation measures the exported file, not the trainer's memory: a file that does not load, or is not the one
    that was exported, would make it an evaluation of something else.
    """
    export = evidence.exports[model]
    path = Path(export["path"])
    if not path.is_file():
        return Judgement("refuted", f"{path.name} does not exist")
    size = Metric("gguf_size", path.stat().st_size / 2**20, unit="MiB", subject=model)
    if sha256_file(path) != export["sha256"]:
        return Judgement("refuted", f"{path.name} changed after its export", (size,))
    answers = [row for suite in ("aqi", "knowledge") for row in evidence.evaluation.rows(model, suite).values()]
    tokens = sum(int(row.get("eval_count") or 0) for row in answers)
    empty = sum(not str(row.get("answer") or "").strip() for row in answers)
    metrics = (Metric("generated_tokens", tokens, unit="tokens", n=len(answers), subject=model), size)
    if not tokens or empty == len(answers):
        return Judgement("refuted", f"{path.name} generated nothing over {len(answers)} prompts", metrics)
    text = f"{path.name} ({size}) answered {len(answers) - empty} of {len(answers)} prompts with {tokens} tokens"
    return Judgement("supported", text, metrics, {"path": path.name, "sha256": export["sha256"]})
