"""Questions for an evaluation: the project's own files, or anybody's data set with its fields mapped.

A test set is checked before a single request is sent: an empty answer, a question with two different answers, or a
question that the model was trained on would turn into a wrong number later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grit_impl.aqi import INSTRUCTION
from grit_impl.errors import GRITError
from grit_impl.evaluate.scoring import category_of, normalise, parse_aqi, truths_of
from grit_impl.tables import Row, Table, brief, read_table


@dataclass(frozen=True, slots=True)
class ItemSet:
    """Checked questions with their truths.

    Attributes:
        suite: `aqi` or `knowledge`.
        items: Dictionaries with `id` and `prompt`; for `aqi` also `aqi_value` (or None), `category`, and optionally
            `pollutant`; for any other task also `answer`, and `choices` or `wrong` (answers that are not right) where
            the data set has them.
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
        instruction: Template around `features`; alone, it sends the question as it is.
        id: Column of ids; without it the row number serves.
        group: Column to group the tables by (as `pollutant`).
    """

    features: str = "features"
    answer: str = "answer"
    instruction: str = "{features}"
    id: str | None = None
    group: str | None = None


NATIVE = Fields(answer="aqi_value", instruction=INSTRUCTION, id="id", group="pollutant")
"""The frozen set's columns. Only these questions are bare concentrations, which need an instruction."""
LISTS = ("choices", "wrong")
MOST_LABELS = 10
"""Different answers up to which a data set is taken for one of labels, which are then the choices."""


def aqi_fields(features: str, answer: str) -> Fields | None:
    """Columns as they were named in options; None where they are the project's own."""
    return None if (features, answer) == ("features", "") else Fields(features, answer or "aqi_value", INSTRUCTION)


def load_questions(
    source: str | Path,
    features: str,
    answer: str,
    *,
    scorer: str = "",
    prompt: str = "",
    answer_format: str = "",
    **options: Any,
) -> tuple[ItemSet, str, str]:
    """Questions of any task, with the scorer that reads their answers and the prompt that they are put into.

    Args:
        source: See `tables.read_table`.
        features: Column of the questions.
        answer: Column of the answers; "" for `aqi_value` where there is one, else `answer`.
        scorer: Its name; "" for `aqi` where the answers are `aqi_value` or all speak of the index or name a category,
            else `contains-as-answer`.
        prompt: Template around `{features}`; "" for the AQI instruction where the columns are the frozen set's, else
            nothing.
        answer_format: Form that is asked for after the question.
        **options: As `load_aqi`.

    Raises:
        GRITError: as `load_aqi`.
    """
    rows = read_table(source, options.get("split", "test")).rows
    columns = set(rows[0]) if rows else set()
    answer = answer or ("aqi_value" if "aqi_value" in columns else "answer")
    native = (features, answer) == (NATIVE.features, NATIVE.answer)
    if not scorer:
        indices = answer == NATIVE.answer or all(_names_an_index(row.get(answer)) for row in rows)
        scorer = "aqi" if indices else "contains-as-answer"
    names = NATIVE if native else Fields(features, answer, id="id" if "id" in columns else None)
    template = (prompt or names.instruction) + (f"\n\nAnswer in this form: {answer_format}" if answer_format else "")
    names = replace(names, instruction=template)
    load = load_aqi if scorer == "aqi" else load_knowledge
    return load(source, names, **options), scorer, template


def _names_an_index(answer: Any) -> bool:
    """Whether an answer is about air; a number alone may be anything."""
    text = str(answer)
    return "aqi" in text.lower() or parse_aqi(text).stated


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
    names = fields or NATIVE
    items = []
    for row in table.rows:
        item = _question(row, names)
        item["aqi_value"], item["category"] = _truth(row, names, native=names.answer == NATIVE.answer)
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
        lists = {name: [str(each) for each in row[name]] for name in LISTS if isinstance(row.get(name), list)}
        items.append({**_question(row, names), "answer": answer, **lists})
    labels = dict.fromkeys(item["answer"] for item in items if isinstance(item["answer"], str))
    if len(labels) <= MOST_LABELS and len(items) > len(labels):
        items = [{"choices": list(labels), **item} for item in items]
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


def with_wrong(items: ItemSet, limit: int | None = None, most: int = 3) -> ItemSet:
    """The first so many questions, each with wrong answers: its own `wrong` or `choices`, else of questions like it.

    Questions are alike if they begin with the same three words ("What is the capital of ..."); of their answers the
    next `most` in the order of the file are taken, so that every run has the same.

    Raises:
        GRITError: a question has none.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for item in items.items:
        alike.setdefault(_kind(item), []).extend(truths_of(item)[:1])
    found = []
    for item in items.items[:limit]:
        others, right = alike[_kind(item)], {normalise(truth) for truth in truths_of(item)}
        start = others.index(truths_of(item)[0])
        candidates = item.get("wrong") or item.get("choices") or [*others[start:], *others[:start]]
        wrong = list(dict.fromkeys(each for each in candidates if normalise(each) not in right))
        if not wrong:
            raise GRITError(f"{items.source}: item {item['id']} has no wrong answers: add 'wrong', or judge by answer")
        found.append({**item, "wrong": wrong if "wrong" in item or "choices" in item else wrong[:most]})
    return replace(items, items=found)


def _kind(item: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(item["features"]).split()[:3])
