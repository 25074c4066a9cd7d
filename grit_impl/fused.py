"""Statistics from inside Unsloth's fused LoRA functions, with every fused kernel left on.

Unsloth's `LoRA_MLP`, `LoRA_QKV` and `LoRA_W` (unsloth/kernels/fast_lora.py) take the LoRA weights as tensors and never
call the `lora_A` and `lora_B` modules, so module hooks see nothing. Their backward functions hold everything that the
statistics need: the input X, the adapters, and dL/dy. `FusedTap` puts subclasses in their place whose backward reads
these tensors first and then runs the original, so that each token is counted once, where its gradient is, whatever
gradient checkpointing does to the forward. Read in unsloth 2025.10.9 and 2026.10.9, which look the functions up by
name at call time; both save A, B (gate, up, down or q, k, v) and X in the order used here.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from grit_impl.autograd import LossTap, RankStatistics
from grit_impl.errors import GRITError

if TYPE_CHECKING:
    from grit_impl.manager import LoRAFactorPair

MODULE = "unsloth.kernels.fast_lora"
FUNCTIONS = ("LoRA_MLP", "LoRA_QKV", "LoRA_W")


def fused_functions() -> Any | None:
    """Unsloth's module of fused LoRA functions if it is loaded; None without Unsloth.

    Raises:
        GRITError: this Unsloth cannot be instrumented.
    """
    module = sys.modules.get(MODULE)
    if module is None:
        return None
    version = getattr(sys.modules.get("unsloth"), "__version__", "of unknown version")
    missing = [name for name in FUNCTIONS if not hasattr(module, name)]
    if missing:
        raise GRITError(
            f"GRIT cannot take statistics from unsloth {version}: {MODULE} has no {', '.join(missing)}; use a version "
            "from 2025.10 to 2026.10, or train without Unsloth (--arm pure)"
        )
    blocks = sys.modules.get("unsloth.models._block_compile")
    if blocks is not None and torch.cuda.is_available() and os.environ.get("UNSLOTH_BLOCK_COMPILE", "1") != "0":
        raise GRITError(
            f"unsloth {version} compiles whole decoder layers, which hides its LoRA functions from GRIT: set "
            "UNSLOTH_BLOCK_COMPILE=0 before unsloth is imported (measured: no slower, see docs/gpu.md)"
        )
    return module


class _Branch(NamedTuple):
    """One layer of a fused function: its index, A and B in x's precision, the scaling s, its input and dL/dy."""

    layer: int
    a: Tensor
    b: Tensor
    scale: float
    x: Tensor
    dy: Tensor


class _StandIn:
    """A function's context with some attributes replaced.

    The real one is left alone: what it is given lives until the garbage collector runs, activations included.
    """

    def __init__(self, ctx: Any, **replaced: Any) -> None:
        self._ctx = ctx
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class FusedTap:
    """Reads a = A x and g = s B' dL/dy in the backward of the fused functions.

    Args:
        layers: The manager's layers, in order.
        statistics: Where the sums go.
        loss: Knows the tokens of the current forward pass.
        module: `unsloth.kernels.fast_lora`.
    """

    def __init__(
        self, layers: Sequence[LoRAFactorPair], statistics: RankStatistics, loss: LossTap, module: Any
    ) -> None:
        self._layers, self._statistics, self._loss, self._module = layers, statistics, loss, module
        self._index: dict[int, int] = {}
        self._buffers: dict[Any, list[Any]] = {}
        self._originals = {name: getattr(module, name) for name in FUNCTIONS}
        for name, backward in zip(FUNCTIONS, (self._mlp, self._qkv, self._w), strict=True):
            original = self._originals[name]
            setattr(module, name, type(name, (original,), {"backward": staticmethod(backward(original))}))

    def remove(self) -> None:
        """Put the original functions back."""
        for name, original in self._originals.items():
            setattr(self._module, name, original)

    def _mlp(self, original: Any) -> Callable[..., Any]:
        def backward(ctx: Any, dy: Tensor) -> Any:
            if not self._wanted():
                return original.backward(ctx, dy)
            adapters, rest = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
            x, masks = rest[0], rest[3:]
            *weights, kernel = ctx.custom_saved_tensors
            cast = self._cast(adapters, x.dtype)
            gate_x, up_x = self._dropped(x, masks, 0, ctx), self._dropped(x, masks, 1, ctx)

            def element_wise(*arguments: Tensor) -> Any:
                # The only place where the gradients at the outputs of gate and up exist.
                h, d_up, d_gate = kernel(*arguments)
                down_x = self._dropped(h, masks, 2, ctx)
                self._add(adapters, cast, weights[2::3], (gate_x, up_x, down_x), (d_gate, d_up, dy))
                return h, d_up, d_gate

            return original.backward(
                _StandIn(ctx, saved_tensors=(*cast, *rest), custom_saved_tensors=(*weights, element_wise)), dy
            )

        return backward

    def _qkv(self, original: Any) -> Callable[..., Any]:
        def backward(ctx: Any, *dys: Tensor) -> Any:
            if not self._wanted():
                return original.backward(ctx, *dys)
            x, adapters, masks = ctx.saved_tensors[0], ctx.saved_tensors[1:7], ctx.saved_tensors[7:]
            cast = self._cast(adapters, x.dtype)
            inputs = [self._dropped(x, masks, i, ctx) for i in range(len(dys))]
            self._add(adapters, cast, ctx.custom_saved_tensors[2::3], inputs, dys)
            return original.backward(_StandIn(ctx, saved_tensors=(x, *cast, *masks)), *dys)

        return backward

    def _w(self, original: Any) -> Callable[..., Any]:
        def backward(ctx: Any, dy: Tensor) -> Any:
            if not self._wanted():
                return original.backward(ctx, dy)
            adapters, x, masks = ctx.saved_tensors[:2], ctx.saved_tensors[2], ctx.saved_tensors[3:]
            cast = self._cast(adapters, x.dtype)
            self._add(adapters, cast, ctx.custom_saved_tensors[2::3], (self._dropped(x, masks, 0, ctx),), (dy,))
            return original.backward(_StandIn(ctx, saved_tensors=(*cast, x, *masks)), dy)

        return backward

    def _wanted(self) -> bool:
        return self._loss.context is not None and self._statistics.collecting

    def _dropped(self, x: Tensor, masks: Sequence[Tensor | None], i: int, ctx: Any) -> Tensor:
        """What the LoRA branch saw: x after dropout, where this Unsloth fuses dropout."""
        mask = masks[i] if i < len(masks) else None
        if mask is None:
            return x
        p = ctx.dropout_p[i] if isinstance(ctx.dropout_p, tuple) else ctx.dropout_p
        return self._module._dropout_replay(x.reshape(mask.shape), mask, p)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _cast(self, adapters: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
        """A and B of a function's layers, in turn, in x's precision; None where a layer has no adapter.

        The original casts each of them on its own; what it is given here it takes as it is. One call fills buffers
        that blocks of one shape share: the host's time, not the device's, is what this costs. The A of layers with
        one d_in lie one below the other.
        """
        key = (dtype, *(None if w is None else w.shape for w in adapters))
        if key not in self._buffers:
            buffers: list[Any] = [None if w is None else torch.empty_like(w, dtype=dtype) for w in adapters]
            with_a = [i for i in range(0, len(adapters), 2) if adapters[i] is not None]
            for d_in, same in itertools.groupby(with_a, lambda i: buffers[i].shape[1]):
                members = list(same)
                ranks = [buffers[i].shape[0] for i in members]
                stacked = buffers[members[0]].new_empty(sum(ranks), d_in)
                for i, part in zip(members, torch.split(stacked, ranks), strict=True):
                    buffers[i] = part
            self._buffers[key] = buffers
        buffers = self._buffers[key]
        torch._foreach_copy_([b for b in buffers if b is not None], [w for w in adapters if w is not None])
        return buffers

    @torch.no_grad()
    def _add(
        self,
        adapters: Sequence[Tensor | None],
        cast: Sequence[Tensor | None],
        scales: Sequence[float | None],
        inputs: Sequence[Tensor],
        dys: Sequence[Tensor],
    ) -> None:
        """Take a = A x and g = s B' dL/dy of a function's layers; those that read the same x share one product."""
        context = self._loss.context
        assert context is not None
        branches = []
        for i, (x, dy, scale) in enumerate(zip(inputs, dys, scales, strict=True)):
            original, a, b = adapters[2 * i], cast[2 * i], cast[2 * i + 1]
            if original is not None and a is not None and b is not None and scale is not None:
                branches.append(_Branch(self._find(original), a, b, scale, x, dy))
        for _, same_x in itertools.groupby(branches, lambda branch: id(branch.x)):
            group = list(same_x)
            first, ranks = group[0].a, [branch.a.shape[0] for branch in group]
            # Neighbours in the buffer: together one matrix (sum r, d_in).
            stacked = first if len(group) == 1 else first.as_strided((sum(ranks), first.shape[1]), first.stride())
            x = group[0].x
            values = torch.split(x.reshape(-1, x.shape[-1]) @ stacked.t(), ranks, 1)
            for branch, value in zip(group, values, strict=True):
                gradient = branch.dy.reshape(-1, branch.dy.shape[-1]) @ branch.b
                if branch.scale != 1:
                    gradient *= branch.scale
                self._statistics.add(branch.layer, value, gradient, context)

    def _find(self, a: Tensor) -> int:
        """Index of the layer whose lora_A this is. Saved tensors are the parameters themselves, at their address."""
        if a.data_ptr() not in self._index:
            self._index = {layer.a.data_ptr(): i for i, layer in enumerate(self._layers)}
        try:
            return self._index[a.data_ptr()]
        except KeyError:
            raise GRITError("a fused LoRA function used a weight that is in none of the model's LoRA layers") from None
