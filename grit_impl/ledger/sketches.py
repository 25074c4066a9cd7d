"""Fingerprints of many tensors at once: norm, bit hash and a fixed random sketch, without waiting for the device.

The sketch is a Johnson-Lindenstrauss projection: for two tensors x and y of one size, the cosine of their sketches
estimates the cosine of x and y; 1 - cos comes out with a relative error of about sqrt(2 / K), so a cosine near 1 is
known precisely. The sketch is linear: sketch(x) - sketch(y) = sketch(x - y). The hash is a weighted sum of the bits
in wrapped 32-bit arithmetic; its weights are odd, so changing any single element changes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grit_impl.ledger.timeline import COLUMNS, SKETCH


class Sketcher:
    """Takes fingerprints of lists of tensors.

    Args:
        largest: Elements of the largest tensor it will see.
        chunk: Elements that are stacked at once: bounds the extra memory (8 bytes per element).

    Two sketchers of different `largest` agree: their weights are drawn in blocks of fixed size.
    """

    BLOCK = 1 << 14

    def __init__(self, largest: int, chunk: int = 1 << 23) -> None:
        self.largest, self.chunk = max(1, largest), chunk
        self._weights: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._weights:
            signs, odd = [], []
            for block in range(-(-self.largest // self.BLOCK)):
                generator = torch.Generator().manual_seed(9176 + block)
                signs.append(torch.randint(0, 2, (self.BLOCK, SKETCH), generator=generator) * 2.0 - 1.0)
                odd.append(torch.randint(-(2**30), 2**30, (2 * self.BLOCK,), generator=generator) * 2 + 1)
            self._weights[device] = (
                (torch.cat(signs)[: self.largest] / SKETCH**0.5).to(device),
                torch.cat(odd).to(torch.int32)[: 2 * self.largest].to(device),
            )
        return self._weights[device]

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """Fingerprints (N, 2 + K), float64, on the tensors' device; None if all are None.

        Column 0 holds the hash's 64 bits (see `hashes`), column 1 the L2 norm, the others the sketch. Rows of None
        are NaN.
        """
        # By shape, so that one call stacks a group: a view of each tensor would cost the host more than the rest.
        groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel():
                groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
        if not groups:
            return None
        home = next(iter(groups))[2]
        order: list[int] = []
        parts: list[Tensor] = []
        with torch.autocast(home.type, enabled=False):
            for (shape, _, device), members in groups.items():
                size = max(1, self.chunk // shape.numel())
                for start in range(0, len(members), size):
                    batch = members[start : start + size]
                    parts.append(self._batch([tensors[i] for i in batch], device).to(home))  # type: ignore[misc]
                    order += batch
        out = torch.full((len(tensors), COLUMNS), torch.nan, dtype=torch.float64, device=home)
        rows = torch.tensor(order)
        if home.type == "cuda":
            rows = rows.pin_memory().to(home, non_blocking=True)
        out[rows] = torch.cat(parts)
        return out

    @torch.no_grad()
    def hashes(self, tensors: Sequence[Tensor]) -> Tensor:
        """Column 0 of the fingerprints alone, (N,) int64 on the tensors' device, for a few tensors."""
        out = [(_bits(t.detach().reshape(-1)) * self._on(t.device)[1][: _columns(t)]).sum() for t in tensors]
        return torch.stack(out)

    def _batch(self, tensors: list[Tensor], device: torch.device) -> Tensor:
        signs, odd = self._on(device)
        stack = torch.stack(tensors).reshape(len(tensors), -1)
        bits = _bits(stack)
        hashes = (bits * odd[: bits.shape[1]]).sum(1, dtype=torch.int64)
        values = stack.float()
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
        sketch = values @ signs[: values.shape[1]]
        return torch.cat([hashes.view(torch.float64)[:, None], norms[:, None], sketch.double()], dim=1)


def _bits(values: Tensor) -> Tensor:
    """int32; float64 has two columns per element."""
    return values.view(torch.int16).int() if values.element_size() == 2 else values.view(torch.int32)


def _columns(tensor: Tensor) -> int:
    return tensor.numel() * max(1, tensor.element_size() // 4)


def hashes(fingerprints: Tensor) -> Tensor:
    """The hash column of fingerprints (..., 2 + K) on the CPU, as int64."""
    return fingerprints[..., 0].contiguous().view(torch.int64)
