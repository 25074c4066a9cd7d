"""Questions for an evaluation: the project's own files, or anybody's data set with its fields mapped.

A test set is checked before a single request is sent: an empty answer, a question with two different answers, or a
question that the model was trained on would turn into a wrong number later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grit_impl.aqi import INSTRUCTION
from grit_impl.errors import GRITError
from grit_impl.evaluate.scoring import category_of, normalise, parse_aqi

Row = dict[str, Any]
READABLE = (".jsonl", ".json", ".csv", ".parquet")


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
    items: list[Row]
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


def read_rows(source: str | Path, split: str = "test") -> list[Row]:
    """Rows of a JSONL, JSON, CSV or parquet file, or of a hub data set.

    Args:
        source: A path with one of these endings, or `owner/name` (`owner/name:config`) on the hub.
        split: Split of the hub data set.

    Raises:
        GRITError: nothing can be read there; for JSONL with the number of the bad line.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in READABLE and not path.exists():
        return _hub_rows(str(source), split)
    if not path.is_file():
        raise GRITError(f"cannot read {path}: there is no such file")
    if suffix not in READABLE:
        raise GRITError(f"cannot read {path}: use {', '.join(READABLE)} or a hub data set")
    try:
        if suffix == ".jsonl":
            return _json_lines(path)
        import pandas as pd  # type: ignore[import-untyped]

        if suffix == ".json":
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
                raise GRITError(f"cannot read {path}: it is not a list of objects")
            return value
        # Without dtype=str, pandas would turn an answer "007" into a number, and "NA" into a missing one.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False) if suffix == ".csv" else pd.read_parquet(path)
        return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
    except GRITError:
        raise
    except Exception as error:
        # Readers raise their own families of errors (pyarrow, csv, unicode); the user needs the file and the reason.
        raise GRITError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise GRITError(f"cannot read {path}: line {number} is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise GRITError(f"cannot read {path}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def _hub_rows(name: str, split: str) -> list[Row]:
    repository, _, config = name.partition(":")
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]

        return [dict(row) for row in load_dataset(repository, config or None, split=split)]
    except Exception as error:
        # datasets raises a dozen types for "not there", "no network", "needs a token", "no such split".
        reason = " ".join(str(error).split())[:200]
        raise GRITError(f"cannot load data set {name!r} (split {split!r}): {reason}") from error


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
        source: See `read_rows`.
        fields: Column names; None for the project's own format (`features`, `aqi_value`, `category`, `pollutant`).
        split: Split of a hub data set.
        limit: Keep the first so many.
        training: Texts (features or whole prompts) that a model was trained on.
        allow_overlap: Keep questions that occur in `training`, and note how many.

    Raises:
        GRITError: unreadable, a missing field, an empty question or answer, an answer that names no index or category,
            one question with two answers, or overlap with the training data.
    """
    rows = read_rows(source, split)
    names = fields or Fields(id="id", group="pollutant", answer="aqi_value")
    items = []
    for number, row in enumerate(rows, 1):
        item = _question(row, names, source, number)
        item["aqi_value"], item["category"] = _truth(row, names, source, number, native=fields is None)
        if names.group and names.group in row:
            item["pollutant"] = str(row[names.group])
        items.append(item)
    return _checked("aqi", items, str(source), limit, training, allow_overlap, "category", "aqi_value")


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
    rows = read_rows(source, split)
    names = fields or Fields("question", "answer", "{features}", id="id")
    items = []
    for number, row in enumerate(rows, 1):
        answer = row.get(names.answer)
        answers = list(answer) if isinstance(answer, Sequence) and not isinstance(answer, str) else answer
        if not isinstance(answers, list) or not answers:
            answers = _text(row, names.answer, source, number)
        items.append({**_question(row, names, source, number), "answer": answers})
    return _checked("knowledge", items, str(source), limit, training, allow_overlap, "answer")


def _question(row: Mapping[str, Any], names: Fields, source: str | Path, number: int) -> Row:
    features = _text(row, names.features, source, number)
    return {
        "id": str(row[names.id]) if names.id and names.id in row else f"row-{number}",
        "features": features,
        "prompt": names.instruction.replace("{features}", features),
    }


def _text(row: Mapping[str, Any], name: str, source: str | Path, number: int) -> str:
    if name not in row:
        raise GRITError(f"{source}, row {number}: no field {name!r} (it has: {', '.join(map(str, row))})")
    value = row[name]
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = "" if missing else str(value).strip()
    if not text:
        raise GRITError(f"{source}, row {number}: field {name!r} is empty")
    return text


def _truth(
    row: Mapping[str, Any], names: Fields, source: str | Path, number: int, native: bool
) -> tuple[float | None, str | None]:
    text = _text(row, names.answer, source, number)
    parsed = parse_aqi(text)
    if parsed.category is None:
        raise GRITError(
            f"{source}, row {number}: {names.answer!r} is {text[:60]!r}, which names no air quality index or category"
        )
    if native and row.get("category") not in (None, "", parsed.category):
        raise GRITError(f"{source}, row {number}: index {text} is not in category {row['category']!r}")
    if parsed.value is not None and parsed.category != category_of(parsed.value):
        raise GRITError(f"{source}, row {number}: {text[:60]!r} contradicts itself ({category_of(parsed.value)})")
    return parsed.value, parsed.category


def _key(text: str) -> str:
    """Equal for the same features in another order, case or spacing."""
    return " | ".join(sorted(normalise(part) for part in text.split(", ")))


def _checked(
    suite: str,
    items: list[Row],
    source: str,
    limit: int | None,
    training: Iterable[str],
    allow_overlap: bool,
    *truth: str,
) -> ItemSet:
    notes: list[str] = []
    first: dict[str, Row] = {}
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
