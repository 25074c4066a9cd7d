"""The EPA index: the rule's table, the EPA's examples, an independent implementation, and the generator's promises."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.recipes.datasets import AQI_TRAINING_ITEMS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "aqi_test.jsonl"

# Table 2 of 40 CFR 58 App. G (2024), typed again, as first and last concentration of every row.
TABLE = {
    "PM2.5": "0.0 9.0|9.1 35.4|35.5 55.4|55.5 125.4|125.5 225.4|225.5 325.4",
    "PM10": "0 54|55 154|155 254|255 354|355 424|425 604",
    "O3": "0.000 0.054|0.055 0.070|0.071 0.085|0.086 0.105|0.106 0.200|",
    "O3 1h": "||0.125 0.164|0.165 0.204|0.205 0.404|0.405 0.604",
    "CO": "0.0 4.4|4.5 9.4|9.5 12.4|12.5 15.4|15.5 30.4|30.5 50.4",
    "SO2": "0 35|36 75|76 185|186 304||",
    "SO2 24h": "||||305 604|605 1004",
    "NO2": "0 53|54 100|101 360|361 649|650 1249|1250 2049",
}
LADDER = [(0, 50), (51, 100), (101, 150), (151, 200), (201, 300), (301, 500)]
ROWS = [
    pytest.param(pollutant, *row.split(), *LADDER[level], id=f"{pollutant}-{LADDER[level][0]}")
    for pollutant, rows in TABLE.items()
    for level, row in enumerate(rows.split("|"))
    if row
]


@pytest.mark.parametrize(("pollutant", "low", "high", "first", "last"), ROWS)
def test_every_breakpoint_edge(pollutant: str, low: str, high: str, first: int, last: int) -> None:
    """Oracle: the table of the rule, typed a second time from the regulation."""
    assert aqi.pollutant_aqi(pollutant, low) == first
    assert aqi.pollutant_aqi(pollutant, high) == last
    assert aqi.category(first) == aqi.category(last)


@pytest.mark.parametrize(("pollutant", "low", "high", "first", "last"), ROWS)
def test_truncation_never_rounds_up_into_the_next_row(
    pollutant: str, low: str, high: str, first: int, last: int
) -> None:
    """Oracle: the rule's truncation; 0.0549 ppm of ozone is 0.054 and still Good."""
    unit = Decimal(1).scaleb(Decimal(high).as_tuple().exponent)
    assert aqi.pollutant_aqi(pollutant, Decimal(high) + unit * Decimal("0.99")) == last


@pytest.mark.parametrize(
    ("pollutant", "concentration", "expected"),
    [("O3", 0.07853333, 126), ("PM2.5", 35.9, 102), ("CO", 8.4, 90)],
)
def test_published_examples(pollutant: str, concentration: float, expected: int) -> None:
    """Oracle: the worked examples of EPA's technical assistance document for AQI reporting (section IV)."""
    assert aqi.pollutant_aqi(pollutant, concentration) == expected


def test_published_example_that_is_rounded_up() -> None:
    """Oracle: Equation 1 by hand, 101 + 49 / 0.039 * 0.037 = 147.49; the document prints 148, against its own rule."""
    assert aqi.pollutant_aqi("O3 1h", 0.162) == 147


def test_published_example_of_several_pollutants() -> None:
    """Oracle: the same document's example of three pollutants, where ozone decides with 126."""
    result = aqi.overall_aqi({"O3": 0.078, "PM2.5": 35.9, "CO": 8.4})
    assert result == aqi.AQI(126, "Unhealthy for Sensitive Groups", "O3")


# python-aqi has the breakpoints of 2012: these ranges were not revised since, below its split of 301-500 in two.
UNCHANGED = [
    ("pm10", "PM10", 0, 424, 1),
    ("co_8h", "CO", 0, 304, 10),
    ("so2_1h", "SO2", 0, 304, 1),
    ("no2_1h", "NO2", 0, 1249, 1),
    ("o3_1h", "O3 1h", 125, 404, 1000),
    ("pm25", "PM2.5", 355, 554, 10),
]

# Exactly 12.5: python-aqi rounds a half to the even 12, the regulations' convention is upwards.
TIES = {("CO", "1.1"): 13}


@pytest.mark.parametrize(("theirs", "ours", "first", "last", "scale"), UNCHANGED, ids=[row[1] for row in UNCHANGED])
def test_agrees_with_python_aqi(theirs: str, ours: str, first: int, last: int, scale: int) -> None:
    """Oracle: PyPI's python-aqi at every concentration whose breakpoints did not change."""
    reference = pytest.importorskip("aqi", reason="python-aqi is not installed")
    wrong = {}
    for step in range(first, last + 1):
        value = str(Decimal(step) / scale)
        expected = int(reference.to_iaqi(theirs, value, algo=reference.ALGO_EPA))
        if aqi.pollutant_aqi(ours, value) != expected and (ours, value) not in TIES:
            wrong[value] = (aqi.pollutant_aqi(ours, value), expected)
    assert not wrong
    assert all(aqi.pollutant_aqi(name, value) == expected for (name, value), expected in TIES.items())


def test_the_revision_moved_fine_particles() -> None:
    """Oracle: the final rule: 12 ug/m3 was Good until May 2024 and is Moderate since; 225.5 became Hazardous."""
    assert aqi.overall_aqi({"PM2.5": 12.0}).category == "Moderate"
    assert aqi.overall_aqi({"PM2.5": 225.5}).category == "Hazardous"


def test_beyond_500_the_last_row_goes_on() -> None:
    """Oracle: Equation 1 by hand, with the row 225.5-325.4: 301 + 199 / 99.9 * (425.3 - 225.5) = 699."""
    assert aqi.overall_aqi({"PM2.5": 425.3}) == aqi.AQI(699, "Hazardous", "PM2.5")


def test_blank_cells_of_the_table_ask_for_the_other_averaging_time() -> None:
    """Oracle: Table 2's blank cells and footnotes."""
    assert aqi.pollutant_aqi("O3", 0.201) is None
    assert aqi.pollutant_aqi("O3 1h", 0.124) is None
    assert aqi.pollutant_aqi("SO2", 305) is None
    assert aqi.overall_aqi({"O3": 0.25, "O3 1h": 0.41}).category == "Hazardous"
    assert aqi.overall_aqi({"SO2": 400, "SO2 24h": 100}) == aqi.AQI(200, "Unhealthy", "SO2")
    for concentrations, other in (({"O3": 0.25}, "O3 1h"), ({"SO2": 400}, "SO2 24h"), ({"O3 1h": 0.1}, "O3")):
        with pytest.raises(GRITError, match=f"give {other} as well"):
            aqi.overall_aqi(concentrations)


@pytest.mark.parametrize("value", [-1, "abc", float("nan"), float("inf"), None])
def test_bad_concentrations_are_named(value: object) -> None:
    """Oracle: the message has the pollutant and the value."""
    with pytest.raises(GRITError, match="PM10 concentration"):
        aqi.overall_aqi({"PM10": value})  # type: ignore[dict-item]


def test_unknown_pollutant_and_nothing_at_all() -> None:
    """Oracle: the messages name the thing."""
    with pytest.raises(GRITError, match="unknown pollutant 'radon'"):
        aqi.overall_aqi({"radon": 1})
    with pytest.raises(GRITError, match="at least one pollutant"):
        aqi.overall_aqi({})


@given(st.sampled_from(["PM2.5", "PM10", "CO", "NO2"]), st.floats(0, 3000), st.floats(0, 3000))
def test_more_pollution_is_never_a_lower_index(pollutant: str, first: float, second: float) -> None:
    """Oracle: Equation 1 is monotone in the concentration."""
    low, high = sorted((first, second))
    assert (aqi.pollutant_aqi(pollutant, low) or 0) <= (aqi.pollutant_aqi(pollutant, high) or 0)


@given(st.dictionaries(st.sampled_from(["PM2.5", "PM10", "CO", "NO2"]), st.floats(0, 500), min_size=1))
def test_overall_is_the_worst(concentrations: dict[str, float]) -> None:
    """Oracle: the definition, through the single-pollutant function."""
    result = aqi.overall_aqi(concentrations)
    assert result.value == max(aqi.pollutant_aqi(name, value) or 0 for name, value in concentrations.items())
    assert result.value == aqi.pollutant_aqi(result.pollutant, concentrations[result.pollutant])


def test_frozen_set_is_what_the_generator_makes() -> None:
    """Oracle: the file in fixtures/; editing it or changing the generator breaks the comparison of past results."""
    items = [json.loads(line) for line in FIXTURE.read_text().splitlines()]
    assert items == aqi.frozen_items()
    assert len(items) >= 400
    assert len({item["id"] for item in items}) == len(items)


def test_items_say_what_the_rule_says() -> None:
    """Oracle: the value recomputed from the numbers in the text, not from the stored concentrations."""
    for item in aqi.frozen_items():
        parts = [part.rsplit(" ", 2) for part in item["features"].split(", ")]
        assert {name: unit for name, _, unit in parts} == {n: aqi.SCALES[n].unit for n in item["concentrations"]}
        result = aqi.overall_aqi({name: value for name, value, _ in parts})
        assert result == (item["aqi_value"], item["category"], item["pollutant"])


@pytest.mark.parametrize("seed", [0, 1, 42, 3407, aqi.TEST_SEED])
def test_training_never_contains_a_test_question(seed: int) -> None:
    """Oracle: sets of concentrations, so that another order of the same pollutants counts as the same question."""
    frozen = aqi.frozen_items()

    def key(item: dict[str, object]) -> str:
        return ", ".join(sorted(str(item["features"]).split(", ")))

    training = {key(item) for item in aqi.generate(AQI_TRAINING_ITEMS, seed, exclude=frozen)}
    assert len(training) == AQI_TRAINING_ITEMS
    assert not training & {key(item) for item in frozen}
    # The exclusion does something: the test set's own seed would repeat it.
    assert seed != aqi.TEST_SEED or {key(item) for item in aqi.generate(420, seed)} == {key(item) for item in frozen}


def test_categories_and_pollutants_are_balanced() -> None:
    """Oracle: equal shares of 1/6, within two points."""
    items = aqi.generate(1800, 5)
    for field, count in (("category", 6), ("pollutant", 6)):
        shares = Counter(item[field].split(" 1h")[0].split(" 24h")[0] for item in items)
        assert len(shares) == count
        tolerance = 0.02 if field == "category" else 0.05  # a second pollutant may tie or win
        assert all(abs(n / len(items) - 1 / 6) < tolerance for n in shares.values())


def test_a_seed_fixes_the_items() -> None:
    """Oracle: two calls; another seed differs."""
    assert aqi.generate(50, 7) == aqi.generate(50, 7) != aqi.generate(50, 8)
