"""The ledger's file: JSON objects, one per line, gzipped. `pandas.read_json(path, lines=True)` reads it.

Rows of kind `run` (one, first), `step` (one per optimizer step), `tensor` (one per step and tensor, see `TENSOR`),
`factors` (the preconditioner's own report, at a few steps), `problem` (what went wrong in the ledger, which then
stopped looking), `end` (one, last: the number of the run's last step, and the hashes of its weights). A key that does
not apply is left out.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from grit_impl.errors import GRITError
from grit_impl.ledger.timeline import short

# One encoder for all rows: json.dumps would make one for each. Level 4 takes 60% of the time of 6 for 10% more bytes.
_encode = json.JSONEncoder(separators=(",", ":")).encode
LEVEL = 4
# 2: steps are numbered like the run's, also after it was resumed.
SCHEMA = 2
# What gzip and json raise where bytes are no gzip, no UTF-8 or no JSON.
_DAMAGE = (OSError, EOFError, ValueError, RecursionError, zlib.error)

NUMBER, FLAG, TEXT = "number", "flag", "text"
TENSOR: dict[str, tuple[str, str]] = {
    "step": (NUMBER, "of the run, from 1"),
    "name": (TEXT, "of the tensor in the model"),
    "why": (TEXT, "why it takes no part in the forward pass, as its layer says"),
    "absent": (FLAG, "backward left no gradient"),
    "raw": (NUMBER, "norm of the gradient that backward left"),
    "hash_raw": (TEXT, "of that gradient's bits"),
    "unheld": (FLAG, "no optimizer that stepped holds it"),
    "entry": (NUMBER, "norm of the gradient that the optimizer found"),
    "hash_entry": (TEXT, "of that gradient's bits, where they differ from the raw one's"),
    "turn": (NUMBER, "1 - cos between the two"),
    "turns": (NUMBER, "how often something turned it in between"),
    "mods": (NUMBER, "how often something changed it in between, but for clipping, unscaling and clearing"),
    "by": (TEXT, "who"),
    "written": (NUMBER, "norm of the gradient when it was turned farthest, if that is not what the optimizer found"),
    "turn_written": (NUMBER, "1 - cos between that and the raw one"),
    "undone_by": (TEXT, "who came after"),
    "nonfinite": (FLAG, "it was finite after backward and then was not"),
    "lost": (FLAG, "zeroed or removed before the optimizer ran"),
    "micro": (TEXT, "who changed it between two backward passes of the step"),
    "late": (TEXT, "who changed it after the optimizer had run"),
    "update": (NUMBER, "norm of the parameter's change"),
    "hash_before": (TEXT, "of the parameter's bits at the optimizer's entry"),
    "hash_after": (TEXT, "of the parameter's bits after it"),
    "drift": (NUMBER, "change of the parameter since the step before, over the larger of its norms then and now"),
    "rate_zero": (FLAG, "its group's learning rate is 0"),
    "stepped": (NUMBER, "optimizer steps on this gradient, where there were several"),
    "update_exact": (NUMBER, "sample: norm of the change"),
    "update_raw": (NUMBER, "sample: norm of the change that the raw gradient would have made"),
    "update_turn": (NUMBER, "sample: 1 - cos between the two"),
    "replay": (NUMBER, "sample: relative distance of the change from the optimizer's, replayed"),
    "replay_turn": (NUMBER, "sample: 1 - cos between those two"),
    "reaction": (NUMBER, "sample, first steps: what the negated gradient changes of the replay, relative"),
    "noise": (NUMBER, "sample, first steps: what repeating it changes of the replay, relative"),
    "arrived": (NUMBER, "sample, 16-bit parameters: share of the intended change that rounding left"),
    "along": (NUMBER, "sample: cosine of the change, momentum apart, and the gradient found, negated"),
    "along_raw": (NUMBER, "sample: the same with the raw gradient"),
    "factor_turn": (
        NUMBER,
        "early steps: 1 - cos of both updates' orthogonal factors, where an optimizer makes them so",
    ),
    "kept": (NUMBER, "where somebody wrote to it since: the share of the way of the steps before that is still there"),
    "back": (NUMBER, "the same: cosine of that way and of what was taken back"),
    "fit": (NUMBER, "structure: relative residual of the best r x r matrix that makes the written gradient"),
    "condition": (NUMBER, "structure: that matrix's condition number"),
    "identity": (NUMBER, "structure: its relative distance from a multiple of the identity"),
    "positive": (NUMBER, "structure: smallest over largest eigenvalue of its symmetric part, its sign apart"),
    "matrix": (TEXT, "structure: what the matrix is, by the ledger's own statistics"),
    "twice": (NUMBER, "structure: how badly it explains the second change too, 0: exactly"),
    "alike": (NUMBER, "structure: cosine of that matrix and the second change's, multiples of the identity apart"),
    "own": (NUMBER, "structure: residual of what the optimizer found, where it was written to more than once"),
    "stale": (NUMBER, "structure: residual where one of the last two steps' gradients stands for the raw one"),
    "mix": (NUMBER, "structure: residual of the best mix of this and earlier raw gradients, by one number each"),
    "passes": (NUMBER, "structure, gradients cleared between passes: residual of the best mix of the step's passes"),
    "passed": (NUMBER, "the same of what it was turned to before, the largest"),
}
"""The keys of a row of kind `tensor`: their type, and what they say."""


class RowWriter:
    """Keeps rows in memory, or streams them to a temporary file that replaces `path` when it is closed.

    What was flushed is also called `path`.partial and outlives the process: a run that is killed and resumed keeps what
    its ledger saw. Several processes with one path do not disturb each other; the last one to close wins.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._temporary: Path | None = None

    def open(self, resume_from: int = 0) -> bool:
        """Start; a second call starts over.

        Args:
            resume_from: Rows of an interrupted run up to this step are kept; 0: none.

        Returns:
            Whether there were any (a header among them).
        """
        self._rows, kept = [], []
        if self.path is None:
            return False
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_from:
                kept = [row for row in salvage(self.path) if row["kind"] != "end" and row.get("step", 0) <= resume_from]
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.{os.getpid()}.")
            os.close(handle)
            self._temporary = Path(name)
            self._file = gzip.open(name, "wt", compresslevel=LEVEL)  # noqa: SIM115 (open for the length of the run)
        self.write(kept)
        if kept:
            self.flush()
        return bool(kept)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        if self._file is None:
            self._rows += rows
            return
        with self._errors():
            self._file.write("".join([_encode(row) + "\n" for row in rows]))

    def flush(self) -> None:
        """What was written so far can be salvaged, whatever happens to this process."""
        if self._file is None or self.path is None or self._temporary is None:
            return
        with self._errors():
            self._file.flush()
            if not _same(self._temporary, partial(self.path)):
                # Only now does an earlier process's file go: until here it was the only copy.
                _forget(self.path)
                link = self._temporary.with_name(f"{self._temporary.name}.link")
                os.link(self._temporary, link)
                link.replace(partial(self.path))

    def close(self) -> None:
        """Put the file in place."""
        if self._file is None or self.path is None or self._temporary is None:
            return
        try:
            with self._errors():
                self._file.close()
                self._temporary.chmod(0o644)
                self._temporary.replace(self.path)
                if _same(self.path, partial(self.path)):
                    partial(self.path).unlink()
        except GRITError:
            self.discard()
            raise
        self._file = self._temporary = None

    def discard(self) -> None:
        """Leave nothing behind but what was flushed for a run that may be resumed."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk says so once more
                self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        self._file = self._temporary = None

    def rows(self) -> list[dict[str, Any]]:
        """What was written."""
        return self._rows if self.path is None else read_rows(self.path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GRITError(f"cannot write {self.path}: {error.strerror or error}") from error


def partial(path: Path) -> Path:
    """Where the rows of a ledger are that was flushed and not closed."""
    return path.with_name(f"{path.name}.partial")


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _forget(path: Path) -> None:
    """Remove the temporary file of a process that is gone and left a partial one: the same file by another name."""
    for left in path.parent.glob(f".{path.name}.*"):
        if _same(left, partial(path)) and not _alive(int(left.name.removeprefix(f".{path.name}.").split(".")[0])):
            left.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def salvage(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that an interrupted process left, as far as they are whole; none where it left nothing.

    A process that ends after its ledger was closed, and before its run was complete, leaves the whole ledger.
    """
    left = partial(path) if partial(path).exists() else path
    try:
        with gzip.open(left, "rt") as handle:
            for line in handle:
                if not line.endswith("\n"):
                    return
                yield json.loads(line)
    except _DAMAGE:
        return


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
    except (*_DAMAGE, KeyError, TypeError) as error:
        raise GRITError(f"corrupt gradient ledger: {path}, line {len(rows) + 1}: {error}") from error
    if not rows or rows[0]["kind"] != "run":
        raise GRITError(f"corrupt gradient ledger: {path} does not begin with a row of kind 'run'")
    return rows


def run_row(names: Sequence[str], parameters: Sequence[Any], sample: Container[int], every: int) -> dict[str, Any]:
    """The row of kind `run`: which tensors there are, and what is looked at.

    Args:
        names: Of the parameters.
        parameters: In the same order.
        sample: Indices of those that are followed in full.
        every: Steps between two that are seen.
    """
    aliases = Counter(map(id, parameters))
    tensors = [
        {"name": n, "shape": list(p.shape), "trainable": p.requires_grad, "sampled": i in sample}
        | ({"names": aliases[id(p)]} if aliases[id(p)] > 1 else {})
        for i, (n, p) in enumerate(zip(names, parameters, strict=True))
    ]
    return {"kind": "run", "schema": SCHEMA, "every": every, "tensors": tensors}


def factor_row(model: Any, manager: Any | None, step: int) -> dict[str, Any] | None:
    """The row of kind `factors`: what the preconditioner says of itself.

    Args:
        model: Where GRIT leaves its manager, on the model or on what that wraps.
        manager: If not None, that one instead.
        step: The last optimizer step.

    Returns:
        The row, or None where there is no preconditioner.
    """
    if manager is None:
        owners = (model, getattr(model, "base_model", None), getattr(model, "model", None))
        manager = next((m for o in owners if (m := getattr(o, "_grit_manager", None)) is not None), None)
    if manager is None:
        return None
    report = manager.factor_report()
    keys = ["name", "status", "samples", "trace_a", "trace_g", "condition_a", "condition_g"]
    keys += ["identity_distance_a", "identity_distance_g"]
    layers = [
        {k: short(v) if isinstance(v, float) else v for k in keys if (v := row.get(k)) is not None}
        for row in report.get("layers", [])
    ]
    return {"kind": "factors", "step": step, "statuses": report.get("statuses", {}), "layers": layers}
