"""A base model's folder as the exporter reads it: configuration, tensors one at a time, and a fingerprint.

Safetensors files are parsed directly (eight bytes of length, a JSON table, the tensors), so a checkpoint can be
described and fingerprinted without importing torch. Tensors are read, not mapped: a map's pages count as the process's
memory, and on a virtual machine bringing them in took four to thirty times as long as reading them.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.gguf.architecture import architecture

if TYPE_CHECKING:
    import torch

# Enough of every tensor that two different models cannot share it, little enough that 16 GB take a second.
SAMPLE_BYTES = 65536
# safetensors' names of the number types that torch has under the same layout.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: the file, its dtype as safetensors names it, its shape, and its byte range."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        GRITError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GRITError(f"{path} is missing: is {path.parent} a complete model folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GRITError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise GRITError(f"{path} does not hold a JSON object")
    return value


def safetensors_entries(path: Path) -> dict[str, TensorEntry]:
    """The table at the head of a safetensors file.

    Raises:
        GRITError: the file is missing, truncated or not a safetensors file.
    """
    try:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            table = json.loads(handle.read(length))
        size = path.stat().st_size
        entries = {
            name: TensorEntry(
                path,
                str(e["dtype"]),
                tuple(e["shape"]),
                8 + length + e["data_offsets"][0],
                8 + length + e["data_offsets"][1],
            )
            for name, e in table.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise GRITError(f"{path} is missing") from None
    except (OSError, struct.error, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise GRITError(f"{path} is not a readable safetensors file ({error})") from error
    if any(entry.end > size for entry in entries.values()):
        raise GRITError(f"{path} is truncated: its table names bytes beyond its end; copy or download it again")
    return entries


class Checkpoint:
    """A Hugging Face folder of a Llama or Qwen2: `config.json`, tokenizer files, one or several safetensors files.

    Args:
        folder: The folder.

    Raises:
        GRITError: the folder is missing, or is of another architecture, or holds no safetensors weights.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise GRITError(f"base model {self.folder} is not a folder: give a folder saved by save_pretrained")
        self.config = read_json(self.folder / "config.json")
        self.architecture = architecture(self.config, self.folder)
        files = sorted(self.folder.glob("model*.safetensors"))
        if not files:
            raise GRITError(f"{self.folder} holds no model*.safetensors: save it with save_pretrained first")
        self.entries: dict[str, TensorEntry] = {}
        for file in files:
            self.entries.update(safetensors_entries(file))
        index = self.folder / "model.safetensors.index.json"
        if index.exists() and (missing := set(read_json(index).get("weight_map", {})) - set(self.entries)):
            raise GRITError(f"{self.folder} lacks a shard: tensor {sorted(missing)[0]} is in none of its files")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: then there is no tensor `lm_head.weight` of its own."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def four_bit(self) -> bool:
        """Whether the weights are stored as bitsandbytes NF4 or FP4."""
        settings = self.config.get("quantization_config") or {}
        return bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))

    def names(self) -> list[str]:
        """The model's parameters, in a stable order; the quantisation's side tensors and a tied head are left out."""
        kept = [name for name in self.entries if ".weight." not in name and not name.endswith("rotary_emb.inv_freq")]
        if self.tied:
            kept = [name for name in kept if name != "lm_head.weight"]
        return sorted(kept, key=_natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape in the model: for a 4-bit tensor that of the matrix it stands for."""
        if self.is_quantized(name):
            return tuple(int(n) for n in self._quant_state(name)["shape"])
        return self.entries[name].shape

    def is_quantized(self, name: str) -> bool:
        """Whether this parameter is stored in 4 bits."""
        return any(key.startswith(f"{name}.quant_state.") for key in self.entries)

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """Open the files; only what is being read takes memory."""
        with ExitStack() as stack:
            yield TensorReader(self, stack)

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and first 64 KiB, in hexadecimal.

        Two models of equal shape but other weights differ; a copy, or another cut into shards, does not. The
        adapter's GGUF carries it, because llama.cpp attaches an adapter to any base of the same shape silently.
        """
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}|{entry.dtype}|{entry.shape}|".encode())
            with open(entry.file, "rb") as handle:
                handle.seek(entry.start)
                digest.update(handle.read(min(SAMPLE_BYTES, entry.end - entry.start)))
        return digest.hexdigest()

    def _quant_state(self, name: str) -> dict[str, Any]:
        key = next(key for key in self.entries if key.startswith(f"{name}.quant_state."))
        entry = self.entries[key]
        with open(entry.file, "rb") as handle:
            handle.seek(entry.start)
            state: dict[str, Any] = json.loads(handle.read(entry.end - entry.start))
        return state


class TensorReader:
    """Reads tensors of an open `Checkpoint` into memory, whole or a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self.checkpoint = checkpoint
        files = {entry.file for entry in checkpoint.entries.values()}
        self._open = {file: stack.enter_context(file.open("rb", buffering=0)) for file in files}

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        return self._read(name, 0, self.checkpoint.entries[name].shape)

    def pieces(self, name: str, numbers: int) -> Iterator[torch.Tensor]:
        """A parameter as `floating` gives it, from its first row to its last, about so many numbers at a time."""
        shape = self.checkpoint.entries[name].shape
        if self.checkpoint.is_quantized(name) or len(shape) < 2:
            yield self.floating(name)
            return
        row = math.prod(shape[1:])
        step = max(1, numbers // row)
        for start in range(0, shape[0], step):
            piece = self._read(name, start * row, (min(step, shape[0] - start), *shape[1:]))
            yield self._checked(name, piece)

    def _read(self, name: str, skip: int, shape: tuple[int, ...]) -> torch.Tensor:
        """So many numbers of a stored tensor, after the first `skip`."""
        import torch

        entry = self.checkpoint.entries[name]
        dtype = getattr(torch, DTYPES.get(entry.dtype, "-"), None)
        if dtype is None:
            raise GRITError(f"cannot export {name}: stored as {entry.dtype}; only floating point and NF4 are read")
        tensor = torch.empty(shape, dtype=dtype)
        if entry.end - entry.start != math.prod(entry.shape) * dtype.itemsize:
            raise GRITError(f"{entry.file} is not a readable safetensors file (the size of {name} is not its shape's)")
        handle, left = self._open[entry.file], tensor.flatten().view(torch.uint8).numpy().data
        handle.seek(entry.start + skip * dtype.itemsize)
        # One call reads 2 GiB at most.
        while left:
            if not (count := handle.readinto(left)):
                raise GRITError(f"{entry.file} became shorter while it was read")
            left = left[count:]
        return tensor

    def __call__(self, name: str) -> torch.Tensor:
        """A parameter in float32; 4-bit weights are dequantised."""
        return self.floating(name).float()

    def floating(self, name: str) -> torch.Tensor:
        """A parameter as it is stored; 4-bit weights are dequantised to float32."""
        if self.checkpoint.is_quantized(name):
            from grit_impl.export.four_bit import dequantize

            side = {key: self.raw(key) for key in self.checkpoint.entries if key.startswith(f"{name}.")}
            return dequantize(name, self.raw(name), side)
        return self._checked(name, self.raw(name))

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            raise GRITError(f"cannot export {name}: stored as {tensor.dtype}; only floating point and NF4 are read")
        return tensor


def _natural(name: str) -> tuple[int | str, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
