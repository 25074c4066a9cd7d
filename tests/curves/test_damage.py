"""Damaged logs: what a reader makes of them is what other readers make of them, or one clear line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grit_impl.curves.logs import RunLog, read_log
from grit_impl.errors import GRITError

EXAMPLES = int(os.environ.get("GRIT_FUZZ_EXAMPLES", "100"))
"""Per format; more at night."""
ROWS = 30
LOSS = np.round(1.5 - np.arange(ROWS) / 100 + np.random.default_rng(5).normal(0, 0.1, ROWS), 4)
Curve = list[tuple[float, float]]
"""Step and loss of each entry, in file order."""

INSERTED = [
    *(b'"', b"'", b",", b";", b"\t", b" ", b"|", b"\n", b"\r", b"\r\n", b"\x00", b"\xff"),
    *(b"\\", b"{", b"[", b"}", b"]"),
    *(b"\xe2\x80\xa8", b"\xc2\x85", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"null", b"-", b".", b"e5", b"_0", b"1"),
    b"9" * 400,
]  # fmt: skip
Damage = tuple[str, float, float, bytes]
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "truncate", "insert", "flip", "drop line", "repeat line", "swap lines"]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(INSERTED),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, damages: list[Damage]) -> bytes:
    """Bytes or lines lost, added, changed, repeated or in another order."""
    for kind, where, how_far, text in damages:
        at = int(where * max(len(data) - 1, 0))
        lines = data.split(b"\n")
        line, other = int(where * (len(lines) - 1)), int(how_far * (len(lines) - 1))
        if kind == "cut":
            data = data[:at] + data[at + 1 + int(40 * how_far) :]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + text + data[at:]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << int(7.99 * how_far))]) + data[at + 1 :]
        elif kind == "drop line":
            data = b"\n".join(lines[:line] + lines[line + 1 :])
        elif kind == "repeat line":
            data = b"\n".join(lines[: line + 1] + lines[line:])
        elif kind == "swap lines":
            lines[line], lines[other] = lines[other], lines[line]
            data = b"\n".join(lines)
    return data


def _curve(frame: pd.DataFrame) -> Curve:
    """The columns step and loss, whatever the case of their names; without a step, rows are counted."""
    frame = frame.rename(columns=lambda name: re.sub(r"^\W+|\W+$", "", str(name).lower().rpartition("/")[2]))
    # A second `loss` that pandas has renamed is no column of that name. Of two that only a mark tells apart, each has
    # the values of some rows.
    frame = frame.replace("", np.nan).T.groupby(level=0).first().T
    loss = pd.to_numeric(frame["loss"])
    kept = frame[loss.notna()]
    steps = pd.to_numeric(kept["step"]) if "step" in frame else pd.Series(range(1, len(kept) + 1))
    return list(zip(steps.astype(float), loss[loss.notna()].astype(float), strict=True))


def by_pandas_csv(path: Path) -> Curve:
    """pandas' own parser, with the separator that gives a loss."""
    for separator in ",;\t|":
        frame = pd.read_csv(
            path,
            sep=separator,
            dtype=str,
            skipinitialspace=True,
            encoding="utf-8-sig",
            quotechar='"',
            na_values=["None"],
        )
        if any("loss" in str(name).lower() for name in frame.columns):
            return _curve(frame)
    raise ValueError("no loss")


def by_pandas_jsonl(path: Path) -> Curve:
    """pandas, a line at a time."""
    lines = [line for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    return _curve(pd.DataFrame([json.loads(line) for line in lines]))


def by_pandas_state(path: Path) -> Curve:
    """pandas, from the history."""
    return _curve(pd.DataFrame(json.loads(path.read_bytes().decode("utf-8-sig"))["log_history"]))


def by_pandas_metric(path: Path) -> Curve:
    """pandas, from columns without a header."""
    frame = pd.read_csv(path, sep=r"\s+", header=None, names=["time", "loss", "step"], dtype=str, encoding="utf-8-sig")
    return _curve(frame)


def by_tensorboard(path: Path) -> Curve:
    """TensorBoard's own accumulator, which stops where a file is damaged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(float(e.step), float(e.value)) for e in accumulator.Scalars("train/loss")]


def rows() -> list[dict[str, float]]:
    """A short log."""
    return [
        {"step": i, "loss": float(v), "learning_rate": 2e-4 * (1 - i / 100), "grad_norm": round(0.3 * float(v), 5)}
        for i, v in enumerate(LOSS, 1)
    ]


Reference = Callable[[Path], Curve]
FORMATS: dict[str, tuple[str, Reference]] = {
    "csv": ("log.csv", by_pandas_csv),
    "export": ("export.csv", by_pandas_csv),
    "jsonl": ("log.jsonl", by_pandas_jsonl),
    "trainer_state": ("trainer_state.json", by_pandas_state),
    "mlflow": ("metrics/loss", by_pandas_metric),
    "tensorboard": ("events.out.tfevents.1.host", by_tensorboard),
}
EXPORT = b'"Step","x - train/loss","x - train/loss__MIN","x - train/loss__MAX"\n'


FOUND: list[list[Damage]] = [
    [("insert", 1.0, 0.0, b"\xe2\x80\xa8")],
    [("cut", 0.0, 0.125, b'"'), ("repeat line", 0.0, 0.0, b'"'), ("cut", 0.0, 0.25, b'"')],
]
"""Found among thousands."""


def sound(kind: str, folder: Path, logs: ModuleType) -> bytes:
    """The bytes of an undamaged log."""
    if kind == "csv":
        return bytes(logs.write_csv(folder / "x.csv", rows()).read_bytes())
    if kind == "export":
        return EXPORT + "".join(f'"{i}","{v}","{v - 1}","{v + 1}"\n' for i, v in enumerate(LOSS, 1)).encode()
    if kind == "jsonl":
        return bytes(logs.write_jsonl(folder / "x.jsonl", rows()).read_bytes())
    if kind == "trainer_state":
        return bytes(logs.write_state(folder, rows(), version=4).read_bytes())
    if kind == "mlflow":
        return "".join(f"{1700000000000 + i} {v} {i}\n" for i, v in enumerate(LOSS, 1)).encode()
    return bytes(logs.write_events(folder, rows(), tensors=False).read_bytes())


def fuzz(check: Callable[[list[Damage]], None]) -> None:
    """Run a check on generated damages, the same ones each time."""
    quiet = list(HealthCheck)
    settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=quiet)(
        given(DAMAGES)(check)
    )()


def read(path: Path) -> RunLog | None:
    """A log, or None if the refusal is one line that names the file."""
    try:
        return read_log(path)
    except GRITError as error:
        text = str(error)
    assert "\n" not in text
    assert str(path) in text
    return None


@pytest.mark.parametrize("kind", list(FORMATS))
def test_damaged_logs(tmp_path: Path, logs: ModuleType, kind: str) -> None:
    """Oracle: pandas on the same bytes (TensorBoard's accumulator for event files), or one line that names the file."""
    name, reference = FORMATS[kind]
    data = sound(kind, tmp_path, logs)
    head = EXPORT if kind == "export" else b""
    path = tmp_path / "damaged" / name
    path.parent.mkdir(parents=True)
    understood = 0

    def check(damages: list[Damage]) -> None:
        nonlocal understood
        path.write_bytes(head + damaged(data.removeprefix(head), damages))
        log = read(path)
        if log is None:
            return
        understood += 1
        expected = reference(path)
        found = dict(expected)
        assert len(found) == len(expected), "a step that is there twice"
        # The Trainer's first and last entry may be left out.
        assert len(expected) - 2 <= log.steps.size <= len(expected)
        for step, loss in zip(log.steps, log.loss, strict=True):
            assert math.isclose(found[float(step)], loss, rel_tol=1e-15)

    fuzz(check)
    for damages in FOUND:
        check(damages)
    # Event files carry checksums: hardly any damage gets through.
    assert understood >= (1 if kind == "tensorboard" else EXAMPLES // 10)


def test_damaged_header_of_an_export(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: the rows, which are whole: the loss is never the extremes of the rows, nor a step."""
    data = sound("export", tmp_path, logs)
    path = tmp_path / "export.csv"

    def check(damages: list[Damage]) -> None:
        path.write_bytes(damaged(EXPORT[:-1], damages) + data[len(EXPORT) - 1 :])
        log = read(path)
        if log is not None:
            assert set(log.loss) <= set(LOSS)

    # What is left of two names is one, of the column of steps: found after thousands of others.
    check([("cut", 0.0, 0.25, b'"'), ("repeat line", 0.0, 0.0, b'"'), ("cut", 0.25, 0.75, b'"')])
    fuzz(check)
