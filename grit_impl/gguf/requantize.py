"""Rewrite a GGUF file: other keys, other tensors, or another number type."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

    Array = np.ndarray[Any, np.dtype[np.float32]]

Change = Callable[[str, "Array"], "Array | None"]


def rewrite(
    source: Path,
    out: Path,
    *,
    keys: dict[str, Any] | None = None,
    drop_keys: tuple[str, ...] = (),
    change: Change | None = None,
    dtype: str | None = None,
) -> Path:
    """Copy a GGUF file with changes.

    Args:
        source: The file.
        out: The copy; it appears when it is complete.
        keys: Metadata to replace or add, in the type that it has in the file (or bool, int, float, str).
        drop_keys: Metadata to leave out.
        change: Called with a tensor's name and float32 value (rows, columns); returns the new one, None drops it.
        dtype: Number type of all matrices; None keeps each tensor's.

    Raises:
        GRITError: `source` is not a readable GGUF file, or `out` cannot be written.
    """
    import numpy as np
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader, GGUFWriter, quants
    from gguf.constants import GGUFValueType

    try:
        reader = GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise GRITError(f"{source} is not a readable GGUF file ({error})") from error
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(None, str(architecture))
    given = dict(keys or {})
    for name, item in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop_keys:
            continue
        value = given.pop(name) if name in given else item.contents()
        writer.add_key_value(name, value, item.types[0], sub_type=item.types[-1] if len(item.types) > 1 else None)
    simple = {
        bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING
    }  # fmt: skip
    for name, value in given.items():
        writer.add_key_value(name, value, simple[type(value)])
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        array = np.asarray(tensor.data)
        if change is not None or dtype is not None:
            full = quants.dequantize(array, kind).astype(np.float32)
            changed = change(tensor.name, full) if change is not None else full
            if changed is None:
                continue
            if changed is not full or dtype is not None:
                kind = _kind(changed, dtype, kind)
                array = quants.quantize(np.ascontiguousarray(changed), kind)
        writer.add_tensor(tensor.name, array, raw_dtype=Kind(kind))
    partial = out.with_name(f".{out.name}.partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, out)
    except OSError as error:
        raise GRITError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def requantize(source: Path, folder: Path, dtype: str) -> Path:
    """A copy of a GGUF file in another number type, named by its SHA-256 as a server's blob.

    Raises:
        GRITError: as `rewrite`; also if the source is already quantised, which would round twice.
    """
    from grit_impl.gguf.encoding import FILE_TYPES
    from grit_impl.gguf.metadata import read_metadata
    from grit_impl.record import sha256_file

    stored = int(read_metadata(source).get("general.file_type", 0))
    # Ollama cannot tell f32 (type 0) from an unset type, and refuses it.
    if stored not in (FILE_TYPES["f16"], FILE_TYPES["bf16"]):
        raise GRITError("quantization is only supported for F16, BF16 and F32 models")
    out = folder / f"upload-{os.getpid()}-{source.name}.gguf"
    rewrite(source, out, keys={"general.file_type": FILE_TYPES[dtype]}, dtype=dtype)
    final = folder / f"sha256-{sha256_file(out)}"
    os.replace(out, final)
    return final


def _kind(array: Array, dtype: str | None, stored: GGMLQuantizationType) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType as Kind

    if dtype is None:
        return stored
    if array.ndim == 1:
        return Kind.F32
    return Kind.F16 if dtype == "q8_0" and array.shape[-1] % 32 else Kind[dtype.upper()]
