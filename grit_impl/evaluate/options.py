"""What an evaluation can be told: its questions and its thresholds, for `grit evaluate` and for the verification."""

from __future__ import annotations

from dataclasses import dataclass

from grit_impl.evaluate.scoring import AQI_METRICS, SCORERS
from grit_impl.settings import count, percentage, points, points_or_nothing, setting


def metric(text: str) -> str:
    """category, exact or within5"""
    if text not in AQI_METRICS:
        raise ValueError(text)
    return text


@dataclass(frozen=True)
class Questions:
    """Which AQI questions are asked, and how an answer counts."""

    aqi_metric: str = setting("category", "primary AQI accuracy: category, exact or within5", metric)
    aqi_dataset: str = setting("", "questions: JSONL, CSV, parquet or hub id; empty: the frozen AQI set")
    features_field: str = setting("features", "column of the questions in --aqi-dataset")
    answer_field: str = setting("", "column of their answers; empty: aqi_value, else answer")
    allow_overlap: bool = setting(False, "keep questions of --aqi-dataset that occur in the training data")


def scorer(text: str) -> str:
    """the name of a scorer: see --help"""
    if text and text not in SCORERS:
        raise ValueError(text)
    return text


def template(text: str) -> str:
    """a text with {features} in it, where the question goes"""
    if text and "{features}" not in text:
        raise ValueError(text)
    return text


def placeholders(text: str) -> str:
    """a form without digits: small models copy an example's values, so write AQI <number> (<category>)"""
    if any(character.isdigit() for character in text):
        raise ValueError(text)
    return text


def knowledge_by(text: str) -> str:
    """answer or likelihood"""
    if text not in ("answer", "likelihood"):
        raise ValueError(text)
    return text


def think(text: str) -> bool | None:
    """yes or no"""
    if text.lower() not in ("", "none", "yes", "no"):
        raise ValueError(text)
    return {"yes": True, "no": False}.get(text.lower())


@dataclass(frozen=True)
class Asking:
    """How a model is asked, and how its answers are read."""

    scorer: str = setting("", f"how answers are read: {', '.join(SCORERS)}; empty: aqi for indices", scorer)
    prompt: str = setting(
        "", "template around {features}; empty: the AQI instruction for the frozen set alone", template
    )
    answer_format: str = setting("", "form to ask for, with placeholders, e.g. AQI <number> (<category>)", placeholders)
    system: str = setting("", "system prompt; empty: the model's own")
    think: bool | None = setting(None, "let a model that can think before it answers do so: yes or no", think)
    max_tokens: int = setting(160, "tokens of an answer, reasoning included", count)
    knowledge_by: str = setting("answer", "retention by what is answered, or by the likeliest answer", knowledge_by)


@dataclass(frozen=True)
class Thresholds:
    """What is asked of every fine-tuned model, in points of AQI accuracy (exclusive) or percent of the base."""

    min_delta_aqi: float = setting(0.0, "delta_AQI over the base must exceed this many points", points)
    min_delta_over_baseline: float | None = setting(
        None, "points by which GRIT must beat LoRA on AQI; empty: 0 for the hypothesis, no gate", points_or_nothing
    )
    max_speed_loss: float = setting(10.0, "percent of the base's tokens/s that a model may lose", percentage)
    min_retention: float = setting(70.0, "percent of the base's knowledge that must be kept", percentage)
