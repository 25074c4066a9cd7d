"""One reader for everything that comes in rows: training data, questions of an evaluation, logs.

Nothing is coerced. A row is what its file says: JSON's own types, text in CSV. What two readers could read in two
ways (a repeated column, a row of another width, bytes that are no UTF-8) is an error with the file, the row and the
column. Formats: RFC 8259 (JSON, one value a line split at U+000A alone), RFC 4180 (CSV, with the delimiter that gives
every row one width), Apache Parquet, and the hub through `datasets`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from grit_impl.errors import GRITError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What may separate fields, the likeliest first."""
_SHOWN = 60
HUB_SECONDS = 10
"""Until the hub is taken for unreachable."""
_HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
POINTER = b"version https://git-lfs.github.com/spec/"
T = TypeVar("T")
Fields = Iterable[tuple[str, Any]] | Mapping[str, Any]


class Row(dict[str, Any]):
    """The fields of one row, which knows where it stands.

    Attributes:
        source: The file or data set.
        number: Its number there, from 1; a header does not count.
        line: The file's line where it ends; where there are no lines, its number.
        forbidden: What no text may hold, e.g. a tokenizer's special tokens.
    """

    __slots__ = ("forbidden", "line", "number", "source")

    def __init__(self, fields: Fields, source: str | Path, number: int, line: int | None = None) -> None:
        super().__init__(fields)
        self.source, self.number, self.line = str(source), number, line or number
        self.forbidden: re.Pattern[str] | None = None

    def holding(self, fields: Fields) -> Row:
        """Other fields in the place of these."""
        return Row(fields, self.source, self.number, self.line)

    def error(self, column: str, what: str) -> GRITError:
        """An error that names the file, the row and the column."""
        return GRITError(f"{self.source}, row {self.number}: field {column!r} {what}")

    def require(self, column: str) -> Any:
        """The value in a column, whatever it is.

        Raises:
            GRITError: the row has no such column.
        """
        if column not in self:
            raise GRITError(f"{self.source}, row {self.number}: no field {column!r} (it has: {', '.join(self)})")
        return self[column]

    def text(self, column: str, *, null: str | None = None, absent: str | None = None) -> str:
        """The text in a column, as it stands.

        Args:
            column: Its name.
            null: What null stands for; None: it is an error.
            absent: What it is where there is no such column; None: that is an error.

        Raises:
            GRITError: it is a number, a list, null, or text that cannot be encoded or is forbidden.
        """
        if absent is not None and column not in self:
            return absent
        value = self.require(column)
        return null if value is None and null is not None else self.checked(value, column)

    def checked(self, value: Any, column: str) -> str:
        """A value of this row, found to be good text; raises like `text`."""
        if not isinstance(value, str):
            raise self.error(column, "is null, not text" if value is None else f"is {brief(value)}, not text")
        if not value.isascii() and (lone := re.search("[\ud800-\udfff]", value)):
            raise self.error(column, f"holds half a character (U+{ord(lone[0]):04X}), which no encoding has")
        if self.forbidden is not None and (found := self.forbidden.search(value)):
            raise self.error(
                column,
                f"holds {found[0]!r}, a special token of the base: remove it, "
                "or give messages, in which the base's chat template places such tokens",
            )
        return value


@dataclass(slots=True)
class Table:
    """Rows and how they were read.

    Attributes:
        source: The file or data set.
        rows: In file order.
        header: The columns' names, where the source says them apart from the rows.
        notes: What a user should know about how it was read, e.g. the delimiter.
        meta: What else the source says (the seed of a log's run).
        clock: When the first row was written, in any unit; None where the source does not say.
    """

    source: str
    rows: list[Row]
    header: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    clock: float | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in the order in which they appear."""
        return tuple(dict.fromkeys([*self.header, *(name for row in self.rows for name in row)]))


def brief(value: Any) -> str:
    """A value for a message: its kind, and what it is on one short line."""
    kinds = {str: "text", dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return f"{kinds.get(type(value), 'a ' + type(value).__name__)} ({_short(repr(value))})"


def _short(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


def read_table(source: str | Path, split: str = "train") -> Table:
    """Read a file by its ending, or a data set of the hub.

    Args:
        source: A path that ends in one of `READERS`, or `owner/name` or `owner/name:config` of the hub.
        split: Split of a data set of the hub; a file is one split and is read whole.

    Raises:
        GRITError: there is nothing to read, or something that cannot be read in one way only.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        if path.is_dir():
            raise GRITError(f"cannot read {path}: it is a folder; name a file")
        if path.is_file():
            raise GRITError(f"cannot read {path}: its name must end in {', '.join(READERS)}")
        name, _, config = str(source).partition(":")
        if not re.fullmatch(_HUB_NAME, name):
            raise GRITError(f"cannot read {source}: there is no such file")
        return read_hub(name, config or None, split=split)
    return read_file(path, suffix)


def is_hub_name(name: str) -> bool:
    """Whether this is `owner/name` or `owner/name:config` of the hub, and no file here."""
    return bool(re.fullmatch(rf"(?=[^:]*/){_HUB_NAME}(:[^/:]+)?", name)) and not (
        Path(name).exists() or Path(name).suffix.lower() in READERS
    )


def read_file(path: str | Path, suffix: str | None = None) -> Table:
    """Read a file as what its ending says, or as `suffix` (of `READERS`) says.

    Raises:
        GRITError: as `read_table`.
    """
    reader = READERS.get(suffix or Path(path).suffix.lower())
    if reader is None:
        raise GRITError(f"cannot read {path}: its name must end in {', '.join(READERS)}")
    return read_with(reader, path)


def read_with(reader: Callable[[Path, bytes], T], path: str | Path) -> T:
    """What a reader of this module, or another function of a path and its bytes, makes of a file.

    Raises:
        GRITError: whatever goes wrong, with the file.
    """
    try:
        refuse_pointers(Path(path))
        return reader(Path(path), Path(path).read_bytes())
    except GRITError:
        raise
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise GRITError(f"cannot read {path}: it is not UTF-8 ({found}); save it as UTF-8") from None
    except FileNotFoundError:
        raise GRITError(f"cannot read {path}: there is no such file") from None
    except OSError as error:
        raise GRITError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # pyarrow has a family of its own, some of it not ValueErrors
        raise GRITError(f"cannot read {path}: {one_line(error)}") from error


def refuse_pointers(*paths: Path) -> None:
    """Refuse what `git clone` leaves instead of large files where Git LFS is not installed.

    Raises:
        GRITError: one of these files is such a pointer.
    """
    for path in paths:
        if path.is_file() and 0 < path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
            raise GRITError(f"{path} is a pointer of Git LFS, not the file: `git lfs pull` in its folder fetches it")


def read_hub(name: str, config: str | None = None, *, split: str) -> Table:
    """Read one split of a data set on the hub, or of its cache where the hub does not know it or does not answer."""
    source = f"{name}:{config}" if config else name
    unreachable: Exception | None = None
    try:
        import datasets  # type: ignore[import-untyped]
        from huggingface_hub import HfApi

        online = datasets.config.HF_HUB_OFFLINE
        try:
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
        except Exception as error:  # the hub's client raises a dozen unrelated types
            # Asked again and again, `datasets` would need half a minute to find out the same.
            unreachable, datasets.config.HF_HUB_OFFLINE = error, True
        try:
            loaded = datasets.load_dataset(*filter(None, (name, config)), split=split)
        finally:
            datasets.config.HF_HUB_OFFLINE = online
        rows = [Row(row, source, number) for number, row in enumerate(loaded, 1)]
    except Exception as error:
        raise GRITError(
            f"cannot load data set {source} (split {split}) from the hub: {one_line(unreachable or error)}; "
            "give a local file of the same columns instead"
        ) from error
    return Table(source, rows)


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# -- JSON -------------------------------------------------------------------------------------------------------------


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unrepeated)
    except json.JSONDecodeError as error:
        raise GRITError(f"{place} is not JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise GRITError(f"{place} is nested too deeply") from None
    except ValueError as error:  # a name twice, or a number of thousands of digits
        raise GRITError(f"{place} cannot be read: {one_line(error)}") from None


def _json_row(value: Any, path: Path, number: int, place: str, line: int | None = None) -> Row:
    if not isinstance(value, dict):
        raise GRITError(f"{place} is not a JSON object but {brief(value)}; every entry must be an object")
    return Row(value, path, number, line)


def read_json_lines(path: Path, data: bytes) -> Table:
    """One JSON object a line."""
    rows: list[Row] = []
    # Not splitlines(), which also splits at U+2028, U+0085 and other characters that JSON strings may hold.
    for line, text in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if text.strip():
            place = f"cannot read {path}: line {line}"
            rows.append(_json_row(_parsed(text, place), path, len(rows) + 1, place, line))
    return Table(str(path), rows)


def read_json(path: Path, data: bytes, *, inside: str | None = None) -> Table:
    """A list of objects; `inside` is its name where it stands in an object."""
    text = data.decode("utf-8-sig")
    if text.lstrip()[:1] == "{" and "\n" in text.strip():
        # Many files of JSON lines are named .json; a single object over several lines is none.
        first = text.lstrip().split("\n", 1)[0]
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            pass
        else:
            return read_json_lines(path, data)
    place = f"cannot read {path}"
    value = _parsed(text, f"{place}: it")
    if inside is not None and isinstance(value, dict):
        value = value.get(inside)
    if not isinstance(value, list):
        raise GRITError(f"{place}: it does not hold a list of objects{f' named {inside}' if inside else ''}")
    return Table(str(path), [_json_row(row, path, n, f"{place}: entry {n}") for n, row in enumerate(value, 1)])


# -- CSV --------------------------------------------------------------------------------------------------------------


def read_delimited(path: Path, data: bytes, *, known: Callable[[str], bool] | None = None) -> Table:
    """Separated by the first delimiter that splits the header and gives every row as many fields.

    Args:
        path: For messages.
        data: What the file holds.
        known: Tells names of a log's columns. Delimiters that bring some forth come first; a log's cells are numbers
            and names, so a space before one means nothing, nor does a row of empty cells or a column without a name.
    """
    text = data.decode("utf-8-sig")
    limit = csv.field_size_limit(sys.maxsize)  # of the whole process, so it is put back
    try:
        heads: dict[str, list[str]] = {
            d: next((fields for fields in _reader(text, d) if fields), []) for d in DELIMITERS
        }
        candidates = [d for d, head in heads.items() if len(head) > 1] or [","]
        if known is not None:
            candidates.sort(key=lambda d: not any(map(known, heads[d])))
        errors = []
        for delimiter in candidates:
            try:
                header, rows = _split(path, text, delimiter, known is not None)
            except GRITError as error:
                errors.append(error)
                continue
            said = delimiter == "," or (known is not None and path.suffix.lower() == ".tsv")
            notes = [] if said else [f"{path}: read as fields separated by {DELIMITERS[delimiter]}"]
            return Table(str(path), rows, header, notes)
        raise errors[0]
    finally:
        csv.field_size_limit(limit)


def _reader(text: str, delimiter: str, *, strict: bool = False, skip: bool = False) -> Any:
    # newline="" leaves line ends inside quotes alone.
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict, skipinitialspace=skip)


def _split(path: Path, text: str, delimiter: str, log: bool) -> tuple[list[str], list[Row]]:
    reader = _reader(text, delimiter, strict=True, skip=log)
    header: list[str] = []
    rows: list[Row] = []
    try:
        for fields in reader:
            if not any(fields) if log else not fields:  # an empty line
                continue
            place = f"cannot read {path}: line {reader.line_num} (row {len(rows) + 1})"
            if not header:
                header = fields
                if twice := [name for name in header if header.count(name) > 1 and (name or not log)]:
                    raise GRITError(f"cannot read {path}: two columns are named {twice[0]!r}")
                # The csv module reads a quote that was left over as a letter, of a name that is no column's.
                if stray := [n for n in header if '"' in n and '"{}"'.format(n.replace('"', '""')) not in text]:
                    raise GRITError(f"cannot read {path}: a quote is left over in the header, in {brief(stray[0])}")
                continue
            if len(fields) != len(header):
                raise GRITError(
                    f"{place} has {len(fields)} fields where the header has {len(header)} "
                    f'({_short(delimiter.join(header))}): put fields that hold "{delimiter}" in double quotes'
                )
            for name, cell in zip(header, fields, strict=True):
                if cell[:1] == " " and cell.lstrip(" ")[:1] == '"':
                    raise GRITError(f"{place}, column {name!r}: a space stands before the quote; remove it")
            rows.append(Row(zip(header, fields, strict=True), path, len(rows) + 1, reader.line_num))
    except csv.Error as error:
        raise GRITError(f"cannot read {path}: line {reader.line_num} (row {len(rows) + 1}): {error}") from None
    return header, rows


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, data: bytes) -> Table:
    from pyarrow import BufferReader, parquet  # type: ignore[import-untyped]

    # Of this one file: read_table() would take columns from folders named like `year=2024`.
    table = parquet.ParquetFile(BufferReader(data)).read()
    if twice := [name for name in table.column_names if table.column_names.count(name) > 1]:
        raise GRITError(f"cannot read {path}: two columns are named {twice[0]!r}")
    rows = [Row(row, path, number) for number, row in enumerate(table.to_pylist(), 1)]
    return Table(str(path), rows, table.column_names)


READERS: dict[str, Callable[[Path, bytes], Table]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": _read_parquet,
}
