"""The generated tasks: answers right by independent means, and nothing held out in any training set."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.recipes.tasks import HELD_OUT, TASKS, find_task
from grit_impl.recipes.tiny_llama import knowledge

SIDES = ("train", "validation", "test")


@pytest.mark.parametrize("name", TASKS)
def test_training_and_held_out_sets_share_no_question(name: str) -> None:
    """Over several seeds, in both held-out sets; equal seeds give equal rows, and different ones different rows."""
    task = find_task(name)
    test, validation = task.held_out("test"), task.held_out("validation")
    assert (len(test), len(validation)) == (HELD_OUT["test"], HELD_OUT["validation"])
    held_out = {question for question, _ in (*test, *validation)}
    assert len(held_out) == len(test) + len(validation)
    for seed in (0, 1000):
        rows = task.training(1600, seed)
        questions = {question for question, _ in rows}
        assert len(questions) == 1600
        assert not questions & held_out
        assert rows == task.training(1600, seed)
    assert task.training(50, 0) != task.training(50, 1)


def test_aqi_training_shares_no_air_with_what_is_held_out() -> None:
    """Also in another order of the pollutants, and with no item that `grit evaluate` asks."""

    def air(question: str) -> frozenset[str]:
        return frozenset(question.removeprefix("Predict AQI given: ").split(", "))

    task = find_task("aqi")
    asked = {air(aqi.instruction(item)) for item in aqi.frozen_items()}
    for split in HELD_OUT:
        questions = {air(question) for question, _ in task.held_out(split)}
        assert not asked & questions
        asked |= questions
    assert not asked & {air(question) for question, _ in task.training(1600, 1000)}


def test_conversions_are_right() -> None:
    """Oracle: exact fractions and the metric prefixes."""
    prefix = {"k": 1000, "c": Fraction(1, 100), "m": Fraction(1, 1000), "": 1}
    parts = {"ppm": Fraction(1, 10**6), "ppb": Fraction(1, 10**9)}

    def size(unit: str) -> Fraction:
        return Fraction(parts[unit]) if unit in parts else Fraction(prefix[unit[:-1]])

    for question, answer in find_task("convert").held_out("test"):
        amount, source, target = re.fullmatch(r"Convert ([\d.]+) (\w+) to (\w+)\.", question).groups()  # type: ignore[union-attr]
        value, unit = answer.split()
        assert unit == target
        assert Fraction(value) * size(target) == Fraction(amount) * size(source)


def test_choices_are_right_and_unambiguous() -> None:
    """Oracle: the facts that the base was pretrained on. The right option stands once, in the named place."""
    facts = dict(knowledge.facts())
    for question, answer in find_task("choose").held_out("test"):
        asked, listed = re.fullmatch(r"(.*\?) (1\. .*)", question).groups()  # type: ignore[union-attr]
        options = re.findall(r"\d\. ([^,]+)", listed)
        place, text = answer.split(". ", 1)
        assert facts[asked] == text == options[int(place) - 1]
        assert len(set(options)) == 3


def test_extracted_fields_stand_in_the_sentence() -> None:
    """Oracle: the sentence; two cities occur, and the answer's is the one that is lived in now."""
    now = re.compile(r"(?:moved from \w+ to|went to|lives in|To) (\w[\w ]*?)(?: came| in| since|\.|$)")
    for question, answer in find_task("extract").held_out("test"):
        name, city, year = answer.split(" | ")
        assert all(field in question for field in (name, city, year))
        assert now.search(question).group(1) == city, question  # type: ignore[union-attr]


def test_an_unknown_task_or_split_is_refused() -> None:
    """By name."""
    with pytest.raises(GRITError, match=r"'juggle'.*aqi"):
        find_task("juggle")
    with pytest.raises(GRITError, match="'train'"):
        find_task("convert").held_out("train")


def test_a_folders_sides_have_no_row_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the files. Every training row comes once before any comes again; seeds order them; a run trains."""
    from grit_impl.recipes import tasks
    from grit_impl.recipes.bases import load_tokenizer
    from grit_impl.sweep.run import epochs, train

    monkeypatch.setattr(tasks, "HELD_OUT_ROWS", 8)
    for side, n in (("train", 24), ("test", 10)):
        rows = [{"question": f"What is {side} {i}?", "answer": str(i)} for i in range(n)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, tokenizer = find_task(str(tmp_path)), load_tokenizer("tiny")
    monkeypatch.setattr(tasks, "HELD_OUT_ROWS", 24)
    with pytest.raises(GRITError, match="24 training rows are too few: the first 24"):
        task.rows("train", "tiny", tokenizer, 64)
    monkeypatch.setattr(tasks, "HELD_OUT_ROWS", 8)
    sides = {side: {tuple(r["input_ids"]) for r in task.rows(side, "tiny", tokenizer, 64)} for side in SIDES}
    assert {side: len(rows) for side, rows in sides.items()} == {"train": 16, "validation": 8, "test": 8}
    assert not sides["train"] & sides["validation"]
    rows = task.rows("train", "tiny", tokenizer, 64)
    orders = [[tuple(row["input_ids"]) for row in epochs(rows, 32, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert set(orders[0][:16]) == set(orders[0][16:]) == sides["train"]
    settings = {"lr": 3e-3, "warmup": 1, "rank": 4, "alpha": 4, "steps": 2, "batch_size": 2, "every": 2}
    job = {"base": "tiny", "task": str(tmp_path), "method": "adamw", "seed": 0, "phase": "evaluation"}
    assert train(job, {**settings, "max_length": 64}, "cpu")["status"] == "done"
