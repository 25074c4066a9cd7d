"""Llama to GGUF: a merged model or a LoRA adapter, written tensor by tensor.

Source of the layout: llama.cpp's `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py`, whose tensors ours equal byte
for byte where those scripts accept the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.adapter import NAME, Adapter
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint, TensorReader
from grit_impl.export.vocabulary import Vocabulary, read_vocabulary
from grit_impl.gguf.architecture import gguf_name, permute, rope_factors, rotary_heads, write_architecture
from grit_impl.gguf.encoding import DTYPES, FILE_TYPES, FINGERPRINT_KEY, encode

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

# Numbers that are in float32 at once: 1 MiB, so that quantising, which takes a few times that, stays in the cache.
BLOCK = 1 << 18
# Encoded blocks that may wait to be written.
WAITING = 16

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Export:
    """A finished GGUF file.

    `merge_base` says into which weights the adapter went: "stored" (the base as it is), "dequantised-nf4" (what QLoRA
    trained on) or "sixteen-bit" (the original weights of a QLoRA run). `template` is the training format as a Go
    template, None if it cannot be one; `notes` say what training's tokenizer has other than the base's.
    """

    path: Path
    kind: str
    dtype: str
    sha256: str
    size: int
    tensors: int
    base_fingerprint: str
    adapter_sha256: str | None = None
    merge_base: str = "stored"
    stops: list[str] = field(default_factory=list)
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For a run record."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Item:
    """One tensor to write: its GGUF name, its shape, and its rows, in pieces and in any floating point format."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]


def export_merged(
    base: Path | str,
    adapter: Path | str | None,
    out: Path | str,
    dtype: str = "q8_0",
    progress: Progress | None = None,
    *,
    four_bit: bool | None = None,
    sixteen_bit_base: bool = False,
) -> Export:
    """Write a base model, with an adapter merged into it, as one GGUF file.

    Args:
        base: Folder of a Hugging Face Llama.
        adapter: PEFT folder, or None for the base itself.
        out: The file; it appears when it is complete.
        dtype: "f32", "f16", "bf16" or "q8_0", for matrices; vectors stay f32.
        progress: Called with (tensors done, tensors in all, name).
        four_bit: Whether the adapter was trained on NF4 weights (QLoRA). The merge then starts from the dequantised
            weights, the ones training saw. None: only if the base is stored in 4 bits.
        sixteen_bit_base: Merge a QLoRA adapter into the 16-bit weights all the same; the difference is recorded by
            the export's verification.

    Raises:
        GRITError: the model, the adapter or the tokenizer cannot be exported (named), or the disk is full.
    """
    kinds = _check_dtype(dtype)
    model = Checkpoint(base)
    model.check()
    lora = Adapter(adapter, model) if adapter is not None else None
    rows = lora.rows if lora is not None else model.shape(EMBEDDING)[0]
    if sixteen_bit_base and model.four_bit:
        raise GRITError(f"{base} is stored in 4 bits and holds no 16-bit weights: give the original model's folder")
    simulate = bool(four_bit) and not model.four_bit and not sixteen_bit_base and lora is not None
    merge_base = "dequantised-nf4" if simulate or model.four_bit else "sixteen-bit" if sixteen_bit_base else "stored"
    vocabulary = read_vocabulary(
        model, rows, lora.folder if lora is not None else None, retrained=lora is not None and EMBEDDING in lora.changed
    )
    fingerprint = model.fingerprint()

    from gguf import GGUFWriter

    writer = GGUFWriter(None, model.architecture.name)
    writer.add_type("model")
    writer.add_name(model.folder.name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    write_architecture(writer, model.config, rows)
    vocabulary.write(writer)
    writer.add_string(FINGERPRINT_KEY, fingerprint)
    writer.add_string("grit.merge_base", merge_base)
    if lora is not None:
        writer.add_string("grit.adapter_sha256", lora.sha256)
    with model.reader() as reader:
        items = list(_merged_items(model, lora, reader, simulate))
        sha256 = _stream(writer, items, Path(out), kinds, progress)
    return _finished(out, sha256, "model", dtype, len(items), fingerprint, lora, merge_base, vocabulary)


def export_adapter(
    base: Path | str, adapter: Path | str, out: Path | str, dtype: str = "f16", progress: Progress | None = None
) -> Export:
    """Write a LoRA adapter as GGUF, for `ADAPTER` in a Modelfile or llama.cpp's `--lora`.

    PEFT's true scaling (rsLoRA, alpha_pattern, rank_pattern) is folded into B, since llama.cpp computes alpha / rank.

    Raises:
        GRITError: as `export_merged`; also for what an adapter file cannot hold: DoRA, saved modules, embeddings, and
            a tied head. The message says to merge instead.
    """
    if dtype not in ("f32", "f16"):
        raise GRITError(f"an adapter is written as f32 or f16, not {dtype}: its inner dimension is no multiple of 32")
    kinds = _check_dtype(dtype)
    model = Checkpoint(base)
    lora = Adapter(adapter, model)
    if reason := lora.kept_apart:
        raise GRITError(f"{lora.folder} uses {reason}, which a GGUF adapter cannot hold: export the merged model")
    vocabulary = read_vocabulary(model, lora.rows, lora.folder)
    fingerprint = model.fingerprint()

    from gguf import GGUFWriter

    writer = GGUFWriter(None, model.architecture.name)
    writer.add_type("adapter")
    writer.add_name(lora.folder.name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_string("adapter.type", "lora")
    alpha = float(lora.config["lora_alpha"]) or 1.0
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_string(FINGERPRINT_KEY, fingerprint)
    writer.add_string("grit.adapter_sha256", lora.sha256)
    items = list(_adapter_items(model, lora, alpha))
    sha256 = _stream(writer, items, Path(out), kinds, progress)
    return _finished(out, sha256, "adapter", dtype, len(items), fingerprint, lora, "stored", vocabulary)


def _check_dtype(dtype: str) -> dict[str, GGMLQuantizationType]:
    from gguf import GGMLQuantizationType as Kind

    if dtype not in DTYPES:
        raise GRITError(f"unknown GGUF type {dtype!r}: one of {', '.join(DTYPES)}")
    wanted = Kind[dtype.upper()]
    # A row that is no multiple of q8_0's block goes to f16, as in llama.cpp.
    return {"matrix": wanted, "vector": Kind.F32, "ragged": Kind.F16 if dtype == "q8_0" else wanted}


def _merged_items(model: Checkpoint, lora: Adapter | None, reader: TensorReader, simulate: bool) -> Iterator[Item]:
    changed = lora.changed if lora is not None else set()

    def rounded(name: str) -> bool:
        return simulate and name not in (EMBEDDING, HEAD) and len(model.shape(name)) == 2

    def base(name: str) -> torch.Tensor:
        if rounded(name):
            from grit_impl.export.four_bit import round_trip

            return round_trip(reader(name))
        return reader(name)

    def item(name: str, place: str) -> Item:
        heads = rotary_heads(name, model.config)

        def pieces() -> Iterable[torch.Tensor]:
            if lora is not None and name in changed:
                weight: Iterable[torch.Tensor] = [lora.merged(name, base)]
            elif rounded(name):
                weight = [base(name)]
            else:
                # Rows that change places are needed all at once.
                weight = [reader.floating(name)] if heads else reader.pieces(name, BLOCK)
            return (permute(piece, heads) for piece in weight) if heads else weight

        return Item(place, lora.shape(name) if lora is not None else model.shape(name), pieces)

    factors = rope_factors(model.config)
    if factors is not None:
        yield Item("rope_freqs.weight", tuple(factors.shape), lambda: [factors])
    for name in model.names():
        yield item(name, gguf_name(name, model.config))
    if model.tied and changed & {EMBEDDING, HEAD}:
        # One of the two was trained, so they are no longer the same matrix.
        yield item(HEAD, gguf_name(HEAD, model.config))


def _adapter_items(model: Checkpoint, lora: Adapter, alpha: float) -> Iterator[Item]:
    for module, layer in lora.layers.items():
        name = gguf_name(f"{module}.weight", model.config)
        heads = rotary_heads(f"{module}.", model.config)
        a, b = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
        folded = b * (layer.scaling[NAME] / (alpha / a.shape[0]))
        folded = permute(folded, heads) if heads else folded
        yield Item(f"{name}.lora_a", tuple(a.shape), lambda a=a: [a])  # type: ignore[misc]
        yield Item(f"{name}.lora_b", tuple(folded.shape), lambda b=folded: [b])  # type: ignore[misc]


def _stream(
    writer: GGUFWriter, items: list[Item], out: Path, kinds: dict[str, GGMLQuantizationType], progress: Progress | None
) -> str:
    """Write the file, a block of rows at a time, and return its SHA-256.

    A second thread writes and hashes what the first has encoded; both work outside Python's lock.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES

    types = []
    for item in items:
        matrix = "ragged" if item.shape[-1] % 32 else "matrix"
        kind = kinds["vector" if len(item.shape) == 1 else matrix]
        block, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), math.prod(item.shape) // block * size, kind)
        types.append((kind, math.prod(item.shape) // block * size))
    needed = sum(nbytes for _, nbytes in types)
    digest, waiting = hashlib.sha256(), deque[Future[None]]()

    def put(data: Any) -> None:
        assert writer.fout is not None
        writer.fout[0].write(data)
        digest.update(data)

    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(out.parent).free) < needed:
            raise GRITError(f"not enough space for {out}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")
        # A file cut short here cannot be loaded: llama.cpp refuses tensors that lie beyond the end.
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digest.update(partial.read_bytes())
        place = partial.stat().st_size
        with ThreadPoolExecutor(1) as pool, _one_torch_thread():
            for done, (item, (kind, size)) in enumerate(zip(items, types, strict=True)):
                if progress is not None:
                    progress(done, len(items), item.name)
                end = place + -place % writer.data_alignment + size
                for data in itertools.chain([bytes(-place % writer.data_alignment)], _encoded(item, kind)):
                    waiting.append(pool.submit(put, data))
                    place += len(data)
                    if len(waiting) > WAITING:
                        waiting.popleft().result()
                if place != end:
                    raise RuntimeError(f"{item.name} was encoded to {place - end} bytes more than its header says")
            waiting.append(pool.submit(put, bytes(-place % writer.data_alignment)))
            for future in waiting:
                future.result()
        writer.flush()
        assert writer.fout is not None
        os.fsync(writer.fout[0].fileno())
        writer.close()
        partial.replace(out)
    except OSError as error:
        raise GRITError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for handle in writer.fout or []:
            # On a full disk closing fails once more.
            with contextlib.suppress(OSError):
                handle.close()
        partial.unlink(missing_ok=True)
    if progress is not None:
        progress(len(items), len(items), "done")
    return digest.hexdigest()


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """A block is too small to share out: torch's other threads would spin on the cores that write and hash."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _encoded(item: Item, kind: GGMLQuantizationType) -> Iterator[Any]:
    """The tensor's bytes, a block of rows at a time: only a block of it is ever in float32."""
    import numpy as np
    import torch

    for piece in item.pieces():
        rows = piece.unsqueeze(0) if piece.ndim == 1 else piece.flatten(0, -2)
        for block in torch.split(rows, max(1, BLOCK // rows.shape[1])):
            full = block.float().contiguous()
            if not np.isfinite(full.numpy()).all():
                raise GRITError(f"cannot export {item.name}: it holds NaN or infinite values")
            yield encode(full, kind.name).flatten().view(torch.uint8).numpy()


def _finished(
    out: Path | str,
    sha256: str,
    kind: str,
    dtype: str,
    tensors: int,
    fingerprint: str,
    lora: Adapter | None,
    merge_base: str,
    vocabulary: Vocabulary,
) -> Export:
    path = Path(out)
    return Export(
        path=path,
        kind=kind,
        dtype=dtype,
        sha256=sha256,
        size=path.stat().st_size,
        tensors=tensors,
        base_fingerprint=fingerprint,
        adapter_sha256=lora.sha256 if lora is not None else None,
        merge_base=merge_base,
        stops=vocabulary.stops,
        template=vocabulary.template,
        notes=vocabulary.notes,
    )
