"""Instruction data sets: five public formats, generated AQI questions, and the user's own files.

Every source becomes two text columns, `prompt` (the Alpaca form, up to and including `### Response:`, unless another
form is given) and `completion`.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT_TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
AQI_TRAINING_ITEMS = 1600
Row = Mapping[str, Any]
Example = tuple[str, str, str]
"""Instruction, input (empty where there is none) and answer."""
Form = Callable[[str, str], str]
"""How an instruction and its input become a prompt."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schema:
    """A known layout.

    Attributes:
        columns: Those that identify it.
        read: Instruction, input and answer of a row.
        hub: Its address there.
        whole: The instruction is a whole prompt, which needs no Alpaca form around it.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Example]
    hub: tuple[str, ...] = ()
    whole: bool = False


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The Alpaca prompt, with an input section where there is context."""
    if context.strip():
        return ALPACA_INPUT_TEMPLATE.format(instruction=instruction, input=context)
    return ALPACA_TEMPLATE.format(instruction=instruction)


def _as_it_is(prompt: str, _: str) -> str:
    return prompt


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _alpaca(row: Row) -> Example:
    return _text(row, "instruction"), _text(row, "input"), _text(row, "output")


def _dolly(row: Row) -> Example:
    return _text(row, "instruction"), _text(row, "context"), _text(row, "response")


def _boolq(row: Row) -> Example:
    question = _text(row, "question").rstrip("?")
    # CSV knows no booleans.
    answer = {"true": "yes", "1": "yes", "false": "no", "0": "no"}.get(_text(row, "answer").lower(), "")
    return f"{question}? Answer yes or no.", _text(row, "passage"), answer


def _qnli(row: Row) -> Example:
    context = f"Question: {_text(row, 'question')}\nSentence: {_text(row, 'sentence')}"
    # GLUE: 0 is entailment, 1 is not, and -1 marks the unlabelled test split.
    answer = {"0": "yes", "1": "no", "entailment": "yes", "not_entailment": "no"}.get(_text(row, "label"), "")
    return "Does the sentence answer the question? Answer yes or no.", context, answer


def _gsm8k(row: Row) -> Example:
    return _text(row, "question"), "", _text(row, "answer")


def _aqi(row: Row) -> Example:
    from grit_impl import aqi

    return aqi.instruction(row), "", aqi.answer(row)


def _whole(row: Row) -> Example:
    return str(row["prompt"] or ""), "", _text(row, "completion")


# The order matters for detection: BoolQ has GSM8K's columns and one more.
SCHEMAS = {
    "alpaca": Schema(("instruction", "output"), _alpaca, ("tatsu-lab/alpaca",)),
    "dolly": Schema(("instruction", "response"), _dolly, ("databricks/databricks-dolly-15k",)),
    "boolq": Schema(("question", "passage", "answer"), _boolq, ("google/boolq",)),
    "qnli": Schema(("question", "sentence", "label"), _qnli, ("nyu-mll/glue", "qnli")),
    "gsm8k": Schema(("question", "answer"), _gsm8k, ("openai/gsm8k", "main")),
    "aqi": Schema(("features", "aqi_value", "category"), _aqi),
    "prompt-completion": Schema(("prompt", "completion"), _whole, whole=True),
}


def load_instructions(
    name_or_path: str | Path,
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
    form: Form | None = None,
) -> Dataset:
    """Load a data set as prompts and completions.

    Args:
        name_or_path: `alpaca`, `dolly`, `boolq`, `qnli` or `gsm8k` (from the hub), `aqi` (generated, without any
            item of the frozen test set; its split `test` is that set), or a .jsonl, .json, .csv or .parquet file
            whose columns are those of one of these, or `prompt` and `completion`.
        split: Split of a hub data set or of `aqi`; a file is one split and is used whole.
        limit: At most so many rows (`aqi` generates as many; 1600 by default).
        seed: Shuffle with this seed before the limit applies; `None` keeps the order. For `aqi`, the generator's seed.
        form: Makes prompts of all rows. Default: the Alpaca form, and whole prompts as they are.

    Returns:
        A data set with the text columns `prompt` and `completion`. Rows without an answer are left out and counted
        in a log message.

    Raises:
        GRITError: unknown name, unreadable or empty data, or columns of no known layout.
    """
    from datasets import Dataset

    if limit is not None and limit < 1:
        raise GRITError(f"data set limit {limit} is out of range: use 1 or more, or none")
    name = str(name_or_path)
    if name == "aqi":
        rows = _aqi_rows(split, limit or AQI_TRAINING_ITEMS, seed or 0)
        schema = SCHEMAS["aqi"]
    elif name in SCHEMAS and SCHEMAS[name].hub:
        rows, schema = _read_hub(name, SCHEMAS[name].hub, split), SCHEMAS[name]
    else:
        rows, schema = _from_file(name)

    examples = [schema.read(row) for row in rows]
    ask = form or (_as_it_is if schema.whole else alpaca_prompt)
    kept = [{"prompt": ask(text, more), "completion": answer} for text, more, answer in examples if answer]
    if not kept:
        raise GRITError(f"data set {name} is empty: it has no row with an answer")
    if len(kept) < len(examples):
        left_out = len(examples) - len(kept)
        logger.warning("%s: %d of %d rows have no answer and were left out", name, left_out, len(examples))
    dataset = Dataset.from_list(kept)
    if seed is not None and name != "aqi":
        dataset = dataset.shuffle(seed=seed)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def require_dataset(name_or_path: str | Path) -> None:
    """Refuse at once, importing nothing heavy, what `load_instructions` would refuse after minutes.

    Raises:
        GRITError: unknown name, or a file that is missing, damaged, empty or of no known layout.
    """
    name = str(name_or_path)
    if name != "aqi" and not (name in SCHEMAS and SCHEMAS[name].hub):
        _from_file(name)


def _from_file(name: str) -> tuple[list[Row], Schema]:
    if not Path(name).exists() and Path(name).suffix not in READERS:
        known = ", ".join(key for key, value in SCHEMAS.items() if value.hub)
        raise GRITError(
            f"unknown data set {name!r}: use {known}, aqi, or the path of a jsonl, json, csv or parquet file"
        )
    rows = _read_file(Path(name))
    return rows, _detect(name, rows)


def _aqi_rows(split: str, n: int, seed: int) -> list[Row]:
    from grit_impl import aqi

    frozen = aqi.frozen_items()
    if split == "test":
        return list(frozen[:n])
    if split != "train":
        raise GRITError(f"the aqi data set has no split {split!r}: use train or test")
    return list(aqi.generate(n, seed, exclude=frozen))


def _read_hub(name: str, address: tuple[str, ...], split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        return list(load_dataset(*address, split=split))
    except Exception as error:  # the hub client raises many unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GRITError(
            f"cannot load data set {name} ({address[0]}, split {split}) from the hub: {reason}; "
            "give a local file of the same columns instead"
        ) from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}") from None
    return rows


def _read_json(path: Path) -> list[Row]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError("it does not hold a list of objects")
    return rows


def _read_csv(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle, strict=True))


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    return list(parquet.read_table(path).to_pylist())


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_file(path: Path) -> list[Row]:
    if path.suffix not in READERS:
        raise GRITError(f"cannot read data set {path}: its name must end in {', '.join(READERS)}")
    try:
        rows = READERS[path.suffix](path)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and json's errors are ValueErrors
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["damaged"])[0]
        raise GRITError(f"cannot read data set {path}: {reason}") from error
    if not rows:
        raise GRITError(f"data set {path} is empty")
    if not all(isinstance(row, dict) for row in rows):
        raise GRITError(f"cannot read data set {path}: every entry must be an object with named fields")
    return rows


def _detect(name: str, rows: list[Row]) -> Schema:
    columns = rows[0].keys()
    for schema in SCHEMAS.values():
        if set(schema.columns) <= columns:
            return schema
    layouts = "; ".join(", ".join(schema.columns) for schema in SCHEMAS.values())
    raise GRITError(f"data set {name} has columns {', '.join(columns)}; it needs those of one layout: {layouts}")
