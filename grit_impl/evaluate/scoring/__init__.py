"""From what a model wrote to right, wrong or no answer."""

from grit_impl.evaluate.scoring.index import (
    AQI_METRICS,
    NAMES,
    Parsed,
    category_of,
    parse_aqi,
    score_aqi,
)
from grit_impl.evaluate.scoring.registry import SCORERS, find_scorer, score, scorer, truths_of
from grit_impl.evaluate.scoring.scorers import choice as _registers  # noqa: F401
from grit_impl.evaluate.scoring.text import normalise

__all__ = [
    "AQI_METRICS",
    "NAMES",
    "SCORERS",
    "Parsed",
    "category_of",
    "find_scorer",
    "normalise",
    "parse_aqi",
    "score",
    "score_aqi",
    "scorer",
    "truths_of",
]
