"""Questions for an evaluation: the project's own files, or anybody's data set with its fields mapped.

A test set is checked before a single request is sent: an empty answer, a question with two different answers, or a
question that the model was trained on would turn into a wrong number later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grit_impl.aqi import INSTRUCTION
from grit_impl.errors import GRITError
from grit_impl.evaluate.scoring import category_of, normalise, parse_aqi
from grit_impl.tables import Row, Table, brief, read_table


@dataclass(frozen=True, slots=True)
class ItemSet:
    """Checked questions with their truths.

    Attributes:
        suite: `aqi` or `knowledge`.
        items: Dictionaries with `id` and `prompt`; for `aqi` also `aqi_value` (or None), `category`, and optionally
            `pollutant`; for `knowledge` also `answer`.
        source: Where they came from.
        notes: What the checks changed or allowed, for the report.
    """

    suite: str
    items: list[dict[str, Any]]
    source: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of a data set's columns.

    Attributes:
        features: The question: the text that goes into `instruction`, or the whole prompt.
        answer: The truth: an index, a category, or a text that `parse_aqi` understands; for knowledge, the answer.
        instruction: Template around `features`; `{features}` alone sends it as it is.
        id: Column of ids; without it the row number serves.
        group: Column to group the tables by (as `pollutant`).
    """

    features: str = "features"
    answer: str = "answer"
    instruction: str = INSTRUCTION
    id: str | None = None
    group: str | None = None


def aqi_fields(features: str, answer: str) -> Fields | None:
    """Columns as they were named in options; None where they are the project's own."""
    return None if (features, answer) == ("features", "") else Fields(features, answer or "aqi_value")


def load_aqi(
    source: str | Path,
    fields: Fields | None = None,
    *,
    split: str = "test",
    limit: int | None = None,
    training: Iterable[str] = (),
    allow_overlap: bool = False,
) -> ItemSet:
    """Questions about the air quality index.

    Args:
        source: See `tables.read_table`.
        fields: Column names; None for the project's own format (`features`, `aqi_value`, `category`, `pollutant`).
        split: Split of a hub data set.
        limit: Keep the first so many.
        training: Texts (features or whole prompts) that a model was trained on.
        allow_overlap: Keep questions that occur in `training`, and note how many.

    Raises:
        GRITError: unreadable, a missing field, an empty question or answer, an answer that names no index or category,
            one question with two answers, or overlap with the training data.
    """
    table = read_table(source, split)
    names = fields or Fields(id="id", group="pollutant", answer="aqi_value")
    items = []
    for row in table.rows:
        item = _question(row, names)
        item["aqi_value"], item["category"] = _truth(row, names, native=fields is None)
        if names.group and row.get(names.group) is not None:
            item["pollutant"] = _label(row, names.group)
        items.append(item)
    return _checked("aqi", items, table, limit, training, allow_overlap, "category", "aqi_value")


def load_knowledge(
    source: str | Path,
    fields: Fields | None = None,
    *,
    split: str = "test",
    limit: int | None = None,
    training: Iterable[str] = (),
    allow_overlap: bool = False,
) -> ItemSet:
    """General knowledge questions; by default with the columns `id`, `question`, `answer`. Arguments as `load_aqi`."""
    table = read_table(source, split)
    names = fields or Fields("question", "answer", "{features}", id="id")
    items = []
    for row in table.rows:
        answer: Any = row.require(names.answer)
        if isinstance(answer, list) and answer:
            answer = [row.checked(each, f"{names.answer}[{number}]") for number, each in enumerate(answer, 1)]
        else:
            answer = _text(row, names.answer)
        items.append({**_question(row, names), "answer": answer})
    return _checked("knowledge", items, table, limit, training, allow_overlap, "answer")


def _question(row: Row, names: Fields) -> dict[str, Any]:
    features = _text(row, names.features)
    return {
        "id": _label(row, names.id) if names.id and row.get(names.id) is not None else f"row-{row.number}",
        "features": features,
        "prompt": names.instruction.replace("{features}", features),
    }


def _text(row: Row, name: str) -> str:
    text = row.text(name, null="")
    if not text.strip():
        raise row.error(name, "is empty")
    return text


def _label(row: Row, name: str) -> str:
    """An id or a group, which may be a number."""
    value = row[name]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else row.text(name)


def _truth(row: Row, names: Fields, native: bool) -> tuple[float | None, str | None]:
    value = row.require(names.answer)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = ("" if math.isnan(value) else str(value)) if number else row.text(names.answer, null="")
    if not text.strip():
        raise row.error(names.answer, "is empty")
    parsed = parse_aqi(text)
    if parsed.category is None:
        raise row.error(names.answer, f"is {text[:60]!r}, which names no air quality index or category")
    if native and row.get("category") not in (None, "", parsed.category):
        raise row.error("category", f"is {brief(row['category'])}, but index {text[:60]} is {parsed.category!r}")
    if parsed.value is not None and parsed.category != category_of(parsed.value):
        raise row.error(names.answer, f"is {text[:60]!r}, which contradicts itself ({category_of(parsed.value)})")
    return parsed.value, parsed.category


def _key(text: str) -> str:
    """Equal for the same features in another order, case or spacing."""
    return " | ".join(sorted(normalise(part) for part in text.split(", ")))


def _checked(
    suite: str,
    items: list[dict[str, Any]],
    table: Table,
    limit: int | None,
    training: Iterable[str],
    allow_overlap: bool,
    *truth: str,
) -> ItemSet:
    source, notes = table.source, list(table.notes)
    first: dict[str, dict[str, Any]] = {}
    for item in items:
        before = first.setdefault(_key(item["features"]), item)
        if any(before[name] != item[name] for name in truth):
            raise GRITError(
                f"{source}: items {before['id']} and {item['id']} ask the same but have different answers; remove one"
            )
    unique = list(first.values())
    if len(unique) < len(items):
        notes.append(f"{len(items) - len(unique)} repeated questions left out")
    ids = [item["id"] for item in unique]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise GRITError(f"{source}: two items have the id {twice!r}; ids must be unique")
    seen = {_key(text) for text in training}
    shared = [item["id"] for item in unique if {_key(item["features"]), _key(item["prompt"])} & seen]
    if shared and not allow_overlap:
        raise GRITError(
            f"{source}: {len(shared)} of {len(unique)} questions are in the training data (first: {shared[0]}); "
            "remove them, or allow it with --allow-overlap"
        )
    if shared:
        notes.append(f"{len(shared)} questions are also in the training data (allowed)")
    kept = unique[:limit]
    if not kept:
        raise GRITError(f"{source} holds no questions")
    return ItemSet(suite, kept, source, notes)
