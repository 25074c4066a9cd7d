"""Capture inside compiled models: operators, where a hook would cut the graph at every layer.

A compiler traces tensors and operators, no Python objects. So each `lora_A` carries a tensor of two numbers, its tap's
and its layer's, and what it returns goes through `grit::note`, whose gradient is `grit::noted`: there the layer's a and
g meet, when the compiled code runs. A tensor, because a number would be a constant of the graph, and every decoder
layer a graph of its own.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grit_impl.autograd import ModuleTap

_taps: weakref.WeakValueDictionary[int, ModuleTap] = weakref.WeakValueDictionary()
_numbers = itertools.count()
# Python runs in the operators, which a recorded CUDA graph would leave out.
_UNRECORDED = [torch.Tag.cudagraph_unsafe]


def register(tap: ModuleTap) -> int:
    """Make a tap known to compiled code for as long as somebody else holds it; returns its number."""
    number = next(_numbers)
    _taps[number] = tap
    return number


@torch.library.custom_op("grit::note", mutates_args=(), tags=_UNRECORDED)
def note(output: Tensor, where: Tensor) -> Tensor:
    """What `lora_A` returned, itself; its gradient is noted.

    Args:
        output: (..., r).
        where: (2,) int64 on the CPU: the tap's number, the layer's index.
    """
    return output.clone()


@torch.library.custom_op("grit::noted", mutates_args=(), tags=_UNRECORDED)
def _noted(g: Tensor, a: Tensor, where: Tensor) -> Tensor:
    """The gradient at `note`.

    An output of a compiled layer that nothing uses gets a gradient of zeros, and its tokens count; without a compiler
    they get none, and do not.
    """
    number, layer = where.tolist()
    tap = _taps.get(number)
    context = None if tap is None else tap.loss.context
    if tap is not None and context is not None and tap.statistics.collecting:
        # Copies: compiled code uses memory again as soon as it has no reader left.
        tap.statistics.add(layer, a.clone(), g.clone(), context)
    return g.clone()


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


note.register_fake(lambda output, where: torch.empty_like(output))
_noted.register_fake(lambda g, a, where: torch.empty_like(g))
note.register_autograd(lambda ctx, g: (_noted(g, *ctx.saved_tensors), None), setup_context=_keep)
