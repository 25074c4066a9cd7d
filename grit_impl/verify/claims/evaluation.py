"""What fine-tuning did to the served models: AQI accuracy gained, knowledge kept, speed kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from grit_impl.statistics.decision import Judgement
from grit_impl.verify.claims.base import Claim, Evidence
from grit_impl.verify.claims.measures import measured
from grit_impl.verify.options import PLAN_ARMS


def gains(model: str) -> Callable[[Evidence], Judgement]:
    """delta_AQI above `--min-delta-aqi`."""

    def decide(evidence: Evidence) -> Judgement:
        return _gate(evidence, "delta_aqi", model, evidence.options.min_delta_aqi, "aqi_accuracy", strictly=True)

    return decide


def fine_tunes(evidence: Evidence) -> Judgement:
    """The baseline's gain reaches `--min-fine-tuning-gain`."""
    return _gate(evidence, "delta_aqi", "baseline", evidence.options.min_fine_tuning_gain, "aqi_accuracy")


def keeps_speed(model: str) -> Callable[[Evidence], Judgement]:
    """delta_speed not below minus `--max-speed-loss`."""

    def decide(evidence: Evidence) -> Judgement:
        return _gate(evidence, "delta_speed", model, -evidence.options.max_speed_loss, "tokens_per_second")

    return decide


def keeps_knowledge(model: str) -> Callable[[Evidence], Judgement]:
    """Retention reaches `--min-retention`."""

    def decide(evidence: Evidence) -> Judgement:
        return _gate(evidence, "retention", model, evidence.options.min_retention, "knowledge")

    return decide


def _gate(evidence: Evidence, name: str, model: str, bound: float, beside: str, *, strictly: bool = False) -> Judgement:
    """The evaluation's own rule, with the two models' values beside the difference."""
    from grit_impl.evaluate.gates import decide

    judged = decide(evidence.evaluation, name, model, bound, strictly=strictly)
    return replace(judged, metrics=(*judged.metrics, *(measured(evidence, each, beside) for each in ("base", model))))


CLAIMS = (
    Claim(
        "evaluation.fine-tuning-works",
        "Plain LoRA raises AQI category accuracy over the base by at least --min-fine-tuning-gain points (default 20).",
        ("evaluation:base", "evaluation:baseline"),
        "If ordinary fine-tuning does not show, the data, the labels or the export are broken, and no optimizer can "
        "be judged. Measured through the HTTP endpoint on the exported GGUF.",
        fine_tunes,
    ),
    *(
        Claim(
            f"evaluation.{arm}-delta-aqi",
            f"{arm.capitalize()} answers more AQI items correctly than the base model.",
            ("evaluation:base", f"evaluation:{arm}"),
            "Same items for both models, so the interval of the paired difference decides.",
            gains(arm),
            gates=arm != "hybrid",
        )
        for arm in PLAN_ARMS
    ),
    *(
        Claim(
            f"evaluation.{arm}-speed",
            f"{arm.capitalize()} is served at most --max-speed-loss percent (default 10) slower than the base model.",
            ("evaluation:base", f"evaluation:{arm}"),
            "A merged adapter has the base's shape; a slower model was exported differently.",
            keeps_speed(arm),
        )
        for arm in PLAN_ARMS
    ),
    *(
        Claim(
            f"evaluation.{arm}-retention",
            f"{arm.capitalize()} keeps at least --min-retention percent (default 70) of what the base model knew.",
            ("evaluation:base", f"evaluation:{arm}"),
            "A gain on AQI that costs everything else is no improvement.",
            keeps_knowledge(arm),
        )
        for arm in PLAN_ARMS
    ),
)
