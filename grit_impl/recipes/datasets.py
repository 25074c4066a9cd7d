"""Instruction data sets: public layouts, TRL's own, generated AQI questions, and the user's own files.

Every source becomes two text columns, `prompt` (the Alpaca form, up to and including `### Response:`, unless another
form is given) and `completion`. Text is taken as it stands: nothing is stripped, and what is no text is an error with
file, row and column. TRL's own formats (https://huggingface.co/docs/trl/dataset_formats) get no form: texts are whole
as they are, conversations are rendered by the base's chat template. `messages` and `text` are learned whole, `prompt`
and `completion` in the completion.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.tables import READERS, Row, brief, is_hub_name, one_line, read_hub, read_table

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import PreTrainedTokenizerBase

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
# Some templates tell the date. It must not make other tokens of the same rows tomorrow.
DATE = "26 Jul 2024"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, Any]]
Example = tuple[str, str, str]
"""Instruction, input (empty where there is none) and answer."""
Pair = tuple[str, str] | tuple[Messages, Messages]
"""Prompt and completion, whole."""
Read = Callable[[Row], Example | Pair]
Form = Callable[[str, str], str]
"""How an instruction and its input become a prompt."""

# TRL's columns for other kinds of training; a row that has them is no instruction with one right answer.
_OTHER_KINDS = {
    "preferences": ({"chosen", "rejected"}, {"prompt", "completion", "label"}, {"completions", "labels"}),
    "pictures": ({"images"}, {"image"}),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schema:
    """A known layout: the columns that identify it, what of a row is what, its hub address, what else it reads."""

    columns: tuple[str, ...]
    read: Read
    hub: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


SCHEMAS: dict[str, Schema] = {}


def dataset(
    name: str, *columns: str, hub: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> Callable[[Read], Read]:
    """Register a layout: `@dataset("name", columns...)` on the function that reads a row.

    Args:
        name: What `--dataset` takes, where there is a hub address.
        columns: Files that have them are read as this layout; of several, that with the most columns.
        hub: Address, and the configuration if there are several.
        optional: Columns that are read where there are any.
    """

    def register(read: Read) -> Read:
        SCHEMAS[name] = Schema(columns, read, hub, optional)
        return read

    return register


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The Alpaca prompt, with an input section where there is context."""
    if context.strip():
        return ALPACA_INPUT_TEMPLATE.format(instruction=instruction, input=context)
    return ALPACA_TEMPLATE.format(instruction=instruction)


def _choice(row: Row, column: str, names: Mapping[str, str]) -> str:
    """An answer out of a few, also as CSV writes truth values and numbers."""
    value = row.require(column)
    if value is None or value == "":
        return ""
    found = names.get(str(value).lower()) if isinstance(value, str | bool | int) else None
    if found is None:
        raise row.error(column, f"is {brief(value)}, which is none of {', '.join(names)}")
    return found


@dataset("alpaca", "instruction", "output", hub=("tatsu-lab/alpaca",), optional=("input",))
def _alpaca(row: Row) -> Example:
    return row.text("instruction"), row.text("input", null="", absent=""), row.text("output", null="")


@dataset("dolly", "instruction", "response", hub=("databricks/databricks-dolly-15k",), optional=("context",))
def _dolly(row: Row) -> Example:
    return row.text("instruction"), row.text("context", null="", absent=""), row.text("response", null="")


@dataset("boolq", "question", "passage", "answer", hub=("google/boolq",))
def _boolq(row: Row) -> Example:
    question = row.text("question").rstrip("?")
    answer = _choice(row, "answer", {"true": "yes", "1": "yes", "false": "no", "0": "no"})
    return f"{question}? Answer yes or no.", row.text("passage"), answer


@dataset("qnli", "question", "sentence", "label", hub=("nyu-mll/glue", "qnli"))
def _qnli(row: Row) -> Example:
    context = f"Question: {row.text('question')}\nSentence: {row.text('sentence')}"
    # GLUE: 0 is entailment, 1 is not, and -1 marks the unlabelled test split.
    names = {"0": "yes", "1": "no", "entailment": "yes", "not_entailment": "no", "-1": ""}
    return "Does the sentence answer the question? Answer yes or no.", context, _choice(row, "label", names)


@dataset("gsm8k", "question", "answer", hub=("openai/gsm8k", "main"))
def _gsm8k(row: Row) -> Example:
    return row.text("question"), "", row.text("answer", null="")


@dataset("aqi", "features", "aqi_value", "category")
def _aqi(row: Row) -> Example:
    from grit_impl import aqi

    row.text("features")
    row.text("category")
    value = row.require("aqi_value")
    if isinstance(value, bool) or not re.fullmatch("[0-9]+", str(value)):
        raise row.error("aqi_value", f"is {brief(value)}, not a whole number")
    return aqi.instruction(row), "", aqi.answer(row)


@dataset("prompt-completion", "prompt", "completion", optional=TEMPLATE_COLUMNS)
def _prompt_completion(row: Row) -> Pair:
    if isinstance(row.require("prompt"), list) or isinstance(row.get("completion"), list):
        return _messages(row, "prompt"), _messages(row, "completion")
    return row.text("prompt"), row.text("completion", null="")


@dataset("messages", "messages", optional=TEMPLATE_COLUMNS)
def _conversation(row: Row) -> Pair:
    return [], _messages(row, "messages")


@dataset("text", "text")
def _language_modelling(row: Row) -> Pair:
    return "", row.text("text", null="")


def _messages(row: Row, column: str) -> Messages:
    """A conversation, as the chat template gets it."""
    value = row.require(column)
    if not isinstance(value, list) or not value:
        raise row.error(column, f"is {brief(value)}, not a list of messages")
    found = []
    for number, message in enumerate(value, 1):
        place = f"{column}[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise row.error(place, f"is {brief(message)}, not a message with one of the roles {', '.join(ROLES)}")
        # Parquet fills the keys that other messages have with null.
        kept = {key: part for key, part in message.items() if part is not None}
        if "content" in kept or not kept.get("tool_calls"):
            row.checked(kept.get("content"), f"{place}.content")
        found.append(kept)
    return found


def load_instructions(
    name_or_path: str | Path,
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
    form: Form | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """Load a data set as prompts and completions.

    Args:
        name_or_path: `alpaca`, `dolly`, `boolq`, `qnli` or `gsm8k` (from the hub), `aqi` (generated, without any
            item of the frozen test set; its split `test` is that set), or a .jsonl, .json, .csv, .tsv or .parquet
            file, or `owner/name` of the hub, whose columns are those of one of these, or TRL's: `prompt` and
            `completion` (texts or messages), `messages`, or `text`.
        split: Split of a hub data set or of `aqi`; a file is one split and is used whole.
        limit: At most so many rows (`aqi` generates as many; 1600 by default).
        seed: Shuffle with this seed before the limit applies; `None` keeps the order. For `aqi`, the generator's seed.
        form: Makes prompts of instructions. Default: the Alpaca form.
        tokenizer: The base's: its chat template renders messages, and its special tokens are refused inside texts.

    Returns:
        A data set with the text columns `prompt` and `completion`, and with `rendered` as well where a chat template
        placed every special token, and `asked`, what stands before the last answer, where conversations are learnt
        whole. Rows without an answer are left out and counted in a log message.

    Raises:
        GRITError: unknown name, unreadable or empty data, columns of no known layout, or a row that is not of the
            layout: with file, row and column.
    """
    from datasets import Dataset

    if limit is not None and limit < 1:
        raise GRITError(f"data set limit {limit} is out of range: use 1 or more, or none")
    name, ask = str(name_or_path), form or alpaca_prompt
    if name == "aqi":
        items = _aqi_rows(split, limit or AQI_TRAINING_ITEMS, seed or 0)
        rows, schema = [Row(item, name, number) for number, item in enumerate(items, 1)], SCHEMAS[name]
    else:
        rows, schema = _from_table(name, split)
    forbidden = _special_tokens(tokenizer)
    found: list[tuple[Row, Example | Pair]] = []
    for row in rows:
        row.forbidden = forbidden
        example = schema.read(row)
        if example[-1]:
            found.append((row, example))
    if not found:
        raise GRITError(f"data set {name} is empty: it has no row with an answer")
    unread = [column for column in found[0][0] if column not in schema.columns + schema.optional]
    if Path(name).is_file() and unread:
        read = ", ".join(column for column in found[0][0] if column not in unread)
        logger.warning("%s: read as %s; not used: %s", name, read, ", ".join(unread))
    if len(found) < len(rows):
        logger.warning("%s: %d of %d rows have no answer and were left out", name, len(rows) - len(found), len(rows))
    chats = [isinstance(example[-1], list) for _, example in found]
    if len(set(chats)) > 1:
        odd = found[chats.index(not chats[0])][0]
        raise odd.error("completion", "is text in some rows and messages in others; use one of them")
    order = Dataset.from_dict({"at": range(len(found))})
    if seed is not None and name != "aqi":
        order = order.shuffle(seed=seed)
    # Templates take long, so they render what is used.
    chosen = (found[at] for at in order["at"][: limit or len(found)])
    return Dataset.from_list([_texts(row, example, ask, tokenizer) for row, example in chosen])


def require_dataset(name_or_path: str | Path) -> None:
    """Refuse at once, importing nothing heavy, what `load_instructions` would refuse after minutes.

    Raises:
        GRITError: unknown name, or a file that is missing, damaged, empty or of no known layout.
    """
    name = str(name_or_path)
    if name != "aqi" and not (name in SCHEMAS and SCHEMAS[name].hub) and not is_hub_name(name):
        _from_table(name, "train", tell=False)  # reading it in earnest tells what is odd about it


def _from_table(name: str, split: str, *, tell: bool = True) -> tuple[list[Row], Schema]:
    """The rows of a file or of the hub, and their layout; notes on how it was read are logged."""
    schema = SCHEMAS.get(name)
    if schema is not None and schema.hub:
        return read_hub(*schema.hub, split=split).rows, schema
    path = Path(name)
    if not path.exists() and path.suffix.lower() not in READERS and not is_hub_name(name):
        known = ", ".join(key for key, value in SCHEMAS.items() if value.hub)
        raise GRITError(
            f"unknown data set {name!r}: use {known}, aqi, owner/name of the hub, "
            f"or the path of a file ({', '.join(READERS)})"
        )
    table = read_table(name, split)
    if not table.rows:
        raise GRITError(f"data set {name} is empty")
    for note in table.notes if tell else ():
        logger.warning("%s", note)
    return table.rows, _detect(name, table.columns)


def _detect(name: str, columns: Iterable[str]) -> Schema:
    """The layout with the most columns among these; of two with as many, none."""
    have = set(columns)
    listed = ", ".join(columns)
    for kind, signs in _OTHER_KINDS.items():
        if any(sign <= have for sign in signs):
            raise GRITError(f"data set {name} has columns {listed}: it holds {kind}, which no arm trains on")
    fitting = {key: schema for key, schema in SCHEMAS.items() if set(schema.columns) <= have}
    most = max((len(schema.columns) for schema in fitting.values()), default=0)
    best = {key: schema for key, schema in fitting.items() if len(schema.columns) == most}
    if len(best) == 1:
        return next(iter(best.values()))
    if best:
        raise GRITError(
            f"data set {name} has columns {listed}, which fit {' and '.join(best)}: remove those of one of them"
        )
    layouts = "; ".join(", ".join(schema.columns) for schema in SCHEMAS.values())
    raise GRITError(
        f"data set {name} has columns {listed}; it needs those of one layout, such as prompt (what is asked) and "
        f"completion (what is to be answered): {layouts}"
    )


def _aqi_rows(split: str, n: int, seed: int) -> list[Mapping[str, Any]]:
    from grit_impl import aqi

    frozen = aqi.frozen_items()
    if split == "test":
        return list(frozen[:n])
    if split != "train":
        raise GRITError(f"the aqi data set has no split {split!r}: use train or test")
    return list(aqi.generate(n, seed, exclude=frozen))


# -- the base's template and tokens -----------------------------------------------------------------------------------


def _special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str] | None:
    """What a tokenizer would not read as text: its end would end a prompt in its middle."""
    if tokenizer is None:
        return None
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in (*tokenizer.all_special_tokens, *(t.content for t in added if t.special))}
    return re.compile("|".join(map(re.escape, sorted(special - {""}, key=len, reverse=True)))) if special else None


def _texts(row: Row, example: Example | Pair, ask: Form, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """A row of the result."""
    if len(example) == 3:
        return {"prompt": ask(example[0], example[1]), "completion": example[2]}
    prompt, completion = example
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    return _rendered(row, prompt, [*prompt, *completion], tokenizer)


def _rendered(row: Row, prompt: Any, messages: list[Any], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Prompt and completion of a conversation, by the base's chat template, called as TRL calls it."""
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise GRITError(
            f"{row.source}: conversations need a base with a chat template, and this one has none; "
            "give prompt and completion as texts"
        )
    column, tools = "completion" if prompt else "messages", row.get("tools")
    try:
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools or None,
            **(row.get("chat_template_kwargs") or {}),
            "tokenize": False,
            "date_string": DATE,
        }
        whole = str(tokenizer.apply_chat_template(messages, **options))
        begin = ""
        if prompt:
            begin = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise row.error(column, f"cannot be rendered by the base's chat template: {one_line(error)}") from None
    for number, message in enumerate(messages, 1):
        role, said = str(message["role"]), str(message.get("content", ""))
        # Answers may lose their reasoning, by a template's own rule; what was asked may not be lost.
        if role != "assistant" and said.strip() not in whole:
            raise row.error(column, f"loses message {number} ({role}) in the base's chat template")
    if not whole.startswith(begin):
        raise row.error("prompt", "is rendered otherwise alone than before its completion, by the base's chat template")
    found = {"prompt": begin, "completion": whole[len(begin) :], "rendered": True}
    if not prompt:  # what is asked before the last answer tells whether two conversations ask the same
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        found["asked"] = json.dumps([(message["role"], message.get("content")) for message in messages[:last]])
    return found
