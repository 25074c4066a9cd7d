"""Number types of GGUF files, and the key that says which base a file belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grit_impl.errors import GRITError
from grit_impl.gguf.metadata import read_metadata

if TYPE_CHECKING:
    import torch

DTYPES = ("f32", "f16", "bf16", "q8_0")
# llama.cpp's LLAMA_FTYPE numbers.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
FINGERPRINT_KEY = "grit.base_fingerprint"


def check_same_base(model: Path | str, adapter: Path | str) -> None:
    """Refuse an adapter file made for another base than a model file.

    Raises:
        GRITError: the fingerprints differ. Files without a fingerprint (made elsewhere) pass: nothing is known.
    """
    ours, theirs = (read_metadata(Path(p)).get(FINGERPRINT_KEY) for p in (model, adapter))
    if ours and theirs and ours != theirs:
        raise GRITError(f"wrong-base: {adapter} was trained on {theirs[:12]}, {model} is {ours[:12]}")


def encode(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Finite float32 numbers (rows, columns) as GGUF's F32, F16, BF16 or Q8_0, bit for bit as `gguf.quants` has them.

    Q8_0 is 32 numbers to a block: their largest magnitude over 127 as float16, then 32 multiples of it as int8. Here it
    takes a third of the time.
    """
    import torch

    if kind != "Q8_0":
        return rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
    blocks = rows.view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True).div_(127)
    # In float32, as the scale is stored in less.
    multiples = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    # Halves go away from zero. Adding 0.5 itself would round the number below a half up to 1.
    multiples += torch.copysign(torch.tensor(0.49999997), multiples)
    out = torch.empty(len(blocks), 17, dtype=torch.int16)
    out[:, :1] = scale.half().view(torch.int16)
    out[:, 1:] = multiples.to(torch.int8).view(torch.int16)
    return out
