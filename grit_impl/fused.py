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
    """One layer of a fused function: lora_A and lora_B, the scaling s, its input x and dL/dy; None without LoRA."""

    a: Tensor | None
    b: Tensor | None
    scale: float | None
    x: Tensor
    dy: Tensor


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
        self._buffers: dict[Any, tuple[Tensor, list[Tensor]]] = {}
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
            gate_a, gate_b, up_a, up_b, down_a, down_b, x, _, _, *masks = ctx.saved_tensors
            saved = ctx.custom_saved_tensors
            *weights, kernel = saved
            gate_x, up_x = self._dropped(x, masks, 0, ctx), self._dropped(x, masks, 1, ctx)

            def element_wise(*arguments: Tensor) -> Any:
                # The only place where the gradients at the outputs of gate and up exist.
                h, d_up, d_gate = kernel(*arguments)
                self._add(
                    _Branch(gate_a, gate_b, weights[2], gate_x, d_gate),
                    _Branch(up_a, up_b, weights[5], up_x, d_up),
                    _Branch(down_a, down_b, weights[8], self._dropped(h, masks, 2, ctx), dy),
                )
                return h, d_up, d_gate

            ctx.custom_saved_tensors = (*weights, element_wise)
            try:
                return original.backward(ctx, dy)
            finally:
                # The closure holds ctx and its activations: a cycle that only the garbage collector would free.
                ctx.custom_saved_tensors = saved

        return backward

    def _qkv(self, original: Any) -> Callable[..., Any]:
        def backward(ctx: Any, *dys: Tensor) -> Any:
            x, q_a, q_b, k_a, k_b, v_a, v_b, *masks = ctx.saved_tensors
            scales = ctx.custom_saved_tensors[2::3]
            pairs = ((q_a, q_b), (k_a, k_b), (v_a, v_b))
            self._add(
                *(_Branch(*pairs[i], scales[i], self._dropped(x, masks, i, ctx), dys[i]) for i in range(len(pairs)))
            )
            return original.backward(ctx, *dys)

        return backward

    def _w(self, original: Any) -> Callable[..., Any]:
        def backward(ctx: Any, dy: Tensor) -> Any:
            a, b, x, *masks = ctx.saved_tensors
            self._add(_Branch(a, b, ctx.custom_saved_tensors[2], self._dropped(x, masks, 0, ctx), dy))
            return original.backward(ctx, dy)

        return backward

    def _dropped(self, x: Tensor, masks: list[Tensor | None], i: int, ctx: Any) -> Tensor:
        """What the LoRA branch saw: x after dropout, where this Unsloth fuses dropout."""
        mask = masks[i] if i < len(masks) else None
        if mask is None:
            return x
        p = ctx.dropout_p[i] if isinstance(ctx.dropout_p, tuple) else ctx.dropout_p
        return self._module._dropout_replay(x.reshape(mask.shape), mask, p)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _add(self, *branches: _Branch) -> None:
        """Take a and g of the layers of one fused function.

        A product of this size costs the host more time than the device: layers that read the same x share one.
        """
        context = self._loss.context
        if context is None or not self._statistics.collecting:
            return
        with_lora = [b for b in branches if b.a is not None and b.b is not None and b.scale is not None]
        for _, same_x in itertools.groupby(with_lora, lambda branch: id(branch.x)):
            group: list[Any] = list(same_x)
            x = group[0].x
            rows = x.reshape(-1, x.shape[-1])
            with torch.autocast(device_type=x.device.type, enabled=False):
                stacked, lora_b = self._cast(group, rows.dtype)
                values = (rows @ stacked.t()).split([branch.a.shape[0] for branch in group], 1)
                for branch, value, b in zip(group, values, lora_b, strict=True):
                    gradient = branch.dy.reshape(-1, branch.dy.shape[-1]).to(rows.dtype) @ b
                    if branch.scale != 1:
                        gradient = gradient * branch.scale
                    self._statistics.add(self._find(branch.a), value, gradient, context)

    def _cast(self, group: list[Any], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Every A below the other, (sum r, d_in), and each B, (d_out, r), in x's precision.

        One call copies them all, into buffers that blocks of the same shape share.
        """
        weights = [branch.a for branch in group] + [branch.b for branch in group]
        key = (dtype, *(w.shape for w in weights))
        if key not in self._buffers:
            ranks = [branch.a.shape[0] for branch in group]
            stacked = weights[0].new_empty(sum(ranks), weights[0].shape[1], dtype=dtype)
            lora_b = [torch.empty_like(branch.b, dtype=dtype) for branch in group]
            self._buffers[key] = stacked, [*stacked.split(ranks), *lora_b]
        stacked, copies = self._buffers[key]
        torch._foreach_copy_(copies, [w.detach() for w in weights])
        return stacked, copies[len(group) :]

    def _find(self, a: Tensor) -> int:
        """Index of the layer whose lora_A this is. Saved tensors are the parameters themselves, at their address."""
        if a.data_ptr() not in self._index:
            self._index = {layer.a.data_ptr(): i for i, layer in enumerate(self._layers)}
        try:
            return self._index[a.data_ptr()]
        except KeyError:
            raise GRITError("a fused LoRA function used a weight that is in none of the model's LoRA layers") from None
