"""The ledger's file: JSON objects, one per line, gzipped. `pandas.read_json(path, lines=True)` reads it.

Rows of kind `run` (one, first), `step` (one per optimizer step), `tensor` (one per step and tensor), `factors`
(the preconditioner's own report, at a few steps). A key that does not apply is left out.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TextIO

from grit_impl.errors import GRITError

# One encoder for all rows: json.dumps would make one for each. Level 4 takes 60% of the time of 6 for 10% more bytes.
_encode = json.JSONEncoder(separators=(",", ":")).encode
LEVEL = 4


class RowWriter:
    """Keeps rows in memory, or streams them to a temporary file that replaces `path` when it is closed."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._temporary: Path | None = None

    def open(self) -> None:
        """Start; a second call starts over."""
        self._rows = []
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            os.close(handle)
            self._temporary = Path(name)
            self._file = gzip.open(name, "wt", compresslevel=LEVEL)  # noqa: SIM115 (open for the length of the run)
        except OSError as error:
            raise GRITError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        if self._file is None:
            self._rows += rows
            return
        try:
            self._file.write("".join([_encode(row) + "\n" for row in rows]))
        except OSError as error:
            raise GRITError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Put the file in place."""
        if self._file is None or self._temporary is None or self.path is None:
            return
        try:
            self._file.close()
            self._temporary.chmod(0o644)
            self._temporary.replace(self.path)
        except OSError as error:
            self._temporary.unlink(missing_ok=True)
            raise GRITError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._file = self._temporary = None

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        self._file = self._temporary = None

    def rows(self) -> list[dict[str, Any]]:
        """What was written."""
        return self._rows if self.path is None else read_rows(self.path)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a ledger's file.

    Raises:
        GRITError: it is missing, cannot be read, or is not a ledger; names the file and the line.
    """
    rows: list[dict[str, Any]] = []
    try:
        with gzip.open(path, "rt") as handle:
            for line in handle:
                row = json.loads(line)
                row["kind"]
                rows.append(row)
    except FileNotFoundError:
        raise GRITError(f"no gradient ledger at {path}") from None
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise GRITError(f"corrupt gradient ledger: {path}, line {len(rows) + 1}: {error}") from error
    if not rows or rows[0]["kind"] != "run":
        raise GRITError(f"corrupt gradient ledger: {path} does not begin with a row of kind 'run'")
    return rows
