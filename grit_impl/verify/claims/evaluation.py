"""What fine-tuning did to the served models: AQI accuracy gained, knowledge kept, speed kept."""

from __future__ import annotations

from dataclasses import replace

from grit_impl.statistics.decision import Judgement
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.claims.measures import measured
from grit_impl.verify.claims.registry import claim
from grit_impl.verify.options import PLAN_ARMS, Options

DEFAULT = Options()
NEEDS = ("evaluation:base", "evaluation:{model}")


@claim("evaluation.fine-tuning-works", needs=["evaluation:base", "evaluation:baseline"])
def fine_tunes(evidence: Evidence) -> Judgement:
    """Plain LoRA raises AQI category accuracy over the base by at least --min-fine-tuning-gain points
    (default {DEFAULT.min_fine_tuning_gain:g}).

    If ordinary fine-tuning does not show, the data, the labels or the export are broken, and no optimizer can be
    judged. Measured through the HTTP endpoint on the exported GGUF.
    """
    return _gate(evidence, "delta_aqi", "baseline", evidence.options.min_fine_tuning_gain, "aqi_accuracy")


@claim("evaluation.{model}-delta-aqi", needs=NEEDS, model=PLAN_ARMS, gates=[arm != "hybrid" for arm in PLAN_ARMS])
def gains(evidence: Evidence, model: str) -> Judgement:
    """{model} answers more AQI items correctly than the base model.

    Same items for both models, so the interval of the paired difference decides.
    """
    return _gate(evidence, "delta_aqi", model, evidence.options.min_delta_aqi, "aqi_accuracy", strictly=True)


@claim("evaluation.{model}-speed", needs=NEEDS, model=PLAN_ARMS)
def keeps_speed(evidence: Evidence, model: str) -> Judgement:
    """{model} is served at most --max-speed-loss percent (default {DEFAULT.max_speed_loss:g}) slower than the base
    model.

    A merged adapter has the base's shape; a slower model was exported differently.
    """
    return _gate(evidence, "delta_speed", model, -evidence.options.max_speed_loss, "tokens_per_second")


@claim("evaluation.{model}-retention", needs=NEEDS, model=PLAN_ARMS)
def keeps_knowledge(evidence: Evidence, model: str) -> Judgement:
    """{model} keeps at least --min-retention percent (default {DEFAULT.min_retention:g}) of what the base model knew.

    A gain on AQI that costs everything else is no improvement.
    """
    return _gate(evidence, "retention", model, evidence.options.min_retention, "knowledge")


def _gate(evidence: Evidence, name: str, model: str, bound: float, beside: str, *, strictly: bool = False) -> Judgement:
    """The evaluation's own rule, with the two models' values beside the difference."""
    from grit_impl.evaluate.gates import decide

    judged = decide(evidence.evaluation, name, model, bound, strictly=strictly)
    return replace(judged, metrics=(*judged.metrics, *(measured(evidence, each, beside) for each in ("base", model))))
