"""Fingerprints of many tensors at once: bit hash, norm, and inner products with earlier looks at the same tensors.

Nothing waits for the device. The hash is a sum of the bits weighted in wrapped 32-bit arithmetic; its weights are odd,
so changing any single element changes it. Norms and inner products are exact to the rounding of float32: two looks at a
gradient give the angle between what it was and what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_Key = tuple[torch.Size, torch.dtype, torch.device]
_SIGN = 0x2545F491
"""Any number with bits in all places: where a sign goes in the hash."""


@dataclass(eq=False)
class Look:
    """Tensors as they were at one moment.

    Attributes:
        table: (N, 2 + M), float64, on the tensors' device: hash (64 bits, see `hashes`), L2 norm, and the inner product
            with, or distance from, each of M earlier looks; rows of missing tensors are NaN. None: all were missing.
        stacks: The values themselves, tensors of one shape stacked in the order of their positions.
    """

    table: Tensor | None
    stacks: dict[_Key, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)

    def values(self, key: _Key, members: tuple[int, ...]) -> Tensor:
        """(len(members), numel) as they were; NaN where one was missing or had another size."""
        own = self.stacks.get(key)
        if own is not None and own[0] == members:
            return own[1]
        rows = {i: row for positions, stack in self.stacks.values() for i, row in zip(positions, stack, strict=True)}
        nothing = torch.full((key[0].numel(),), torch.nan, device=key[2])
        found = [rows.get(i, nothing).to(key[2]) for i in members]
        return torch.stack([row if row.numel() == nothing.numel() else nothing for row in found])


class Fingerprinter:
    """Takes looks at lists of tensors.

    Args:
        largest: Elements of the largest tensor it will see.

    Two of different `largest` agree: their weights are drawn in blocks of fixed size.
    """

    BLOCK = 1 << 14

    def __init__(self, largest: int) -> None:
        self.largest = max(1, largest)
        self._weights: dict[torch.device, Tensor] = {}

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._weights:
            odd = []
            for block in range(-(-self.largest // self.BLOCK)):
                generator = torch.Generator().manual_seed(9176 + block)
                odd.append(torch.randint(-(2**30), 2**30, (2 * self.BLOCK,), generator=generator) * 2 + 1)
            self._weights[device] = torch.cat(odd).to(torch.int32)[: 2 * self.largest].to(device)
        return self._weights[device]

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor | None], *earlier: Look | None, distances: bool = False) -> Look:
        """Look at tensors, and compare them with what they were at earlier looks (NaN where that cannot be).

        Args:
            tensors: At the same positions at each look.
            earlier: None: an empty column.
            distances: L2 distances instead of inner products: exact for small differences.
        """
        compare = _distance if distances else _inner
        # By shape, so that one call stacks a group: a view of each tensor would cost the host more than the rest.
        groups: dict[_Key, list[int]] = {}
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel():
                groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(index)
        if not groups:
            return Look(None)
        home = next(iter(groups))[2]
        look, order, parts = Look(None), [], []
        with torch.autocast(home.type, enabled=False):
            for key, members in groups.items():
                stack = torch.stack([tensors[i] for i in members]).reshape(len(members), -1)  # type: ignore[misc]
                bits, odd = _bits(stack), self._on(key[2])
                values = stack.float()
                look.stacks[key] = tuple(members), values
                columns = [(bits * odd[: bits.shape[1]]).sum(1, dtype=torch.int64).view(torch.float64)]
                columns.append(torch.linalg.vector_norm(values, dim=1).double())
                for look_before in earlier:
                    before = None if look_before is None else look_before.values(key, tuple(members))
                    columns.append(columns[1] * torch.nan if before is None else compare(values, before))
                parts.append(torch.stack(columns, 1).to(home))
                order += members
        if order == list(range(len(tensors))) and len(parts) == 1:
            look.table = parts[0]
            return look
        look.table = torch.full((len(tensors), 2 + len(earlier)), torch.nan, dtype=torch.float64, device=home)
        rows = torch.tensor(order)
        if home.type == "cuda":
            rows = rows.pin_memory().to(home, non_blocking=True)
        look.table[rows] = torch.cat(parts)
        return look

    @torch.no_grad()
    def hashes(self, tensors: Sequence[Tensor]) -> Tensor:
        """Column 0 of the fingerprints alone, (N,) int64 on the tensors' device, for a few tensors."""
        out = [(_bits(t.detach().reshape(-1)) * self._on(t.device)[: _columns(t)]).sum() for t in tensors]
        return torch.stack(out) if out else torch.zeros(0, dtype=torch.int64)


def _inner(values: Tensor, other: Tensor) -> Tensor:
    return (values * other).sum(1).double()


def _distance(values: Tensor, other: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(values - other, dim=1).double()
    return distance


def _bits(values: Tensor) -> Tensor:
    """int32; float64 has two columns per element.

    A sign is the highest bit, which no odd number spreads: two of them would cancel in the sum. So it goes to lower
    ones, too.
    """
    bits = values.view(torch.int16).int() if values.element_size() == 2 else values.view(torch.int32)
    return bits ^ ((bits >> 31) & _SIGN)


def _columns(tensor: Tensor) -> int:
    return tensor.numel() * max(1, tensor.element_size() // 4)


def hashes(fingerprints: Tensor) -> Tensor:
    """The hash column of fingerprints (..., 2 + M) on the CPU, as int64."""
    return fingerprints[..., 0].contiguous().view(torch.int64)
