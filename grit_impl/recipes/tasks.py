"""Instruction tasks that the project generates itself, each with its own kind of difficulty and its held-out sets.

A task draws questions and right answers from a random source. The sets `validation` (for tuning) and `test` (for the
result) are fixed; training sets contain no question of either. The tiny base is pretrained on nothing of them but the
facts that `choose` asks about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.recipes.tiny_llama import knowledge

Draw = Callable[[random.Random], tuple[str, str]]
SPLIT_SEEDS = {"validation": 20240601, "test": 20240602}
HELD_OUT = {"validation": 160, "test": 160}
"""Questions in each held-out set."""
HELD_OUT_ROWS = 200
"""The same of a folder's rows."""

_UNITS = (
    ("km", "m", 3),
    ("m", "cm", 2),
    ("m", "mm", 3),
    ("cm", "mm", 1),
    ("kg", "g", 3),
    ("g", "mg", 3),
    ("l", "ml", 3),
    ("l", "cl", 2),
    ("ppm", "ppb", 3),
    ("kw", "w", 3),
)
_NAMES = (
    "Ann",
    "Ben",
    "Carl",
    "Dora",
    "Emil",
    "Fay",
    "Gina",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Lea",
    "Max",
    "Nora",
    "Olaf",
    "Pia",
)
# Short names: what is long here costs compute and teaches nothing else.
_CITIES = sorted(answer for _, answer in knowledge.TOPICS[0].pairs if len(answer) <= 6)
_SENTENCES = (
    "In {year} {name} moved from {other} to {city}.",
    "{name} left {other} and went to {city} in {year}.",
    "{name} of {other} lives in {city} since {year}.",
    "To {city} came {name} in {year} with {number} from {other}.",
)
_OPTIONS = 3


def _convert(random_: random.Random) -> tuple[str, str]:
    big, small, shift = random_.choice(_UNITS)
    digits = random_.choice((1, 2, 3))
    amount = Decimal(random_.randint(10 ** (digits - 1), 10**digits - 1))
    if random_.random() < 0.5:
        amount = amount.scaleb(-random_.randint(0, digits))
        result, source, target = amount.scaleb(shift), big, small
    else:
        result, source, target = amount.scaleb(-shift), small, big
    return f"Convert {_plain(amount)} {source} to {target}.", f"{_plain(result)} {target}"


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _extract(random_: random.Random) -> tuple[str, str]:
    city, other = random_.sample(_CITIES, 2)
    name, year, number = random_.choice(_NAMES), random_.randint(1900, 2029), random_.randint(2, 99)
    sentence = random_.choice(_SENTENCES).format(name=name, city=city, other=other, year=year, number=number)
    return f"Who, where, when? {sentence}", f"{name} | {city} | {year}"


def _choose(random_: random.Random) -> tuple[str, str]:
    topics = [topic for topic in knowledge.TOPICS if len({answer for _, answer in topic.pairs}) > _OPTIONS]
    topic = random_.choices(topics, weights=[len(t.pairs) for t in topics])[0]
    subject, answer = random_.choice(topic.pairs)
    wrong = sorted({other for _, other in topic.pairs} - {answer})
    options = [answer, *random_.sample(wrong, _OPTIONS - 1)]
    random_.shuffle(options)
    listed = ", ".join(f"{i}. {option}" for i, option in enumerate(options, 1))
    return f"{topic.questions[0].format(subject)} {listed}", f"{options.index(answer) + 1}. {answer}"


@dataclass(frozen=True)
class Task:
    """One kind of instruction.

    Attributes:
        name: Its name in plans and tables.
        kind: What it asks for, for people.
        draw: A random question and its answer; None: AQI, which balances its items over categories.
    """

    name: str
    kind: str
    draw: Draw | None

    def held_out(self, split: str) -> list[tuple[str, str]]:
        """The questions and answers of a held-out set.

        Raises:
            GRITError: `split` is neither `validation` nor `test`.
        """
        if split not in SPLIT_SEEDS:
            raise GRITError(f"task {self.name} has no split {split!r}: choose {', '.join(SPLIT_SEEDS)}")
        if self.draw is None:
            return [(aqi.instruction(item), aqi.answer(item)) for item in _aqi_held_out(split)]
        others = [] if split == "test" else self.held_out("test")
        return self._rows(self.draw, HELD_OUT[split], SPLIT_SEEDS[split], others)

    def training(self, n: int, seed: int) -> list[tuple[str, str]]:
        """`n` distinct questions with answers, none of them held out; equal seeds give equal rows."""
        if self.draw is None:
            held_out = [*_aqi_held_out("test"), *_aqi_held_out("validation")]
            items = aqi.generate(n, seed, exclude=[*aqi.frozen_items(), *held_out])
            return [(aqi.instruction(item), aqi.answer(item)) for item in items]
        return self._rows(self.draw, n, seed, [*self.held_out("test"), *self.held_out("validation")])

    def _rows(self, draw: Draw, n: int, seed: int, exclude: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        taken = {question for question, _ in exclude}
        random_ = random.Random(f"{self.name} {seed}")
        rows: dict[str, str] = {}
        while len(rows) < n:
            question, answer = draw(random_)
            if question not in taken:
                rows[question] = answer
        return list(rows.items())


def _aqi_held_out(split: str) -> list[dict[str, Any]]:
    """Items that no other set has: `grit evaluate`'s frozen test set has been looked at while rules were designed."""
    others = [] if split == "test" else _aqi_held_out("test")
    return aqi.generate(HELD_OUT[split], SPLIT_SEEDS[split], exclude=[*aqi.frozen_items(), *others])


TASKS = {
    task.name: task
    for task in (
        Task("aqi", "a number and a category by an official rule", None),
        Task("convert", "arithmetic: units of measurement", _convert),
        Task("extract", "structured output: three fields of a sentence", _extract),
        Task("choose", "multiple choice over the base's own knowledge", _choose),
    )
}


@dataclass(frozen=True)
class FolderTask:
    """Somebody's rows: a folder with files `train` and `test`, in any layout that `load_instructions` knows.

    Attributes:
        name: The folder.
    """

    name: str

    def rows(self, side: str, base: str, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of a side, as the base is asked, in a fixed order.

        `validation` is drawn from the training rows, `train` has the others, `test` is drawn from its own file.

        Raises:
            GRITError: the folder lacks a file or training rows, or a row is wrong.
        """
        from grit_impl.recipes.datasets import load_instructions
        from grit_impl.recipes.formats import find_format
        from grit_impl.recipes.tokens import encode

        how = find_format(base, tokenizer)
        file = self.file("test" if side == "test" else "train")
        rows = load_instructions(file, seed=SPLIT_SEEDS["test"], form=how.form, tokenizer=tokenizer)
        if side != "test" and len(rows) <= HELD_OUT_ROWS:
            raise GRITError(
                f"task {self.name}: {len(rows)} training rows are too few: the first {HELD_OUT_ROWS} are for validation"
            )
        kept = slice(HELD_OUT_ROWS, None) if side == "train" else slice(HELD_OUT_ROWS)
        names = [name for name in ("prompt", "completion", "rendered") if name in rows.column_names]
        found = encode({name: list(rows[name])[kept] for name in names}, tokenizer, max_length, how.end)
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    def file(self, side: str) -> Path:
        """The file of `train` or `test`.

        Raises:
            GRITError: there is none.
        """
        found = sorted(Path(self.name).glob(f"{side}.*"))
        if not found:
            raise GRITError(f"task {self.name}: the folder has no file {side}.jsonl (or .json, .csv, .parquet)")
        return found[0]


def find_task(name: str) -> Task | FolderTask:
    """The task of this name, or that of a folder.

    Raises:
        GRITError: there is none.
    """
    if name in TASKS:
        return TASKS[name]
    if "/" not in name:
        raise GRITError(
            f"unknown task {name!r}: choose one of {', '.join(TASKS)}, or a folder with train and test files"
        )
    task = FolderTask(name)
    for side in ("train", "test"):
        task.file(side)
    return task
