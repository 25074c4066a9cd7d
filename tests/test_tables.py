"""One reader for rows: what a file says, or one line that names the file, the row and the column."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from grit_impl.errors import GRITError
from grit_impl.tables import READERS, Row, read_table

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
# Characters at which str.splitlines() splits and JSON, CSV and Parquet do not.
SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format of the path's ending, written by each format's own library."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8", newline="")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", READERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=4))
def test_what_was_written_is_read(tmp_path: Path, suffix: str, rows: list[dict[str, str]]) -> None:
    """Oracle: the rows themselves, written by json, csv and pyarrow; every character, at both ends too."""
    table = read_table(write(tmp_path / f"rows{suffix}", rows))
    assert table.rows == rows
    assert set(table.columns) == {"prompt", "completion"}


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("separator", SEPARATORS, ids=lambda c: f"U+{ord(c):04X}")
def test_only_line_feeds_end_lines(tmp_path: Path, suffix: str, separator: str) -> None:
    """Oracle: two rows were written, each with the character inside."""
    rows = [{"a": f"one{separator}two", "b": separator}, {"a": "three", "b": f"{separator}four"}]
    assert read_table(write(tmp_path / f"rows{suffix}", rows)).rows == rows


@pytest.mark.parametrize("suffix", [s for s in READERS if s != ".parquet"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    """Oracle: the same file without it; inside a text U+FEFF is a character."""
    rows = [{"prompt": "a\ufeff", "completion": "b"}]
    path = write(tmp_path / f"rows{suffix}", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_table(path).rows == rows


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("length", [131_072, 140_000, 2_000_000])
def test_fields_of_any_length(tmp_path: Path, suffix: str, length: int) -> None:
    """Oracle: its length; the csv module's own limit is 131,072, and it is as it was afterwards."""
    before = csv.field_size_limit()
    (row,) = read_table(write(tmp_path / f"rows{suffix}", [{"a": "x" * length, "b": "y"}])).rows
    assert (len(row["a"]), csv.field_size_limit()) == (length, before)


@pytest.mark.parametrize(("delimiter", "name"), [(",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_delimiter_is_found_and_said(tmp_path: Path, delimiter: str, name: str, suffix: str) -> None:
    """Oracle: the fields that were written, the other delimiters inside them; commas go without saying."""
    path = tmp_path / f"rows{suffix}"
    fields = ["a, b; c", "d | e\tf; g, h"]
    with open(path, "w", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows([["prompt", "completion"], fields])
    table = read_table(path)
    assert list(table.rows[0].values()) == fields
    assert [name in note for note in table.notes] == ([True] if name else [])


@pytest.mark.parametrize("text", ["text\none\n", "text\none;two\n", "text\n\none\n\n", "text\r\none|two\r\n"])
def test_a_single_column(tmp_path: Path, text: str) -> None:
    """Oracle: the header has no delimiter, so the rows have none."""
    (tmp_path / "one.csv").write_text(text, newline="")
    assert [list(row) for row in read_table(tmp_path / "one.csv").rows] == [["text"]]


def test_json_lines_under_another_name(tmp_path: Path) -> None:
    """Oracle: the same rows; many data sets call their JSON lines .json."""
    rows = [{"a": "1"}, {"a": "2"}]
    write(tmp_path / "rows.jsonl", rows).rename(tmp_path / "rows.json")
    assert read_table(tmp_path / "rows.json").rows == rows


def test_folders_are_no_columns(tmp_path: Path) -> None:
    """Oracle: the file's own column; Arrow's data sets would add `year` from the folder's name."""
    (tmp_path / "year=2024").mkdir()
    assert read_table(write(tmp_path / "year=2024" / "rows.parquet", [{"a": "x"}])).columns == ("a",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("comma.csv", "question,answer\nWhy, then?,so\n", r"line 2 \(row 1\) has 3 fields where the header has 2"),
        ("short.csv", "a,b,c\n1,2,3\n1,2\n", r"line 3 \(row 2\) has 2 fields where the header has 3"),
        ("later.csv", 'a,b\n"x\ny",1\n2\n', r"line 4 \(row 2\) has 1 fields"),
        ("semicolon.csv", "a;b\n1;2;3\n", r"line 2 \(row 1\) has 3 fields"),
        ("open.csv", 'a,b\n"x,1\n', "unexpected end of data"),
        ("after.csv", 'a,b\n"x"y,1\n', "',' expected after '\"'"),
        ("space.csv", 'a,b\n1, "x"\n', r"column 'b': a space stands before the quote"),
        ("twice.csv", "a,a\n1,2\n", "two columns are named 'a'"),
        ("twice.jsonl", '{"a": "1"}\n{"a": "1", "a": "2"}\n', "line 2 cannot be read: the name 'a' stands twice"),
        ("inner.jsonl", '{"a": [{"b": 1, "b": 2}]}\n', "line 1 cannot be read: the name 'b' stands twice"),
        ("half.jsonl", '{"a": "1"}\n{"a": \n', "line 2 is not JSON"),
        ("array.jsonl", '{"a": "1"}\n["a"]\n', r"line 2 is not a JSON object but a list \(\['a'\]\)"),
        ("deep.jsonl", "[" * 100_000, "line 1 is nested too deeply"),
        ("digits.jsonl", '{"a": ' + "1" * 5000 + "}", "line 1 cannot be read: Exceeds the limit"),
        ("mixed.json", '[{"a": 1}, 2]', "entry 2 is not a JSON object"),
        ("object.json", '{"a": 1}', "does not hold a list of objects"),
        ("latin.jsonl", b'{"a": "\xe9"}', r"it is not UTF-8 \(byte 0xe9 at offset 7\)"),
        ("utf16.csv", "a,b\n1,2\n".encode("utf-16"), r"it is not UTF-8 \(byte 0xff at offset 0\)"),
        ("latin.csv", "a,b\nü,2\n".encode("latin-1"), r"it is not UTF-8 \(byte 0xfc"),
        ("cut.parquet", b"PAR1", "cannot read"),
        ("no.parquet", b"", "cannot read"),
        ("lines.csv", '"a\nb",c\n1\n', r"has 1 fields where the header has 2 \(a b,c\)"),
        ("left.csv", 'text",label\nx,1\n', "a quote is left over in the header"),
        ("left.tsv", 'a\t b" \nx\t1\n', "a quote is left over in the header"),
        ("pointer.csv", b"version https://git-lfs.github.com/spec/v1\noid x\nsize 9\n", "is a pointer of Git LFS"),
        ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid x\nsize 9\n", "is a pointer of Git LFS"),
        ("sheet.xlsx", b"PK", "must end in .jsonl"),
        ("folder.jsonl", None, "cannot read"),
        ("folder", None, "it is a folder"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(
    tmp_path: Path, name: str, content: bytes | str | None, message: str
) -> None:
    """Oracle: one line that names the file and the row."""
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GRITError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/file.csv", "no such file", "../x", "a/b/c", ""])
def test_nothing_there(name: str) -> None:
    """Oracle: no name of the hub either, so nothing is asked of the network."""
    with pytest.raises(GRITError, match=r"there is no such file|is a folder"):
        read_table(name)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "is a number (3), not text"),
        (float("nan"), "is a number (nan), not text"),
        (True, "is a truth value (True), not text"),
        (["a"], "is a list (['a']), not text"),
        ({"a": 1}, "is an object ({'a': 1}), not text"),
        (b"a", "is a bytes (b'a'), not text"),
        (None, "is null, not text"),
        ("\ud83d", "holds half a character (U+D83D)"),
    ],
)
def test_no_value_becomes_text(value: Any, message: str) -> None:
    """Oracle: the message, with source, row and column."""
    with pytest.raises(GRITError) as caught:
        Row({"prompt": value}, "rows.jsonl", 7).text("prompt")
    assert str(caught.value).startswith("rows.jsonl, row 7: field 'prompt' " + message)


def test_null_and_absent_are_what_the_caller_says() -> None:
    """Oracle: by hand."""
    row = Row({"a": None}, "rows.jsonl", 1)
    assert (row.text("a", null="x"), row.text("b", absent="y")) == ("x", "y")
    with pytest.raises(GRITError, match=r"row 1: no field 'b' \(it has: a\)"):
        row.text("b", null="x")
