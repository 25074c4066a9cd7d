"""Anybody's test set: formats, mapped fields, and the checks before the first request."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from grit_impl.aqi import INSTRUCTION, answer, generate, instruction
from grit_impl.errors import GRITError
from grit_impl.evaluate.items import Fields, load_aqi, load_knowledge, load_questions, with_wrong
from grit_impl.tables import read_table

MINE = Fields("text", "label", "What is the AQI? {features}", id="key", group="town")
ROWS = [
    {"key": "a", "text": "PM2.5 12", "label": "57", "town": "X"},
    {"key": "b", "text": "PM2.5 4", "label": "Good", "town": "Y"},
    {"key": "c", "text": "PM2.5 300", "label": "AQI 450 (Hazardous)", "town": "Y"},
]


def _write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_formats_and_mapped_fields(tmp_path: Path, suffix: str) -> None:
    """Oracle: the three rows, by hand, whatever file they come from."""
    found = load_aqi(_write(tmp_path / f"mine.{suffix}", ROWS), MINE)
    assert [(i["id"], i["prompt"], i["aqi_value"], i["category"], i["pollutant"]) for i in found.items] == [
        ("a", "What is the AQI? PM2.5 12", 57, "Moderate", "X"),
        ("b", "What is the AQI? PM2.5 4", None, "Good", "Y"),
        ("c", "What is the AQI? PM2.5 300", 450, "Hazardous", "Y"),
    ]


def test_the_projects_own_files(tmp_path: Path) -> None:
    """Oracle: the generator's own items."""
    items = generate(50, seed=2)
    found = load_aqi(_write(tmp_path / "own.jsonl", items), limit=40)
    assert [i["prompt"] for i in found.items] == [instruction(i) for i in items[:40]]
    assert [i["aqi_value"] for i in found.items] == [i["aqi_value"] for i in items[:40]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "row 2: field 'label' is empty"),
        ({"label": None}, "row 2: field 'label' is empty"),
        ({"text": "  "}, "row 2: field 'text' is empty"),
        ({"label": "blue"}, "row 2: field 'label' is 'blue', which names no air quality index"),
        ({"label": "AQI 57 (Good)"}, "row 2: field 'label' is 'AQI 57 \\(Good\\)', which contradicts itself"),
        ({"label": ["Good"]}, r"row 2: field 'label' is a list \(\['Good'\]\), not text"),
        ({"text": 12.5}, r"row 2: field 'text' is a number \(12.5\), not text"),
        ({"key": ["b"]}, r"row 2: field 'key' is a list \(\['b'\]\), not text"),
        ({"town": {"name": "Y"}}, "row 2: field 'town' is an object"),
        ({"key": "a"}, "two items have the id 'a'"),
        ({"text": "pm2.5  12"}, "items a and b ask the same but have different answers"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict, message: str) -> None:
    """Oracle: row 2 was spoilt in exactly this way."""
    path = _write(tmp_path / "mine.jsonl", [ROWS[0], {**ROWS[1], **change}, ROWS[2]])
    with pytest.raises(GRITError, match=message):
        load_aqi(path, MINE)


def test_duplicates_are_left_out_and_noted(tmp_path: Path) -> None:
    """Oracle: the same features in another order and case are the same question."""
    rows = [
        {"key": "a", "text": "PM2.5 12.0, O3 0.05", "label": "57"},
        {"key": "b", "text": "o3 0.05, pm2.5 12.0", "label": "57"},
    ]
    found = load_aqi(_write(tmp_path / "mine.jsonl", rows), MINE)
    assert [i["id"] for i in found.items] == ["a"]
    assert found.notes == ["1 repeated questions left out"]


def test_overlap_with_the_training_data_is_refused(tmp_path: Path) -> None:
    """Oracle: the second question is in the training set, once as features and once as a whole prompt."""
    path = _write(tmp_path / "mine.jsonl", ROWS)
    for training in (["pm2.5 4"], ["What is the AQI? PM2.5 4"]):
        with pytest.raises(GRITError, match=r"1 of 3 questions are in the training data \(first: b\).*--allow-overlap"):
            load_aqi(path, MINE, training=training)
        allowed = load_aqi(path, MINE, training=training, allow_overlap=True)
        assert allowed.notes == ["1 questions are also in the training data (allowed)"]
    assert load_aqi(path, MINE, training=["PM2.5 40"]).notes == []


def test_knowledge(tmp_path: Path) -> None:
    """Oracle: by hand; several right answers are kept."""
    rows = [
        {"id": "1", "question": "Capital of Vietnam?", "answer": "Hanoi"},
        {"question": "Early?", "answer": ["a", "b"]},
    ]
    found = load_knowledge(_write(tmp_path / "facts.jsonl", rows))
    assert [(i["id"], i["prompt"], i["answer"]) for i in found.items] == [
        ("1", "Capital of Vietnam?", "Hanoi"),
        ("row-2", "Early?", ["a", "b"]),
    ]
    with pytest.raises(GRITError, match="row 1: field 'answer' is empty"):
        load_knowledge(_write(tmp_path / "facts.jsonl", [{"question": "x", "answer": " "}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no such file"),
        ("bad.jsonl", '{"a": 1}\n{oops', "line 2 is not JSON"),
        ("list.jsonl", "[1]", "line 1 is not a JSON object"),
        ("bad.json", '{"a": 1}', "does not hold a list of objects"),
        ("bad.parquet", "no parquet", "cannot read"),
        ("bad.csv", '"a\n1,2\n3', "cannot read"),
        ("latin.jsonl", b'{"text": "\xe9"}', "cannot read"),
        ("empty.jsonl", "", "holds no questions"),
        ("readme.txt", "x", "must end in .jsonl"),
        ("fields.jsonl", '{"a": 1}', r"row 1: no field 'text' \(it has: a\)"),
    ],
)
def test_unreadable_files_are_one_line(tmp_path: Path, name: str, content, message: str) -> None:
    """Oracle: the file and what is wrong with it, on one line."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GRITError, match=message) as caught:
        load_aqi(path, MINE)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_answers_stay_text(tmp_path: Path) -> None:
    """Oracle: a CSV's '007' and 'NA' are what they say, not 7 and missing."""
    (tmp_path / "x.csv").write_text("a,b\n007,NA\n")
    assert read_table(tmp_path / "x.csv").rows == [{"a": "007", "b": "NA"}]


def test_answers_of_the_frozen_set_parse(tmp_path: Path) -> None:
    """Oracle: a set whose answer column is the trained answer text has the generator's truths."""
    items = generate(60, seed=3)
    rows = [{"features": i["features"], "answer": answer(i)} for i in items]
    found = load_aqi(_write(tmp_path / "mine.jsonl", rows), Fields())
    assert [(i["aqi_value"], i["category"]) for i in found.items] == [(i["aqi_value"], i["category"]) for i in items]


def test_only_the_frozen_sets_columns_get_the_aqi_instruction(tmp_path: Path) -> None:
    """Oracle: what is sent, and which scorer reads the answers, by hand."""
    native = _write(tmp_path / "native.jsonl", generate(5, seed=3))
    assert load_questions(native, "features", "")[1:] == ("aqi", INSTRUCTION)
    air = _write(tmp_path / "air.jsonl", [{"text": "PM2.5 12", "truth": "AQI 56 (Moderate)"}])
    assert load_questions(air, "text", "truth")[1:] == ("aqi", "{features}")
    numbers = _write(tmp_path / "sums.jsonl", [{"text": "6 * 7?", "truth": "42"}])
    items, scorer, template = load_questions(numbers, "text", "truth", answer_format="<number>")
    assert (scorer, template) == ("contains-as-answer", "{features}\n\nAnswer in this form: <number>")
    assert items.items[0]["prompt"] == "6 * 7?\n\nAnswer in this form: <number>"
    assert load_questions(numbers, "text", "truth", scorer="numeric", prompt="Q: {features}")[1:] == (
        "numeric",
        "Q: {features}",
    )
    with pytest.raises(GRITError, match="names no air quality index"):
        load_questions(_write(tmp_path / "x.jsonl", [{"text": "a", "truth": "b"}]), "text", "truth", scorer="aqi")


def test_labels_are_choices_and_answers_of_like_questions_are_wrong(tmp_path: Path) -> None:
    """Oracle: by hand."""
    cities = dict(zip("ABCDEFGHIJKL", "abcdefghijkl", strict=True))
    rows = [{"question": f"What capital has {land}?", "answer": city} for land, city in cities.items()]
    found = with_wrong(load_knowledge(_write(tmp_path / "facts.jsonl", rows)), limit=2)
    assert [item["wrong"] for item in found.items] == [["b", "c", "d"], ["c", "d", "e"]]
    labels = [{"question": f"Praise {i}?", "answer": ["yes", "no"][i % 2]} for i in range(6)]
    found = load_knowledge(_write(tmp_path / "labels.jsonl", labels))
    assert found.items[0]["choices"] == ["yes", "no"]
    assert with_wrong(found).items[0]["wrong"] == ["no"]
    own = [{"question": "Capital of F?", "answer": "u", "wrong": ["t"]}]
    assert with_wrong(load_knowledge(_write(tmp_path / "own.jsonl", own))).items[0]["wrong"] == ["t"]
    with pytest.raises(GRITError, match="item row-1 has no wrong answers"):
        with_wrong(load_knowledge(_write(tmp_path / "one.jsonl", [{"question": "Q?", "answer": "a"}])))
