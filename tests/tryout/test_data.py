"""Rows as tokens and as items, the order of a seed, and answers that are generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grit_impl.errors import GRITError
from grit_impl.recipes.bases import load_base, load_tokenizer
from grit_impl.recipes.tiny_llama import knowledge
from grit_impl.recipes.tiny_llama.corpus import SHORT_TEMPLATE
from grit_impl.recipes.tokens import Tokens, tokenize
from grit_impl.sweep.run import epochs
from grit_impl.tryout.data import encoded, is_right, items, prepare, read_side
from grit_impl.tryout.split import SIDES
from grit_impl.tryout.work import accuracy


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The embedded base's."""
    return load_tokenizer("tiny")


def tokens_of(tokenizer: Any, *answers: str) -> Tokens:
    """Rows with these answers."""
    return tokenize({"prompt": [f"Say {n}: " for n in range(len(answers))], "completion": list(answers)}, tokenizer, 64)


def test_all_rows_are_on_a_side_as_the_tokenizer_reads_them(tmp_path: Path, tokenizer: Any) -> None:
    """Oracle: the file's rows, decoded from the three sides."""
    rows = [(f"What is {n}?", f"it is {n}") for n in range(200)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows))
    split = prepare("tiny", str(file), 64, 0, tmp_path)
    found = [row for side in SIDES for row in encoded(read_side(tmp_path, side))]
    texts = {tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in found}
    assert len(found) == 200 == sum(map(len, split.rows.values()))
    assert split.first == "the first row asks 'What is 0?' and is answered 'it is 0'"
    assert "repeat" not in str(split)
    assert {text.replace(" ", "") for text in texts} == {(a + b).replace(" ", "") for a, b in rows}
    assert all(row["labels"][0] == -100 and row["labels"][-1] == tokenizer.eos_token_id for row in found)


def test_rows_without_room_for_an_answer_are_on_no_side(tmp_path: Path) -> None:
    """They are counted apart, and not among those that a side needs."""
    file = tmp_path / "mine.jsonl"
    asked = [f"What is {n}?" + " really" * 80 * (n % 2) for n in range(400)]
    file.write_text("".join(json.dumps({"prompt": ask, "completion": "it"}) + "\n" for ask in asked))
    split = prepare("tiny", str(file), 64, 0, tmp_path)
    assert "200 rows are left out" in str(split)
    sizes = {side: len(read_side(tmp_path, side).prompts) for side in SIDES}
    assert sizes == {side: len(numbers) for side, numbers in split.rows.items()}
    assert sum(sizes.values()) == 200
    file.write_text("".join(json.dumps({"prompt": ask, "completion": "it"}) + "\n" for ask in asked[:150]))
    with pytest.raises(GRITError, match=r"75 rows \(75 more have questions that fill --max-length\), 75 of them"):
        prepare("tiny", str(file), 64, 0, tmp_path)


def test_an_order_has_every_row_before_any_twice() -> None:
    """Other seeds, other orders; the same seed, the same."""
    rows = list(range(10))
    found = epochs(rows, 25, 3)
    assert sorted(found[:10]) == sorted(found[10:20]) == rows
    assert found[:10] != found[10:20]
    assert found == epochs(rows, 25, 3) != epochs(rows, 25, 4)
    assert epochs(rows, 0, 3) == []


def test_items_have_what_the_scorer_reads(tokenizer: Any) -> None:
    """Choices of labels; of a pattern what is in its group; and what is none of it is refused."""
    labels = tokens_of(tokenizer, "red", "blue", "red")
    assert sorted(items(labels, tokenizer, "choice", "")[0]["choices"]) == ["blue", "red"]
    indices = tokens_of(tokenizer, "AQI 12", "AQI 13")
    assert [item["answer"] for item in items(indices, tokenizer, "regex", "AQI ([0-9]+)")] == ["12", "13"]
    with pytest.raises(GRITError, match="--pattern third: it is not in the answer 'AQI 12'"):
        items(indices, tokenizer, "regex", "third")
    with pytest.raises(GRITError, match="it is not in the answer 'AQI 12'"):
        items(indices, tokenizer, "regex", "AQI (x)?")
    with pytest.raises(GRITError, match="11 different answers, more than 10"):
        items(tokens_of(tokenizer, *map(str, range(11))), tokenizer, "choice", "")
    with pytest.raises(GRITError, match="learnt whole"):
        items(Tokens([[5, 6]], [0], 0), tokenizer, "exact", "")
    whole = tokenize({"prompt": [""], "completion": ["red"]}, tokenizer, 64)
    with pytest.raises(GRITError, match="learnt whole"):
        items(whole, tokenizer, "exact", "")


def test_the_first_row_is_shown_as_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file with texts and labels under names that mean something else is learnt without its labels: both are said."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": f"It is {n}", "team": "red"}) + "\n" for n in range(200)))
    split = prepare("tiny", str(file), 64, 0, tmp_path)
    assert split.first == "the first row has no question and is learnt whole: 'It is 0'"
    assert "mine.jsonl: read as text; not used: team" in caplog.text


def test_what_a_pattern_extracts_must_be_the_same(tokenizer: Any) -> None:
    """A truth within a longer number, or elsewhere in the answer, is not right."""
    item = items(tokens_of(tokenizer, "AQI 5"), tokenizer, "regex", "AQI ([0-9]+)")[0]
    said = {"AQI 5": True, "5 is too low: AQI 5.": True, "AQI 150": False, "AQI 9, not 5": False, "5": False}
    assert {text: is_right("regex", item, text) for text in said} == said
    item = items(tokens_of(tokenizer, "First"), tokenizer, "regex", "(?i)first|second")[0]
    assert [is_right("regex", item, text) for text in ("it is FIRST", "second, then first")] == [True, False]


def test_accuracy_counts_what_the_base_answers(tokenizer: Any) -> None:
    """Oracle: facts that the base was taught, asked in many lengths; every other truth is replaced by a wrong one."""
    model, _ = load_base("tiny", dtype="float32", device="cpu")
    facts = knowledge.frozen_items()[:40]
    prompts = [SHORT_TEMPLATE.format(instruction=fact["question"]) for fact in facts]
    rows = tokenize({"prompt": prompts, "completion": [fact["answer"] for fact in facts]}, tokenizer, 128)
    truths = [fact["answer"] if number % 2 else "quite another" for number, fact in enumerate(facts)]
    wanted = [{"features": "", "answer": truth} for truth in truths]
    assert len(set(map(len, rows.input_ids))) > 5
    assert accuracy(model, tokenizer, rows, wanted, "exact", "cpu") == pytest.approx(50)
