"""TensorBoard event files as a table: a row per scalar, in the order in which they were written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.tables import Row, Table


class DamagedEvents(GRITError):
    """An event file that ends in the middle, or whose checksums fail; `table` has what comes before."""

    def __init__(self, file: Path, table: Table) -> None:
        super().__init__(f"{file}: truncated or corrupt event file")
        self.table = table


def read_events(files: Sequence[Path], path: Path) -> Table:
    """The scalars of one run, in the scalar encoding (torch, tensorboardX) or the tensor encoding (TensorFlow 2).

    Raises:
        DamagedEvents: a record cannot be read.
        GRITError: a file is empty.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]
    from tensorboard.compat.tensorflow_stub import errors  # type: ignore[import-untyped]
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New  # type: ignore[import-untyped]

    table = Table(str(path), [])
    for file in sorted(files, key=lambda f: f.name):
        if file.stat().st_size == 0:
            raise GRITError(f"{file}: the event file is empty; the run wrote nothing, or it was copied while open")
        reader = PyRecordReader_New(str(file))
        while True:
            try:
                reader.GetNext()
                event = event_pb2.Event.FromString(reader.record())
                found = [(value.tag, _number(value, table.meta)) for value in event.summary.value]
            except errors.OutOfRangeError:
                break
            except (errors.DataLossError, DecodeError, ValueError, TypeError, OverflowError, MemoryError) as error:
                raise DamagedEvents(file, table) from error
            for tag, number in found:
                if number is not None:
                    table.clock = event.wall_time if table.clock is None else table.clock
                    table.rows.append(Row({"step": event.step, tag: number}, path, len(table.rows) + 1))
    if not table.rows:
        raise GRITError(f"{path}: no scalars in its event files; name the folder of the run that logged the loss")
    return table


def _number(value: Any, meta: dict[str, Any]) -> float | None:
    """The scalar of a summary, None for anything else; the Trainer's arguments leave their seed in `meta`."""
    from tensorboard.util import tensor_util  # type: ignore[import-untyped]

    encoding = value.WhichOneof("value")
    if encoding == "simple_value":
        return float(value.simple_value)
    if encoding != "tensor":
        return None
    array = tensor_util.make_ndarray(value.tensor)
    if array.dtype.kind in "fiu" and array.size == 1:
        return float(array.reshape(-1)[0])
    if value.tag.startswith("args") and array.size:
        try:
            meta.setdefault("seed", json.loads(bytes(array.reshape(-1)[0])).get("seed"))
        except (ValueError, AttributeError, TypeError):
            return None  # text that is not the Trainer's arguments tells us nothing, and need not
    return None
