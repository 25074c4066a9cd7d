"""The tensors of a GGUF file as numbers, one at a time. `gguf.quants` knows the number types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.gguf.metadata import TensorEntry, read_header

if TYPE_CHECKING:
    import torch


class Weights:
    """The tensors of a GGUF file; only what is being read takes memory.

    `gguf.GGUFReader` does the same, but builds an array object for each string of the vocabulary, which took 10 s for
    49,152 tokens on a busy machine.

    Args:
        path: The file.
        arrays: Decode the metadata's arrays (the vocabulary), too.

    Attributes:
        metadata: The file's keys.
        entries: Its tensors by name.

    Raises:
        GRITError: not a GGUF file, a damaged one, or one that ends before its tensors do.
    """

    def __init__(self, path: Path | str, *, arrays: bool = False) -> None:
        self.path = Path(path)
        self.metadata, self.entries = read_header(self.path, arrays=arrays)
        size = self.path.stat().st_size
        for name, entry in self.entries.items():
            if entry.start + self._bytes(name, entry)[1] > size:
                raise GRITError(f"{self.path} is truncated: {name} lies beyond its end; copy or download it again")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def type(self, name: str) -> str:
        """The number type of a tensor, as ggml names it: "F16", "Q4_1", ..."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.entries[name].kind).name

    def raw(self, name: str) -> Any:
        """The bytes of a tensor (rows, bytes per row) as numpy's uint8."""
        import numpy as np

        entry = self.entries[name]
        shape, count = self._bytes(name, entry)
        with open(self.path, "rb") as handle:
            handle.seek(entry.start)
            data = np.frombuffer(handle.read(count), dtype=np.uint8)
        if data.size != count:
            raise GRITError(f"{self.path} became shorter while it was read")
        return data.reshape(shape)

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor in float32, in its shape.

        Raises:
            GRITError: a number type that `gguf.quants` cannot read.
        """
        import torch
        from gguf import GGMLQuantizationType, quants

        entry = self.entries[name]
        kind = GGMLQuantizationType(entry.kind)
        data = self.raw(name)
        if kind.name == "F32":
            return torch.from_numpy(data.copy()).view(torch.float32).reshape(entry.shape)
        if kind.name == "F16":
            return torch.from_numpy(data.copy()).view(torch.float16).reshape(entry.shape).float()
        try:
            values = quants.dequantize(data, kind)
        except (NotImplementedError, ValueError) as error:
            raise GRITError(f"{self.path}: {name} is stored as {kind.name}, which cannot be read ({error})") from error
        return torch.from_numpy(values.copy()).reshape(entry.shape)

    def _bytes(self, name: str, entry: TensorEntry) -> tuple[tuple[int, ...], int]:
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

        try:
            shape = quant_shape_to_byte_shape(entry.shape, GGMLQuantizationType(entry.kind))
        except (ValueError, IndexError) as error:
            raise GRITError(f"{self.path}: {name} is not a readable tensor ({error})") from error
        return shape, math.prod(shape)
