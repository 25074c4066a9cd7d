"""Instruction data sets: every layout from local files, generated AQI questions, masking, and clear refusals."""

from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.recipes.datasets import ALPACA_TEMPLATE, SCHEMAS, load_instructions, require_dataset

# One row per public layout as the hub serves it, with what must become of it.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "..."},
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
        "3",
    ),
    "alpaca-no-input": (
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        "### Instruction:\nGreet.\n\n### Response:\n",
        "Hello",
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann sings.", "response": "Ann", "category": "closed_qa"},
        "### Instruction:\nWho?\n\n### Input:\nAnn sings.\n\n### Response:\n",
        "Ann",
    ),
    "boolq": (
        {"question": "is ice cold", "answer": True, "passage": "Ice is cold."},
        "### Instruction:\nis ice cold? Answer yes or no.\n\n### Input:\nIce is cold.\n\n### Response:\n",
        "yes",
    ),
    "qnli": (
        {"question": "Who sang?", "sentence": "Bob slept.", "label": 1, "idx": 0},
        "### Input:\nQuestion: Who sang?\nSentence: Bob slept.\n\n### Response:\n",
        "no",
    ),
    "gsm8k": (
        {"question": "2 cats and 1 cat?", "answer": "2+1=3\n#### 3"},
        "### Instruction:\n2 cats and 1 cat?\n\n### Response:\n",
        "2+1=3\n#### 3",
    ),
    "aqi": (
        {"features": "CO 8.4 ppm", "aqi_value": 90, "category": "Moderate"},
        "### Instruction:\nPredict AQI given: CO 8.4 ppm\n\n### Response:\n",
        "AQI 90 (Moderate)",
    ),
    "prompt-completion": ({"prompt": "Q: ", "completion": "A"}, "Q: ", "A"),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format of the path's ending, written by each format's own library."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_every_layout_from_every_file_format(name: str, ending: str, tmp_path: Path) -> None:
    """Oracle: the prompts and answers written by hand above; the layout is recognised by its columns."""
    row, prompt, completion = ROWS[name]
    loaded = load_instructions(write(tmp_path / f"data{ending}", [row]))
    assert loaded.column_names == ["prompt", "completion"]
    assert loaded[0]["prompt"].endswith(prompt)
    assert loaded[0]["completion"] == completion


@pytest.mark.parametrize("name", [name for name, schema in SCHEMAS.items() if schema.hub])
def test_hub_names_render_what_the_hub_serves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same row as a file; only the download is replaced, by rows in the hub's columns."""
    import datasets

    row, prompt, completion = ROWS[name]
    asked = {}

    def serve(*address: str, split: str) -> Any:
        asked.update(address=address, split=split)
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", serve)
    loaded = load_instructions(name, split="validation")
    assert (loaded[0]["prompt"].endswith(prompt), loaded[0]["completion"]) == (True, completion)
    assert asked == {"address": SCHEMAS[name].hub, "split": "validation"}


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message names the data set, its address and the way out."""
    import datasets
    import huggingface_hub

    def fail(*address: Any, **options: Any) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        GRITError, match=r"tatsu-lab/alpaca \(split train.*no route to host second line; give a local file"
    ) as caught:
        load_instructions("alpaca")
    assert "\n" not in str(caught.value)


def test_aqi_is_generated_and_leaves_the_test_set_alone() -> None:
    """Oracle: the frozen set; `split="test"` is that set."""
    train = load_instructions("aqi", limit=300, seed=3407)
    test = load_instructions("aqi", split="test", limit=10_000)
    assert (len(train), len(test)) == (300, len(aqi.frozen_items()))
    assert not set(train["prompt"]) & set(test["prompt"])
    item = aqi.frozen_items()[0]
    assert test[0] == {
        "prompt": ALPACA_TEMPLATE.format(instruction=f"Predict AQI given: {item['features']}"),
        "completion": f"AQI {item['aqi_value']} ({item['category']})",
    }
    assert train["prompt"] != load_instructions("aqi", limit=300, seed=1)["prompt"]


def test_seed_shuffles_before_the_limit(tmp_path: Path) -> None:
    """Oracle: file order without a seed, one fixed other order with it."""
    path = write(tmp_path / "d.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(50)])
    assert load_instructions(path, limit=5)["prompt"] == list("01234")
    shuffled = load_instructions(path, limit=5, seed=1)["prompt"]
    assert shuffled == load_instructions(path, limit=5, seed=1)["prompt"] != list("01234")
    assert len(load_instructions(path, limit=500)) == 50


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: one of three rows has none, and GLUE's unlabelled test split has none at all."""
    rows = [{"instruction": "a", "output": value} for value in ("x", None, "y")]
    with caplog.at_level(logging.WARNING):
        assert load_instructions(write(tmp_path / "d.jsonl", rows))["completion"] == ["x", "y"]
    assert "1 of 3 rows have no answer" in caplog.text
    assert "not used" not in caplog.text
    unlabelled = {"question": "q", "sentence": "s", "label": -1}
    with pytest.raises(GRITError, match="no row with an answer"):
        load_instructions(write(tmp_path / "q.jsonl", [unlabelled]))


def test_how_a_file_was_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Looked at beforehand and read in earnest, a file with semicolons is noted one time."""
    path = tmp_path / "d.csv"
    path.write_text("prompt;completion\na;b\nc;d\n")
    require_dataset(path)
    assert load_instructions(path)["completion"] == ["b", "d"]
    assert caplog.text.count("semicolons") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl: there is no such file"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("empty.csv", b"prompt,completion\n", "empty.csv is empty"),
        ("broken.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt"\n', "broken.jsonl: line 2"),
        ("scalar.json", b"3", "does not hold a list"),
        ("numbers.json", b"[1, 2]", "every entry must be an object"),
        ("binary.jsonl", b"\xff\xfe\x00", "binary.jsonl: it is not UTF-8"),
        ("broken.parquet", b"PAR1 but not really", "broken.parquet: Parquet magic"),
        ("other.csv", b"a,b\n1,2\n", "has columns a, b; it needs"),
        ("data.xlsx", b"x", "must end in .jsonl"),
    ],
)
def test_bad_files_are_named_in_one_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    """Oracle: the message names the file and what is wrong with it."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GRITError, match=message.replace(".", r"\.")) as caught:
        load_instructions(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "alpacca"}, "unknown data set 'alpacca'"),
        ({"name_or_path": "aqi", "split": "dev"}, "no split 'dev'"),
        ({"name_or_path": "aqi", "limit": 0}, "limit 0 is out of range"),
    ],
)
def test_bad_requests_are_named(arguments: dict[str, Any], message: str) -> None:
    """Oracle: the message names the value and the choice."""
    with pytest.raises(GRITError, match=message):
        load_instructions(**arguments)


@pytest.mark.parametrize("name", ROWS)
def test_another_form_gets_instruction_and_input(name: str, tmp_path: Path) -> None:
    """Oracle: the sections of the Alpaca prompt, taken apart; a whole prompt stays what it is, as in TRL."""
    row, prompt, completion = ROWS[name]
    told = load_instructions(write(tmp_path / "data.jsonl", [row]), form=lambda text, more: f"{text}|{more}")[0]
    sections = re.fullmatch(
        r"(?:### Instruction:\n(.*?)\n\n)?(?:### Input:\n(.*)\n\n)?### Response:\n", prompt, re.DOTALL
    )
    text, more = sections.groups() if sections else (prompt, "")
    assert told["prompt"].endswith(f"{text or ''}|{more or ''}" if sections else prompt)
    assert told["completion"] == completion
