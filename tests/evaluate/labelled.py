"""Agreement of the scorers with the labelled answers.

`python tests/evaluate/labelled.py [1|2|3 [development|held-out|own|constructed|2|3|4|5]]`
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grit_impl.evaluate.scoring import category_of, parse_aqi
from grit_impl.evaluate.scoring.index import HIGHEST
from grit_impl.evaluate.scoring.knowledge import judge
from grit_impl.statistics.intervals import wilson

FIXTURES = Path(__file__).parents[2] / "fixtures"
FILES = {"1": "labelled_answers.jsonl"} | {n: f"labelled_answers_{n}.jsonl" for n in "23"}
Row = dict[str, Any]


def rows(file: str = "1", part: str = "") -> list[Row]:
    """The labelled answers of a file: all, a half (development, held-out), an origin (own, constructed), a contact."""
    found = [json.loads(line) for line in (FIXTURES / FILES[file]).read_text(encoding="utf-8").splitlines()]
    return [row for row in found if part in ("", half_of(row), origin(row), str(row.get("contact")))]


def origin(row: Row) -> str:
    """Whether a model wrote the answer, or it was written by hand in a model's manner."""
    return "constructed" if row.get("constructed") else "own"


def half_of(row: Row) -> str:
    """By the parity of sha256 of the id."""
    even = int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 2 == 0
    return "development" if even else "held-out"


def compared(row: Row) -> dict[str, bool]:
    """Whether the scorer says what the label says, by question."""
    label = row["label"]
    if row["suite"] == "knowledge":
        said = judge(row["question"], row["truth"], row["answer"])
        return {
            "knowledge, right or not": (said == "right") == (label == "right"),
            "knowledge, right, wrong or none": said == label,
        }
    parsed = parse_aqi(row["answer"])
    stated = parsed.category if parsed.stated else None
    agreed = {
        "AQI, stated or not": (parsed.value is not None or stated is not None) == label["stated"],
        "AQI, value": parsed.value == label["aqi"],
        "AQI, category": stated == label["category"],
    }
    value, truth = label["aqi"], row["truth"]["category"]
    category = label["category"] or (category_of(value) if value is not None and 0 <= value <= HIGHEST else None)
    alike = (parsed.category == truth) == (category == truth)
    return {**agreed, "AQI, all three": all(agreed.values()), "AQI, scored alike by category": alike}


def agreement(file: str = "1", part: str = "") -> Iterator[tuple[str, list[str], int]]:
    """What is compared, the ids on which scorer and label differ, and of how many."""
    results = {row["id"]: compared(row) for row in rows(file, part)}
    for what in dict.fromkeys(name for result in results.values() for name in result):
        asked = {name: result[what] for name, result in results.items() if what in result}
        yield what, [name for name, same in asked.items() if not same], len(asked)


if __name__ == "__main__":
    for what, differing, n in agreement(*sys.argv[1:3]):
        share = wilson(n - len(differing), n).scaled(100)
        print(f"{what}: {n - len(differing)} of {n}, {share.estimate:.1f}% [{share.low:.1f}, {share.high:.1f}]")
