"""Capture inside compiled models: operators, where a hook would cut the graph at every layer.

A compiler traces tensors and operators, no Python objects. So each `lora_A` carries a tensor of two numbers, that of
its tap and the index of its layer. What `lora_A` returns goes through `note`, and its gradient through the operator
`grit::noted`, where the layer's a and g meet when the compiled code runs. The numbers stand in a tensor, because a
plain number would be a constant of the graph, and every decoder layer would get a graph of its own.

Fused functions hold nothing but tensors. What compiled code computes in them goes through `grit::noted_fused`, and the
address of a `lora_A` tells which layer it is.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grit_impl.method.capture.rank_statistics import ForwardContext, RankStatistics


class _Loss(Protocol):
    context: ForwardContext | None


class ModuleNotes(Protocol):
    """What compiled code needs of a tap on modules."""

    @property
    def loss(self) -> _Loss: ...
    @property
    def statistics(self) -> RankStatistics: ...


_taps: weakref.WeakValueDictionary[int, ModuleNotes] = weakref.WeakValueDictionary()
_numbers = itertools.count()
fused_taps: list[Any] = []
"""Attached taps on fused functions, the oldest first; where several own a layer, the newest counts."""
# The operators run Python, which a recorded CUDA graph would not run again.
_UNRECORDED = [torch.Tag.cudagraph_unsafe]


def register(tap: ModuleNotes) -> int:
    """Make a tap known to compiled code for as long as somebody else holds it; returns its number."""
    number = next(_numbers)
    _taps[number] = tap
    return number


class _Note(torch.autograd.Function):
    """The identity, whose gradient is noted."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(output, where)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _noted_operator(g, *ctx.saved_tensors), None


def note(output: Tensor, where: Tensor) -> Tensor:
    """What `lora_A` returned, itself; its gradient is noted.

    Args:
        output: (..., r).
        where: (2,) int64 on the CPU: the tap's number, the layer's index.
    """
    result: Tensor = _Note.apply(output, where)  # type: ignore[no-untyped-call]
    return result


def _noted(g: Tensor, a: Tensor, where: Tensor) -> Tensor:
    """The gradient at `note`, copied: an operator has to return a new tensor.

    Where nothing uses the output of a compiled layer, its gradient is zeros and its tokens count. Without a compiler it
    has no gradient, and they do not.
    """
    number, layer = where.tolist()
    tap = _taps.get(number)
    context = None if tap is None else tap.loss.context
    if tap is not None and context is not None and tap.statistics.collecting:
        # Copies, because compiled code reuses a tensor's memory after its own last use of it.
        values = torch.stack((a, g))
        tap.statistics.add(layer, values[0], values[1], context)
    return g.clone()


def fused_tap(lora_a: Sequence[Tensor | None]) -> Any:
    """The tap that owns a layer of a fused function; None: there is none."""
    there = [a for a in lora_a if a is not None]
    return next((tap for tap in reversed(fused_taps) if any(map(tap.owns, there))), None)


def _noted_fused(
    gradient: Tensor, lora_a: list[Tensor], products: list[Tensor], scales: list[float], operands: list[Tensor]
) -> None:
    """Note the products of a fused function's layers.

    Args:
        gradient: One that the function returns. The operator claims to write to it and does not: the compiler would
            leave out an operator whose result nobody uses.
        lora_a: The layers' parameters A.
        products: A x' (r, tokens) of each, then dL/dy B (tokens, r) of each, as one row.
        scales: Of each, not applied to dL/dy B yet.
        operands: Not used; `fused_traced` says why they are there.
    """
    for tap in reversed(fused_taps):
        if tap.note(lora_a, products, scales):
            return


# Put together by hand: an operator that `custom_op` makes takes three times as long per call, and there are three to
# seven calls per decoder layer, where on a fast GPU the host sets the pace.
torch.library.define("grit::noted", "(Tensor g, Tensor a, Tensor where) -> Tensor", tags=_UNRECORDED)
torch.library.impl("grit::noted", "CompositeExplicitAutograd", _noted)
torch.library.register_fake("grit::noted", lambda g, a, where: torch.empty_like(g))
_noted_operator = torch.ops.grit.noted.default
# An operator that returned the gradient would have to copy it; `flexible_layout` spares a copy of each product.
torch.library.define(
    "grit::noted_fused",
    "(Tensor(a!) gradient, Tensor[] lora_a, Tensor[] products, float[] scales, Tensor[] operands) -> ()",
    tags=[*_UNRECORDED, torch.Tag.flexible_layout],
)
torch.library.impl("grit::noted_fused", "CompositeExplicitAutograd", _noted_fused)
torch.library.register_fake("grit::noted_fused", lambda *_: None)
noted_fused = torch.ops.grit.noted_fused.default
