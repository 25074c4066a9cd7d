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
from grit_impl.tables import one_line, refuse_pointers

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The names that transformers looks for, in this order.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Enough of every tensor that two different models cannot share it, little enough that 16 GB take a second.
SAMPLE_BYTES = 65536
# safetensors' names of the number types that torch has under the same layout.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
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
    except (OSError, ValueError, RecursionError) as error:
        raise GRITError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise GRITError(f"{path} does not hold a JSON object")
    return value


def safetensors_entries(path: Path) -> dict[str, StoredTensor]:
    """The table at the head of a safetensors file.

    Raises:
        GRITError: the file is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pointers(path)
    try:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            table = json.loads(handle.read(length))
        size = path.stat().st_size
        entries = {
            name: StoredTensor(
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
    try:
        with safe_open(path, framework="np"):
            pass
    except (
        OSError,
        SafetensorError,
    ) as error:  # bytes of no tensor, of two, or more than a shape has
        raise GRITError(f"{path} is not a readable safetensors file ({one_line(error)})") from error
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
        self._tied: bool | None = None
        if not self.folder.is_dir():
            raise GRITError(f"base model {self.folder} is not a folder: give a folder saved by save_pretrained")
        refuse_pointers(*self.folder.iterdir())
        self.config = read_json(self.folder / "config.json")
        self.architecture = architecture(self.config, self.folder)
        if (self.folder / "adapter_config.json").exists():
            raise GRITError(
                f"{self.folder} holds an adapter_config.json beside the model, so transformers would load that adapter "
                "into the base; move it away"
            )
        self.entries: dict[str, StoredTensor] = {}
        for file in self._files():
            self.entries.update(safetensors_entries(file))
        self._check_index()

    def _files(self) -> list[Path]:
        """The files that transformers loads: one of its fixed names, or those that the index of shards names."""
        from transformers.utils.hub import get_checkpoint_shard_files

        whole, index = self.folder / SINGLE, self.folder / INDEX
        if whole.is_file():
            files = [whole]
        elif index.is_file():
            read_json(index)
            try:
                found, _ = get_checkpoint_shard_files(str(self.folder), str(index))  # type: ignore[no-untyped-call]
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise GRITError(f"{index} is no index of shards ({error})") from error
            files = [Path(file) for file in found]
        else:
            raise GRITError(f"{self.folder} holds no {SINGLE} and no {INDEX}: save it with save_pretrained first")
        for file in files:
            if not file.is_file():
                raise GRITError(f"{self.folder} lacks a shard: {file.name} is named in {INDEX} and missing")
        used = {file.name for file in files}
        if stray := sorted({file.name for file in self.folder.glob("model*.safetensors")} - used):
            raise GRITError(
                f"{self.folder} holds {stray[0]}, which transformers does not load ({', '.join(sorted(used)[:2])} "
                "is what it takes): it is left from another save; remove it, or the files that are stale"
            )
        return files

    def _check_index(self) -> None:
        """An index and the shards that it names hold the same tensors."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not index.exists():
            return
        named = read_json(index)["weight_map"]
        for name in sorted(set(named) | set(self.entries)):
            if name not in self.entries:
                raise GRITError(f"{self.folder} lacks tensor {name}, which {INDEX} promises in {named[name]}")
            if named.get(name) != self.entries[name].file.name:
                where = self.entries[name].file.name
                raise GRITError(f"{self.folder}: {name} is in {where}, {INDEX} says {named.get(name, 'nothing')}")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding.

        The configuration says so; but where both matrices are stored and differ, transformers 5 keeps them apart, and
        so does this. transformers 4 would drop the stored head.

        Raises:
            GRITError: both are stored and differ, and transformers is older than 5.
        """
        if self._tied is None:
            self._tied = bool(self.config.get("tie_word_embeddings", False)) and not self._stored_apart()
        return self._tied

    def _stored_apart(self) -> bool:
        if not {EMBEDDING, HEAD} <= set(self.entries):
            return False
        with self.reader() as reader:
            pairs = zip(reader.pieces(EMBEDDING, 1 << 20), reader.pieces(HEAD, 1 << 20), strict=False)
            same = self.shape(EMBEDDING) == self.shape(HEAD) and all(bool((one == two).all()) for one, two in pairs)
        if not same and (version := _ties_one_way()):
            raise GRITError(
                f"{self.folder} has tie_word_embeddings and yet stores another {HEAD}, which transformers "
                f"{version} would drop: remove the tensor, or set tie_word_embeddings to false"
            )
        return not same

    @property
    def four_bit(self) -> bool:
        """Whether the weights are stored as bitsandbytes NF4 or FP4."""
        settings = self.config.get("quantization_config") or {}
        return bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))

    def skeleton(self, rows: int | None = None) -> Any:
        """The model as transformers builds it, without memory: every parameter is one zero seen in all its places.

        Args:
            rows: Rows of the embedding and the head, if not those of the configuration.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self.folder)
            if rows is not None:
                config.vocab_size = rows
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        except Exception as error:  # a configuration's own checks raise several families of errors
            raise GRITError(f"{self.folder / 'config.json'} describes no model: {one_line(error)}") from error
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    place = torch.zeros(()).expand(parameter.shape)
                    module._parameters[name] = torch.nn.Parameter(place, requires_grad=False)
        return model

    def check(self) -> None:
        """Raise `GRITError` unless the files hold exactly the parameters of the model that transformers builds."""
        expected = {name: tuple(p.shape) for name, p in self.skeleton().named_parameters()}
        for name in self.names():
            if name not in expected:
                raise GRITError(f"cannot export {self.folder}: transformers has no place for its tensor {name}")
            if self.shape(name) != expected[name]:
                raise GRITError(f"{self.folder}: {name} is {self.shape(name)}, config.json makes it {expected[name]}")
        for name in expected:
            if self.source(name) is None:
                raise GRITError(f"{self.folder} lacks tensor {name}, which transformers would make up at random")
        if EMBEDDING in expected and self.source(EMBEDDING) == HEAD and (version := _ties_one_way()):
            raise GRITError(
                f"{self.folder} stores its tied matrix as {HEAD} alone, from which transformers {version} does not "
                f"fill the embedding: rename the tensor {EMBEDDING}, or pip install 'transformers>=5'"
            )

    def source(self, name: str) -> str | None:
        """The stored tensor that a parameter is read from; a tied matrix may be stored under the other's name."""
        if name in self.entries:
            return name
        other = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name)
        return other if other in self.entries and self.config.get("tie_word_embeddings", False) else None

    def names(self) -> list[str]:
        """The model's parameters, in a stable order; the quantisation's side tensors and a tied head are left out."""
        kept = {name for name in self.entries if ".weight." not in name and not name.endswith("rotary_emb.inv_freq")}
        if self.tied:
            kept = (kept - {HEAD}) | {EMBEDDING}
        return sorted(kept, key=_natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape in the model: for a 4-bit tensor that of the matrix it stands for."""
        name = self.source(name) or name
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
        name = self.checkpoint.source(name) or name
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
        name = self.checkpoint.source(name) or name
        if self.checkpoint.is_quantized(name):
            from grit_impl.export.four_bit import dequantize

            side = {key: self.raw(key) for key in self.checkpoint.entries if key.startswith(f"{name}.")}
            return dequantize(name, self.raw(name), side)
        return self._checked(name, self.raw(name))

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            raise GRITError(f"cannot export {name}: stored as {tensor.dtype}; only floating point and NF4 are read")
        return tensor


def _ties_one_way() -> str | None:
    """The version of transformers, if it is one that fills a tied head from the embedding and never the other way."""
    import transformers

    version: str = transformers.__version__
    return version if int(version.split(".")[0]) < 5 else None


def _natural(name: str) -> tuple[int | str, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
