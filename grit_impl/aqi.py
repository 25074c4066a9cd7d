"""The US EPA air quality index, and exactly labelled questions about it.

Source: 40 CFR Part 58, Appendix G, Table 2 and Equation 1, as revised in 2024 (89 FR 16202, in force since 6 May
2024). Concentrations are truncated as section 12 says (PM2.5 and CO to 0.1, O3 to 0.001 ppm, PM10, SO2 and NO2 to
integers), each is interpolated linearly within its row, and the overall index is the worst pollutant's.

Above 500 the last row is extended with its own slope, as the appendix prescribes. Eight-hour ozone defines no index
above 300, nor one-hour ozone below 101; one-hour SO2 defines none above 200, nor 24-hour SO2 below 201.

Units: PM in ug/m3, O3 and CO in ppm, SO2 and NO2 in ppb. Nothing here imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal, InvalidOperation
from itertools import product
from typing import Any, NamedTuple

from grit_impl.errors import GRITError

CATEGORIES = {
    "Good": (0, 50),
    "Moderate": (51, 100),
    "Unhealthy for Sensitive Groups": (101, 150),
    "Unhealthy": (151, 200),
    "Very Unhealthy": (201, 300),
    "Hazardous": (301, 500),
}
"""Category names with the first and last index value of each (Hazardous also holds everything above 500)."""

INSTRUCTION = "Predict AQI given: {features}"
ANSWER = "AQI {value} ({category})"
TEST_SEED, TEST_SIZE = 20240506, 420
MULTIPLE_SHARE = 0.15
"""Share of generated items that list two or three pollutants instead of one."""


class AQI(NamedTuple):
    """An index value, its category, and the pollutant that determines it."""

    value: int
    category: str
    pollutant: str


@dataclass(frozen=True)
class Scale:
    """One pollutant's rows of Table 2.

    Args:
        unit: Unit of the concentrations.
        edges: First and last concentration of each category that the pollutant defines, at the rule's precision.
        first: Position in `CATEGORIES` of the first row.
        decimals: Digits after the point that are kept by truncation.
        printed: Digits after the point in generated features: one more than the rule keeps where a category
            spans few values, so that questions stay distinct and truncation matters.
    """

    unit: str
    edges: tuple[tuple[str, str], ...]
    first: int
    decimals: int
    printed: int

    def index(self, concentration: Decimal) -> int | None:
        """Equation 1 for an already truncated concentration; `None` where the table defines no value."""
        ladder = list(CATEGORIES.values())[self.first :]
        if concentration < Decimal(self.edges[0][0]):
            return None
        for (low, high), (index_low, index_high) in zip(self.edges, ladder, strict=False):
            last = index_high == 500
            if concentration <= Decimal(high) or last:
                slope = Decimal(index_high - index_low) / (Decimal(high) - Decimal(low))
                value = slope * (concentration - Decimal(low)) + index_low
                return int(value.quantize(Decimal(1), rounding=ROUND_HALF_UP))
        return None


def _rows(*edges: str) -> tuple[tuple[str, str], ...]:
    return tuple((low, high) for low, high in (edge.split("-") for edge in edges))


SCALES = {
    "PM2.5": Scale(
        "ug/m3", _rows("0.0-9.0", "9.1-35.4", "35.5-55.4", "55.5-125.4", "125.5-225.4", "225.5-325.4"), 0, 1, 1
    ),
    "PM10": Scale("ug/m3", _rows("0-54", "55-154", "155-254", "255-354", "355-424", "425-604"), 0, 0, 1),
    "O3": Scale("ppm", _rows("0.000-0.054", "0.055-0.070", "0.071-0.085", "0.086-0.105", "0.106-0.200"), 0, 3, 4),
    "O3 1h": Scale("ppm", _rows("0.125-0.164", "0.165-0.204", "0.205-0.404", "0.405-0.604"), 2, 3, 4),
    "CO": Scale("ppm", _rows("0.0-4.4", "4.5-9.4", "9.5-12.4", "12.5-15.4", "15.5-30.4", "30.5-50.4"), 0, 1, 2),
    "SO2": Scale("ppb", _rows("0-35", "36-75", "76-185", "186-304"), 0, 0, 1),
    "SO2 24h": Scale("ppb", _rows("305-604", "605-1004"), 4, 0, 1),
    "NO2": Scale("ppb", _rows("0-53", "54-100", "101-360", "361-649", "650-1249", "1250-2049"), 0, 0, 1),
}
"""Breakpoints by the name used in features. `O3` is the 8-hour mean, `SO2` the 1-hour value."""

POLLUTANTS = ("PM2.5", "PM10", "O3", "CO", "SO2", "NO2")


def category(value: int) -> str:
    """Name of the category that holds an index value (>= 0)."""
    for name, (_, high) in CATEGORIES.items():
        if value <= high:
            return name
    return "Hazardous"


def truncate(pollutant: str, concentration: float | str | Decimal) -> Decimal:
    """The concentration at the rule's precision: cut, never rounded.

    Raises:
        GRITError: unknown pollutant, or a concentration that is negative or not a number.
    """
    if pollutant not in SCALES:
        raise GRITError(f"unknown pollutant {pollutant!r}: use one of {', '.join(SCALES)}")
    try:
        # str() first: Decimal(35.4) would be 35.39999..., which truncates to 35.3
        number = Decimal(str(concentration))
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or number < 0:
        raise GRITError(f"{pollutant} concentration {concentration!r} is not a number >= 0")
    return number.quantize(Decimal(1).scaleb(-SCALES[pollutant].decimals), rounding=ROUND_DOWN)


def pollutant_aqi(pollutant: str, concentration: float | str | Decimal) -> int | None:
    """Index of one pollutant, or `None` where Table 2 defines none (for example 8-hour ozone above 0.200 ppm).

    Raises:
        GRITError: as `truncate`.
    """
    truncated = truncate(pollutant, concentration)
    return SCALES[pollutant].index(truncated)


def overall_aqi(concentrations: Mapping[str, float | str | Decimal]) -> AQI:
    """The worst pollutant's index.

    One-hour SO2 above its scale counts as 200 when a 24-hour value is given that stays below its own scale (EPA's
    technical assistance document, "Calculating AQI values for SO2").

    Args:
        concentrations: Concentration by pollutant name, in the units of `SCALES`.

    Raises:
        GRITError: an unknown pollutant, a bad number, or concentrations of which none defines an index; the
            message names the averaging time that would.
    """
    indices = {name: pollutant_aqi(name, value) for name, value in concentrations.items()}
    if {"SO2", "SO2 24h"} <= indices.keys() and indices["SO2"] is None and indices["SO2 24h"] is None:
        indices["SO2"] = 200
    defined = {name: value for name, value in indices.items() if value is not None}
    for name, other in (("O3", "O3 1h"), ("O3 1h", "O3"), ("SO2", "SO2 24h"), ("SO2 24h", "SO2")):
        if name in indices and name not in defined and other not in defined:
            raise GRITError(f"{name} {concentrations[name]} defines no AQI by itself: give {other} as well")
    if not defined:
        raise GRITError("no concentrations: give at least one pollutant")
    worst = max(defined, key=lambda name: defined[name])
    return AQI(defined[worst], category(defined[worst]), worst)


def instruction(item: Mapping[str, Any]) -> str:
    """The question about an item."""
    return INSTRUCTION.format(features=item["features"])


def answer(item: Mapping[str, Any]) -> str:
    """The right answer to an item, in the format the models are trained on."""
    return ANSWER.format(value=item["aqi_value"], category=item["category"])


def _draw(pollutant: str, level: int, random_: random.Random) -> tuple[str, str]:
    """A pollutant's name with the averaging time that defines this category, and a printed concentration."""
    for name in (pollutant, f"{pollutant} 1h", f"{pollutant} 24h"):
        scale = SCALES.get(name)
        if scale and 0 <= level - scale.first < len(scale.edges):
            low, high = (Decimal(edge) for edge in scale.edges[level - scale.first])
            step = Decimal(1).scaleb(-scale.printed)
            # Up to the last value that still truncates into the row.
            top = high + Decimal(1).scaleb(-scale.decimals) - step
            return name, str(low.quantize(step) + step * random_.randint(0, int((top - low) / step)))
    raise AssertionError(f"{pollutant} has no scale for category {level}")


def generate(n: int, seed: int, exclude: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Distinct items, balanced over the 6 categories and 6 pollutants.

    Args:
        n: Number of items.
        seed: Equal seeds give equal items.
        exclude: Items (with `concentrations`) that must not occur, in any order of their pollutants.

    Returns:
        Dictionaries with `id`, `features` (text), `concentrations` (name -> float), `aqi_value`, `category` and
        `pollutant` (the one that determines the value).
    """
    random_ = random.Random(seed)
    seen = {_key(item["concentrations"]) for item in exclude}
    cells = list(product(range(len(CATEGORIES)), POLLUTANTS))
    items: list[dict[str, Any]] = []
    while len(items) < n:
        random_.shuffle(cells)
        for level, pollutant in cells[: n - len(items)]:
            multiple = random_.random() < MULTIPLE_SHARE
            for attempt in range(1000):
                # A cell with few printable values is exhausted some time; combinations never are.
                values = _values(level, pollutant, multiple or attempt > 100, random_)
                result = overall_aqi(values)
                if result.category == list(CATEGORIES)[level] and _key(values) not in seen:
                    break
            seen.add(_key(values))
            items.append(
                {
                    "id": f"aqi-{seed}-{len(items):04d}",
                    "features": ", ".join(f"{name} {value} {SCALES[name].unit}" for name, value in values.items()),
                    "concentrations": {name: float(value) for name, value in values.items()},
                    "aqi_value": result.value,
                    "category": result.category,
                    "pollutant": result.pollutant,
                }
            )
    return items


def _values(level: int, pollutant: str, multiple: bool, random_: random.Random) -> dict[str, str]:
    drawn = [_draw(pollutant, level, random_)]
    if multiple:
        others = [name for name in POLLUTANTS if name != pollutant]
        for other in random_.sample(others, random_.choice((1, 1, 2))):
            drawn.append(_draw(other, random_.randint(0, level), random_))
        random_.shuffle(drawn)
    return dict(drawn)


def _key(concentrations: Mapping[str, Any]) -> frozenset[tuple[str, float]]:
    return frozenset((name, float(value)) for name, value in concentrations.items())


def frozen_items() -> list[dict[str, Any]]:
    """The frozen test set, regenerated: equal to `fixtures/aqi_test.jsonl`, which every training set excludes."""
    return generate(TEST_SIZE, TEST_SEED)
