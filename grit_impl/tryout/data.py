"""Somebody's rows as three sides of tokens, in the file that every run reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.evaluate.items import MOST_LABELS
from grit_impl.evaluate.scoring import score
from grit_impl.evaluate.scoring.text import spoken
from grit_impl.recipes.tokens import IGNORE, Tokens
from grit_impl.record import write_atomic
from grit_impl.tryout.split import SIDES, Split, question, split

ROWS = "rows.json"
SHOWN = 160
"""Characters of a question, or of an answer, that a person is shown."""


def prepare(base: str, dataset: str, max_length: int, seed: int, folder: Path) -> Split:
    """Split the rows, and write their tokens to `ROWS` in a folder.

    Raises:
        GRITError: base or data set are wrong, or there are too few rows.
    """
    from grit_impl.recipes.bases import load_tokenizer
    from grit_impl.recipes.datasets import load_instructions
    from grit_impl.recipes.formats import find_format
    from grit_impl.recipes.tokens import tokenize

    tokenizer = load_tokenizer(base)
    how = find_format(base, tokenizer)
    rows = load_instructions(dataset, form=how.form, tokenizer=tokenizer)
    # As `encode` tells whether a row is dropped: before the split, so that its sides are as large as is said.
    prompts = tokenizer(list(rows["prompt"]), add_special_tokens="rendered" not in rows.column_names)["input_ids"]
    fits = [len(ids) < max_length for ids in prompts]
    columns: dict[str, list[Any]] = {name: list(compress(rows[name], fits)) for name in rows.column_names}
    asked = columns.pop("asked", [""] * sum(fits))
    questions = [question(*each) for each in zip(columns["prompt"], columns["completion"], asked, strict=True)]
    found = replace(
        split(questions, seed, len(fits) - sum(fits)), first=first_row(columns["prompt"][0], columns["completion"][0])
    )
    content: dict[str, Any] = {}
    for side in SIDES:
        texts = {name: [values[number] for number in found.rows[side]] for name, values in columns.items()}
        tokens = tokenize(texts, tokenizer, max_length, how.end)
        content[side] = {"input_ids": tokens.input_ids, "prompts": tokens.prompts}
        content["pad"] = tokens.pad
    write_atomic(folder / ROWS, json.dumps(content))
    return found


def first_row(prompt: str, completion: str) -> str:
    """How the file is read, for its owner to see: the end of what is asked, and the beginning of what is answered."""
    if not prompt.strip():
        return f"the first row has no question and is learnt whole: {completion[:SHOWN]!r}"
    return f"the first row asks {prompt[-SHOWN:]!r} and is answered {completion[:SHOWN]!r}"


def read_side(folder: Path, side: str) -> Tokens:
    """The tokens of one side."""
    content = json.loads((folder / ROWS).read_text())
    return Tokens(content[side]["input_ids"], content[side]["prompts"], content["pad"])


def encoded(tokens: Tokens) -> list[dict[str, list[int]]]:
    """Rows of `input_ids` and `labels`."""
    pairs = zip(tokens.input_ids, tokens.prompts, strict=True)
    return [{"input_ids": ids, "labels": [IGNORE] * n + ids[n:]} for ids, n in pairs]


def items(tokens: Tokens, tokenizer: Any, metric: str, pattern: str) -> list[dict[str, Any]]:
    """What scorers want to know of each row: the question, the truth, and the choices where there are few answers.

    Raises:
        GRITError: the answers are not of the kind that the metric reads.
    """
    prompts = [ids[:n] for ids, n in zip(tokens.input_ids, tokens.prompts, strict=True)]
    answers = [ids[n:] for ids, n in zip(tokens.input_ids, tokens.prompts, strict=True)]
    asked = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    if not all(text.strip() for text in asked):  # a row that is learnt whole may begin with the base's first token
        raise GRITError(f"--metric {metric} needs rows with a question and an answer: these are learnt whole")
    truths = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    choices = [text for text, _ in Counter(truths).most_common()]
    if metric == "choice" and len(choices) > MOST_LABELS:
        raise GRITError(
            f"--metric choice: the held-out rows have {len(choices)} different answers, more than {MOST_LABELS}"
        )
    if metric == "regex":
        found = [extract(pattern, truth) for truth in truths]
        if None in found:
            raise GRITError(f"--pattern {pattern}: it is not in the answer {truths[found.index(None)][:60]!r}")
        truths = [text for text in found if text is not None]
    by_metric: dict[str, dict[str, Any]] = {"choice": {"choices": choices}, "regex": {"pattern": pattern}}
    chosen = by_metric.get(metric, {})
    return [{"features": ask, "answer": truth, **chosen} for ask, truth in zip(asked, truths, strict=True)]


def extract(pattern: str, text: str) -> str | None:
    """A pattern's first group, or all of it, where it first matches; None: it does not, or without that group."""
    hit = re.search(pattern, text)
    found: str | None = hit and hit.group(hit.re.groups and 1)
    return found.casefold() if found and hit and hit.re.flags & re.IGNORECASE else found


def is_right(metric: str, item: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is right; for a pattern: whether the answer's extract is the truth's.

    Raises:
        GRITError: the item's truth is not of the kind that the metric reads.
    """
    if metric == "regex":
        return extract(item["pattern"], spoken(answer)) == str(item["answer"])
    return bool(score(metric, item, answer)["correct"])
