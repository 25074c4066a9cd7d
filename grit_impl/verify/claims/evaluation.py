"""What fine-tuning did to the served models: AQI accuracy gained, knowledge kept, speed kept."""

from __future__ import annotations

from collections.abc import Callable

from grit_impl.verify.claims.base import Claim, Evidence, Judgement, decide_at_least
from grit_impl.verify.claims.measures import GATE_CONFIDENCE, measured, unanswered
from grit_impl.verify.options import PLAN_ARMS


def gains(model: str) -> Callable[[Evidence], Judgement]:
    """delta_AQI above `--min-delta-aqi`."""

    def decide(evidence: Evidence) -> Judgement:
        delta = measured(evidence, model, "delta_aqi", GATE_CONFIDENCE)
        judged = decide_at_least(delta, evidence.options.min_delta_aqi, f"delta_AQI of {model}", strictly=True)
        return _with(judged, evidence, model, "aqi_accuracy")

    return decide


def fine_tunes(evidence: Evidence) -> Judgement:
    """The baseline's gain reaches `--min-fine-tuning-gain`."""
    delta = measured(evidence, "baseline", "delta_aqi", GATE_CONFIDENCE)
    judged = decide_at_least(delta, evidence.options.min_fine_tuning_gain, "gain of plain LoRA over the base")
    return _with(judged, evidence, "baseline", "aqi_accuracy")


def keeps_speed(model: str) -> Callable[[Evidence], Judgement]:
    """delta_speed not below minus `--max-speed-loss`."""

    def decide(evidence: Evidence) -> Judgement:
        delta = measured(evidence, model, "delta_speed", GATE_CONFIDENCE)
        judged = decide_at_least(delta, -evidence.options.max_speed_loss, f"delta_speed of {model}")
        return _with(judged, evidence, model, "tokens_per_second")

    return decide


def keeps_knowledge(model: str) -> Callable[[Evidence], Judgement]:
    """Retention reaches `--min-retention`."""

    def decide(evidence: Evidence) -> Judgement:
        kept = measured(evidence, model, "retention", GATE_CONFIDENCE)
        judged = decide_at_least(kept, evidence.options.min_retention, f"knowledge kept by {model}")
        return _with(judged, evidence, model, "knowledge")

    return decide


def _with(judged: Judgement, evidence: Evidence, model: str, name: str) -> Judgement:
    beside = (measured(evidence, "base", name), measured(evidence, model, name))
    silent = unanswered(evidence, "base", model)
    if silent:
        text = f"{len(silent)} items have no trustworthy answer, e.g. {silent[0]}"
        return Judgement("inconclusive", text, judged.metrics + beside, {"unanswered": silent})
    return Judgement(judged.verdict, judged.summary, judged.metrics + beside, judged.evidence, judged.needed)


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
