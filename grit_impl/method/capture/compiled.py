"""Capture inside compiled models: operators, where a hook would cut the graph at every layer.

A compiler traces tensors and operators, no Python objects. So each `lora_A` carries a tensor of two numbers, its tap's
and its layer's, and what it returns goes through `note`, whose gradient goes through `grit::noted`: there the layer's a
and g meet, when the compiled code runs. A tensor, because a number would be a constant of the graph, and every decoder
layer a graph of its own.

Unsloth's fused functions hold tensors alone: what compiled code takes in them goes through `grit::noted_fused`, and the
address of a `lora_A` tells whose it is.
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


class FusedNotes(Protocol):
    """What compiled code needs of a tap on fused functions."""

    def owns(self, lora_a: Tensor, /) -> bool:
        """Whether this A is one of the tap's layers'."""

    def note(self, lora_a: list[Tensor], products: list[Tensor], scales: list[float], /) -> bool:
        """Add what was taken; False: these layers are somebody else's."""


_taps: weakref.WeakValueDictionary[int, ModuleNotes] = weakref.WeakValueDictionary()
_numbers = itertools.count()
fused_taps: list[Any] = []
"""Those that are attached, the oldest first; of several that own a layer the newest counts."""
# Python runs in the operators, which a recorded CUDA graph would leave out.
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
    """The gradient at `note`, as a tensor of its own, which makes it an operator that cannot be left out.

    An output of a compiled layer that nothing uses gets a gradient of zeros, and its tokens count; without a compiler
    they get none, and do not.
    """
    number, layer = where.tolist()
    tap = _taps.get(number)
    context = None if tap is None else tap.loss.context
    if tap is not None and context is not None and tap.statistics.collecting:
        # Copies: compiled code uses memory again as soon as it has no reader left.
        values = torch.stack((a, g))
        tap.statistics.add(layer, values[0], values[1], context)
    return g.clone()


def fused_tap(lora_a: Sequence[Tensor | None]) -> Any:
    """Whose layers a fused function's are, or some of them; None: nobody's."""
    there = [a for a in lora_a if a is not None]
    return next((tap for tap in reversed(fused_taps) if any(map(tap.owns, there))), None)


def _noted_fused(
    gradient: Tensor, lora_a: list[Tensor], products: list[Tensor], scales: list[float], operands: list[Tensor]
) -> None:
    """Note the products of a fused function's layers.

    Args:
        gradient: One of the function's that is needed: an operator whose result nobody uses is left out. It is said to
            be written to, and is not.
        lora_a: The layers' parameters A.
        products: A x' (r, tokens) of each, then dL/dy B (tokens, r) of each, as one row.
        scales: Of each, not applied to dL/dy B yet.
        operands: Not used here; see `fused_traced`.
    """
    for tap in reversed(fused_taps):
        if tap.note(lora_a, products, scales):
            return


# By their parts: `custom_op` takes three times as long per call, and these are called three to seven times per decoder
# layer, where on a fast GPU the host sets the pace.
torch.library.define("grit::noted", "(Tensor g, Tensor a, Tensor where) -> Tensor", tags=_UNRECORDED)
torch.library.impl("grit::noted", "CompositeExplicitAutograd", _noted)
torch.library.register_fake("grit::noted", lambda g, a, where: torch.empty_like(g))
_noted_operator = torch.ops.grit.noted.default
# That it seems to write to a gradient spares a copy of it, and `flexible_layout` one of each product.
torch.library.define(
    "grit::noted_fused",
    "(Tensor(a!) gradient, Tensor[] lora_a, Tensor[] products, float[] scales, Tensor[] operands) -> ()",
    tags=[*_UNRECORDED, torch.Tag.flexible_layout],
)
torch.library.impl("grit::noted_fused", "CompositeExplicitAutograd", _noted_fused)
torch.library.register_fake("grit::noted_fused", lambda *_: None)
noted_fused = torch.ops.grit.noted_fused.default
