"""Run records: what one training run leaves behind, as files that any program can read.

A record is a folder: `run.json` (configuration, seeds, versions, machine), `steps.jsonl` (a line per optimizer
step), `ledger.jsonl.gz` (what happened to the gradients), `adapter/`, `gguf/`, and `COMPLETE`, written last. A
folder without `COMPLETE` is an unfinished run, which is resumed or discarded, never judged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError

SCHEMA = 1


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that a reader sees the old content or the new, never a part.

    The data goes to a temporary file in the same folder, is flushed to the disk, and replaces `path`.

    Raises:
        GRITError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    target = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as handle:
            temporary = Path(handle.name)
            handle.write(payload)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise GRITError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys: equal configurations have equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class RunRecord:
    """One run's folder.

    Args:
        path: The folder. It is read lazily; a missing `run.json` or a line that is not JSON raises `GRITError`
            with the file (and the line) when it is first needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._run: dict[str, Any] | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], **fields: Any) -> RunRecord:
        """Start a record: make the folder and write `run.json` with `fields`."""
        record = cls(path)
        record._run = {"schema": SCHEMA, **fields}
        write_atomic(record.path / "run.json", json.dumps(record._run, indent=2, default=str))
        return record

    @property
    def run(self) -> dict[str, Any]:
        """The content of `run.json`."""
        if self._run is None:
            source = self.path / "run.json"
            try:
                value = json.loads(source.read_text())
            except FileNotFoundError:
                raise GRITError(f"{self.path} is not a run record: it has no run.json") from None
            except (OSError, ValueError, RecursionError) as error:
                raise GRITError(f"corrupt run record: {source} cannot be read ({error})") from error
            if not isinstance(value, dict) or "arm" not in value:
                raise GRITError(f"corrupt run record: {source} does not describe a run (no 'arm')")
            if value.get("schema", SCHEMA) > SCHEMA:
                raise GRITError(f"{source} has schema {value['schema']}; this version reads up to {SCHEMA}: upgrade")
            self._run = value
        return self._run

    @property
    def arm(self) -> str:
        """The arm's name."""
        return str(self.run["arm"])

    @property
    def diverged(self) -> str | None:
        """Why nothing can be concluded from this run: the first step whose loss is no finite number; else None."""
        if why := self.run.get("diverged"):
            return str(why)
        steps = self.steps if (self.path / "steps.jsonl").exists() else []
        bad = next((row for row in steps if not math.isfinite(row.get("loss") or 0.0)), None)
        return None if bad is None else f"it diverged: the loss is {bad['loss']} at step {bad['step']}"

    @property
    def steps(self) -> list[dict[str, Any]]:
        """One dictionary per optimizer step, in order: step, loss, grad_norm, learning_rate, tokens, seconds, ..."""
        return self._lines("steps.jsonl")

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak of the whole run, also of its parts before an interruption; None where it has not ended."""
        last = self.run.get("peak_memory_bytes")
        return None if last is None else max([last, *(step.get("memory_bytes") or 0 for step in self.steps)])

    @property
    def ledger(self) -> Path:
        """Path of the gradient ledger (it may not exist)."""
        return self.path / "ledger.jsonl.gz"

    @property
    def adapter(self) -> Path:
        """Folder of the trained PEFT adapter."""
        return self.path / "adapter"

    @property
    def gguf(self) -> Path:
        """Folder of the exported GGUF files."""
        return self.path / "gguf"

    @property
    def complete(self) -> bool:
        """Whether the run finished: `COMPLETE` is written after everything else."""
        return (self.path / "COMPLETE").is_file()

    def append_step(self, row: dict[str, Any]) -> None:
        """Append one optimizer step; non-finite numbers are kept as the strings 'nan', 'inf', '-inf'."""
        with open(self.path / "steps.jsonl", "a") as handle:
            handle.write(_step_line(row))

    def truncate_steps(self, last: int) -> None:
        """Forget the steps after `last`: a resumed run writes them again."""
        kept = [row for row in self.steps if row["step"] <= last] if (self.path / "steps.jsonl").exists() else []
        write_atomic(self.path / "steps.jsonl", "".join(map(_step_line, kept)))

    def update(self, **fields: Any) -> None:
        """Change fields of `run.json`, atomically."""
        self._run = {**self.run, **fields}
        write_atomic(self.path / "run.json", json.dumps(self._run, indent=2, default=str))

    def finish(self) -> None:
        """Mark the record complete. Nothing is written after this."""
        write_atomic(self.path / "COMPLETE", str(self.run.get("fingerprint", "")) + "\n")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        source = self.path / name
        try:
            text = source.read_text()
        except FileNotFoundError:
            raise GRITError(f"corrupt run record: {source} is missing") from None
        except (OSError, UnicodeDecodeError) as error:
            raise GRITError(f"corrupt run record: {source} cannot be read ({error})") from error
        lines = text.removesuffix("\n").split("\n")
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()})
            except (ValueError, RecursionError, AttributeError):
                # A killed process can leave half a last line; anywhere else it is damage.
                if number == len(lines) and not self.complete:
                    break
                raise GRITError(f"corrupt run record: {source}, line {number} is not a JSON object") from None
        return rows


def _step_line(row: dict[str, Any]) -> str:
    clean = {key: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return json.dumps(clean) + "\n"
