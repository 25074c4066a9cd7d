"""What an evaluation can be told: its questions and its thresholds, for `grit evaluate` and for the verification."""

from __future__ import annotations

from dataclasses import dataclass

from grit_impl.evaluate.scoring import AQI_METRICS
from grit_impl.settings import percentage, points, points_or_nothing, setting


def metric(text: str) -> str:
    """category, exact or within5"""
    if text not in AQI_METRICS:
        raise ValueError(text)
    return text


@dataclass(frozen=True)
class Questions:
    """Which AQI questions are asked, and how an answer counts."""

    aqi_metric: str = setting("category", "primary AQI accuracy: category, exact or within5", metric)
    aqi_dataset: str = setting("", "AQI questions: JSONL, CSV, parquet or hub id; empty: the frozen set")
    features_field: str = setting("features", "column of the AQI questions in --aqi-dataset")
    answer_field: str = setting("", "column of their answers; empty: aqi_value")
    allow_overlap: bool = setting(False, "keep questions of --aqi-dataset that occur in the training data")


@dataclass(frozen=True)
class Thresholds:
    """What is asked of every fine-tuned model, in points of AQI accuracy (exclusive) or percent of the base."""

    min_delta_aqi: float = setting(0.0, "delta_AQI over the base must exceed this many points", points)
    min_delta_over_baseline: float | None = setting(
        None, "points by which GRIT must beat LoRA on AQI; empty: 0 for the hypothesis, no gate", points_or_nothing
    )
    max_speed_loss: float = setting(10.0, "percent of the base's tokens/s that a model may lose", percentage)
    min_retention: float = setting(70.0, "percent of the base's knowledge that must be kept", percentage)
