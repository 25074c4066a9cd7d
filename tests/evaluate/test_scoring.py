"""The parser on what models really write, and the scores on cases with known truth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_impl import aqi
from grit_impl.evaluate.scoring import NAMES, Parsed, category_of, parse_aqi, score_aqi

GOOD, MODERATE, USG, UNHEALTHY, VERY, HAZARDOUS = NAMES

# answer: (value, category, note). Written by hand; a person reading the answer is the oracle.
ANSWERS = {
    "AQI 57 (Moderate)": (57, MODERATE, ""),
    " 57 ": (57, MODERATE, ""),
    "The AQI is fifty-seven, which is moderate.": (57, MODERATE, ""),
    "one hundred and twelve": (112, USG, ""),
    "AQI=57": (57, MODERATE, ""),
    "AQI57": (57, MODERATE, ""),
    "AQI-57": (57, MODERATE, ""),
    "**AQI:** `57`": (57, MODERATE, ""),
    r"$\boxed{57}$": (57, MODERATE, ""),
    "AQI \uff15\uff17": (57, MODERATE, ""),
    "57/500": (57, MODERATE, ""),
    "57 out of 500": (57, MODERATE, ""),
    "AQI 57,5": (57.5, MODERATE, ""),
    "AQI 50.6": (50.6, MODERATE, ""),
    # a stated category beats the implied one: what the model said is what it is judged by
    "AQI 57 (Good)": (57, GOOD, ""),
    # several numbers
    "12.1 \u00b5g/m\u00b3 gives AQI 57": (57, MODERATE, ""),
    "For PM2.5 35.4 the 24-hour AQI is 99.": (99, MODERATE, ""),
    "PM2.5 AQI is 40, ozone AQI is 57; the overall AQI is 57 (Moderate)": (57, MODERATE, ""),
    "PM2.5 AQI is 40, ozone AQI is 157; the overall AQI is 157": (157, UNHEALTHY, ""),
    "AQI 57. No, AQI 157.": (None, None, "several numbers"),
    "57 or 58": (None, MODERATE, "several numbers"),
    "PM2.5 12.0, O3 0.061 ppm": (None, None, "no answer"),
    "SO2 89.2 ppb -> AQI 107 (Unhealthy for Sensitive Groups)": (107, USG, ""),
    # ranges and bounds are no exact values
    "AQI: 51-100": (None, MODERATE, "range"),
    "between 51 and 100": (None, MODERATE, "range"),
    "AQI 51\u2013150": (None, None, "range"),
    "AQI is above 300": (None, HAZARDOUS, "bound"),
    "301+": (None, HAZARDOUS, "bound"),
    "< 50": (None, GOOD, "bound"),
    "AQI over 100": (None, None, "bound"),
    # categories
    "Moderate": (None, MODERATE, "category only"),
    "very unhealthy": (None, VERY, "category only"),
    "USG": (None, USG, "category only"),
    "AQI 120 (Unhealthy for Sens": (120, USG, ""),
    "AQI 57 (Moderate). Unhealthy for sensitive groups starts at 101.": (57, MODERATE, ""),
    "good or moderate": (None, None, "several categories"),
    "not good": (None, None, "no answer"),
    "Good question! The AQI is 57.": (57, MODERATE, ""),
    # other languages: the number counts, foreign category words do not
    "El AQI es 57 (Moderado)": (57, MODERATE, ""),
    "\u7a7a\u6c14\u8d28\u91cf\u6307\u6570\u4e3a57": (57, MODERATE, ""),
    "qualit\u00e9 mod\u00e9r\u00e9e": (None, None, "no answer"),
    # refusals and nonsense
    "I'm sorry, I cannot predict the air quality.": (None, None, "refusal"),
    "As an AI, I have no data from 2024.": (None, None, "refusal"),
    "I cannot be sure, but the AQI is 57.": (57, MODERATE, ""),
    "": (None, None, "empty"),
    "### Instruction: AQI 57": (None, None, "empty"),
    "AQI 57 (Moderate)\n### Instruction: AQI 99": (57, MODERATE, ""),
    "<think>AQI 99? no</think>AQI 57": (57, MODERATE, ""),
    "AQI -5": (-5, None, "out of range"),
    "AQI 1,000": (1000, None, "out of range"),
    "AQI 20240506": (20240506, None, "out of range"),
    "Paris is the capital of France.": (None, None, "no answer"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_read_as_a_person_reads_them(answer: str) -> None:
    """Oracle: the table, written by hand."""
    parsed = parse_aqi(answer)
    assert (parsed.value, parsed.category, parsed.note) == ANSWERS[answer]
    assert parsed.unparsable == (ANSWERS[answer][:2] == (None, None))


def test_right_answers_in_the_trained_format_score_fully() -> None:
    """Oracle: the training format itself, over every category and pollutant."""
    for item in aqi.generate(300, seed=5):
        scores = score_aqi(item, aqi.answer(item))
        assert (scores["exact"], scores["within5"], scores["category_right"]) == (True, True, True), item
        assert scores["absolute_error"] == 0


@pytest.mark.parametrize("category", NAMES)
def test_the_form_that_is_trained_is_read_as_it_stands(category: str) -> None:
    """Oracle: the form itself."""
    for value in range(0, 600, 7):
        assert parse_aqi(f"AQI {value} ({category})") == Parsed(value, category, True)


@given(st.integers(0, 500), st.sampled_from(["AQI {}", "{}", "The AQI is {}.", "AQI: {} ({c})", "{c}, AQI {}"]))
def test_any_index_survives_any_phrasing(value: int, phrase: str) -> None:
    """Oracle: the number that was written."""
    parsed = parse_aqi(phrase.format(value, c=category_of(value)))
    assert parsed.value == value
    assert parsed.category == category_of(value)


@given(st.text(max_size=200))
def test_any_text_is_accepted(text: str) -> None:
    """Oracle: the contract; never an exception, and unparsable exactly when nothing was found."""
    parsed = parse_aqi(text)
    assert parsed.unparsable == (parsed.value is None and parsed.category is None)
    assert parsed.note or not parsed.unparsable


@pytest.mark.parametrize(
    ("answer", "exact", "within5", "category", "error"),
    [
        ("AQI 98 (Moderate)", True, True, True, 0),
        ("AQI 103 (Unhealthy for Sensitive Groups)", False, True, False, 5),
        ("AQI 104", False, False, False, 6),
        ("Moderate", False, False, True, None),
        ("nothing", False, False, False, None),
    ],
)
def test_scores(answer: str, exact: bool, within5: bool, category: bool, error: float | None) -> None:
    """Oracle: by hand, for a true index of 98."""
    scores = score_aqi({"aqi_value": 98, "category": MODERATE}, answer)
    assert scores["exact"] is exact
    assert scores["within5"] is within5
    assert scores["category_right"] is category
    assert scores["absolute_error"] == error


def test_a_truth_without_a_value_has_no_exact_score() -> None:
    """Oracle: a data set of categories only cannot say whether 57 is exact."""
    scores = score_aqi({"aqi_value": None, "category": MODERATE}, "AQI 57")
    assert scores["category_right"] is True
    assert scores["exact"] is None
    assert scores["absolute_error"] is None
