"""What an optimizer holds in the place of the model's tensors: masters in float32, copies, parts of a flat buffer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StandIn:
    """`tensor[start : start + n]`, in a parameter's shape.

    Attributes:
        tensor: What the optimizer holds.
        start: Of the part, in elements.
        shape: The parameter's.
    """

    tensor: Tensor
    start: int
    shape: torch.Size

    @property
    def value(self) -> Tensor:
        """The part itself; the tensor where it is all of it."""
        return self._part(self.tensor)

    @property
    def grad(self) -> Tensor | None:
        """Its gradient."""
        return None if self.tensor.grad is None else self._part(self.tensor.grad)

    def follows(self, parameter: Tensor) -> bool:
        """Whether the parameter has its values, but for rounding."""
        p, value = parameter.detach(), self.value.detach()
        return torch.allclose(value.to(p.dtype), p, rtol=torch.finfo(p.dtype).eps, atol=0, equal_nan=True)

    def _part(self, whole: Tensor) -> Tensor:
        if whole.shape == self.shape:
            return whole
        return whole.detach().reshape(-1)[self.start : self.start + self.shape.numel()].view(self.shape)


def stand_ins(held: Iterable[Tensor], parameters: Sequence[nn.Parameter], missing: Sequence[int]) -> dict[int, StandIn]:
    """Position -> what is held in a parameter's place: it shares its memory, or has its shape and values.

    A copy of the parameter's own type counts if it has a gradient: without one it was left behind. Of several equal
    ones (B is zero at first) that with the most similar gradient.

    Args:
        held: What the optimizer holds, apart from parameters of the model.
        parameters: The model's.
        missing: Positions of those that it does not hold.
    """
    found: dict[int, StandIn] = {}
    used: set[int] = set()
    flat = [q for q in held if q.ndim == 1 and q.is_contiguous()]
    ends = dict.fromkeys(map(id, flat), 0)
    for i in missing:
        p = parameters[i]
        whole = [StandIn(q, 0, p.shape) for q in held if q.shape == p.shape and id(q) not in used]
        parts = [StandIn(q, _start(q, p, ends[id(q)]), p.shape) for q in flat]
        fits = [s for s in (*whole, *parts) if _may(s, p) and s.follows(p)]
        if fits:
            best = found[i] = max(fits, key=lambda s: _likeness(s.grad, p.grad))
            if best.tensor.shape == p.shape:
                used.add(id(best.tensor))
            else:
                ends[id(best.tensor)] = best.start + p.numel()
    return found


def _start(flat: Tensor, p: Tensor, end: int) -> int:
    """Where a parameter begins in a flat tensor: where its memory is, or behind the parameter before."""
    if flat.untyped_storage().data_ptr() == p.untyped_storage().data_ptr():
        return int(p.storage_offset() - flat.storage_offset())
    return end


def _may(s: StandIn, p: Tensor) -> bool:
    q = s.tensor
    if q.device != p.device or not q.is_floating_point() or s.start < 0 or s.start + p.numel() > q.numel():
        return False
    return q.element_size() > p.element_size() or q.grad is not None


def _likeness(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return -2.0
    return float(torch.nn.functional.cosine_similarity(a.reshape(-1).float(), b.reshape(-1).float(), dim=0))
