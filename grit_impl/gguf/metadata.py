"""The key-value part of a GGUF file, without its tensors. Format: ggml's `docs/gguf.md`, version 3.

`gguf.GGUFReader` maps the whole file and builds an array object for each string of the vocabulary, which takes seconds
for Llama 3's 128,000 tokens; here only what is asked for is decoded.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from grit_impl.errors import GRITError
from grit_impl.tables import refuse_pointers

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# A header that claims more than this is damaged: Llama 3 has 280,000 merges.
_MOST = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ggml's number of its type, its shape (rows, columns), and its first byte."""

    kind: int
    shape: tuple[int, ...]
    start: int


def read_metadata(path: Path, *, arrays: bool = False) -> dict[str, Any]:
    """The metadata of a GGUF file, with `n_parameters` (the number of weights) and `n_tensors` added.

    Args:
        path: The file.
        arrays: Decode arrays; otherwise an array of more than five entries becomes `[]`, as Ollama shows it.

    Raises:
        GRITError: not a GGUF file, or a damaged one.
    """
    metadata, entries = read_header(path, arrays=arrays)
    count = sum(math.prod(entry.shape) for entry in entries.values())
    return {**metadata, "n_parameters": count, "n_tensors": len(entries)}


def read_header(path: Path, *, arrays: bool = False) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """The metadata of a GGUF file, and the table of its tensors. Arguments and errors as `read_metadata`."""
    refuse_pointers(path)
    try:
        with open(path, "rb") as handle:
            if handle.read(4) != b"GGUF":
                raise GRITError(f"{path} is not a GGUF file")
            version, tensors, pairs = struct.unpack("<IQQ", handle.read(20))
            if version not in (2, 3) or tensors > _MOST or pairs > _MOST:
                raise GRITError(f"{path}: GGUF version {version} cannot be read, or the file is damaged")
            metadata = {_string(handle): _value(handle, arrays) for _ in range(pairs)}
            table = []
            for _ in range(tensors):
                name = _string(handle)
                (n,) = struct.unpack("<I", handle.read(4))
                shape = struct.unpack(f"<{n}Q", handle.read(8 * n))
                kind, offset = struct.unpack("<IQ", handle.read(12))
                table.append((name, kind, shape[::-1], offset))
            alignment = int(metadata.get("general.alignment", 32))
            data = handle.tell() + -handle.tell() % alignment
    except (OSError, struct.error, ValueError, MemoryError, OverflowError, KeyError, ZeroDivisionError) as error:
        raise GRITError(f"{path} is not a readable GGUF file ({error})") from error
    return metadata, {name: TensorEntry(kind, shape, data + offset) for name, kind, shape, offset in table}


def _string(handle: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", handle.read(8))
    if length > _MOST:
        raise OverflowError("a string beyond all measure")
    data = handle.read(length)
    if len(data) != length:
        raise OverflowError("the file ends early")
    return data.decode("utf-8", errors="replace")


def _value(handle: BinaryIO, arrays: bool, kind: int | None = None) -> Any:
    if kind is None:
        (kind,) = struct.unpack("<I", handle.read(4))
    if kind == _STRING:
        return _string(handle)
    if kind != _ARRAY:
        form = _SCALARS[kind]
        return struct.unpack(form, handle.read(struct.calcsize(form)))[0]
    inner, length = struct.unpack("<IQ", handle.read(12))
    if length > _MOST:
        raise OverflowError("an array beyond all measure")
    if inner in _SCALARS and not arrays and length > 5:
        handle.seek(length * struct.calcsize(_SCALARS[inner]), 1)
        return []
    if inner == _STRING and not arrays and length > 5:
        for _ in range(length):
            (size,) = struct.unpack("<Q", handle.read(8))
            handle.seek(size, 1)
        return []
    return [_value(handle, arrays, inner) for _ in range(length)]
