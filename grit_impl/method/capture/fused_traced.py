"""The backward of Unsloth's fused functions inside a compiled decoder layer.

Unsloth of 2026 compiles each decoder layer as one region: the functions' Python runs once, over tensors without
numbers, and becomes part of a graph of operators. So nothing can be noted there. Instead the products A x and B' dL/dy
are written down a second time, in the functions' own words, of which the compiler keeps one (it eliminates common
subexpressions), and handed to `grit::noted_fused`, which it cannot look into and which runs with the compiled code.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from grit_impl.method.capture.compiled import noted_fused

FIRST = 3
"""Place of the first A among a function's arguments: after x, W and W's quantisation."""


def traced(name: str, original: Any) -> Callable[..., Any]:
    """The backward (ctx, *dL/dy) of a fused function, for a compiler to trace.

    Args:
        name: `LoRA_MLP`, `LoRA_QKV` or `LoRA_W`.
        original: The function, a subclass of torch.autograd.Function.
    """
    # The plain function: Dynamo refuses a call of `original.backward`.
    backward = inspect.getattr_static(original, "backward").__func__
    replay = getattr(sys.modules.get(original.__module__), "_dropout_replay", None)

    def mlp(ctx: Any, dy: Tensor) -> Any:
        saved, (*weights, kernel) = ctx.saved_tensors, ctx.custom_saved_tensors
        adapters, x, masks = saved[:6], saved[6], saved[9:]
        found = []

        def element_wise(*arguments: Tensor) -> Any:
            # The only place where the gradients at the outputs of gate and up exist.
            h, d_up, d_gate = kernel(*arguments)
            inputs = [dropped(replay, each, masks, i, ctx) for i, each in enumerate((rows(x), rows(x), h))]
            # Down's B is the only one that the functions multiply by dL/dy twice.
            found.append(_products(adapters, inputs, (d_gate, d_up, rows(dy)), twice=2))
            return h, d_up, d_gate

        ctx.custom_saved_tensors = (*weights, element_wise)
        return _noted(ctx, backward(ctx, dy), adapters, found[0], weights[2::3])

    def linear(ctx: Any, dys: Sequence[Tensor], x: Tensor, adapters: Sequence[Any], masks: Sequence[Any]) -> Any:
        inputs = [dropped(replay, rows(x), masks, i, ctx) for i in range(len(dys))]
        products = _products(adapters, inputs, [rows(dy) for dy in dys])
        return _noted(ctx, backward(ctx, *dys), adapters, products, ctx.custom_saved_tensors[2::3])

    def qkv(ctx: Any, *dys: Tensor) -> Any:
        saved = ctx.saved_tensors
        return linear(ctx, dys, saved[0], saved[1:7], saved[7:])

    def w(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors
        return linear(ctx, (dy,), saved[2], saved[:2], saved[3:])

    functions: dict[str, Callable[..., Any]] = {"LoRA_MLP": mlp, "LoRA_QKV": qkv, "LoRA_W": w}
    return functions[name]


def dropped(replay: Any, x: Tensor, masks: Sequence[Tensor | None], i: int, ctx: Any) -> Tensor:
    """What the LoRA branch of place i saw: x after dropout, where this Unsloth fuses dropout.

    Args:
        replay: Unsloth's `_dropout_replay`.
        x: Its input.
        masks: Of the function's places; None or missing: no dropout.
        i: The place.
        ctx: The function's context.
    """
    mask = masks[i] if i < len(masks) else None
    if mask is None:
        return x
    p = ctx.dropout_p[i] if isinstance(ctx.dropout_p, tuple) else ctx.dropout_p
    # As rows, which is how the functions replay it: only what is written alike is common to two places.
    result: Tensor = replay(rows(x), rows(mask), p)
    return result


def _products(
    adapters: Sequence[Tensor], inputs: Sequence[Tensor], dys: Sequence[Tensor], twice: int | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A x' and dL/dy B of each place as the functions take them, and adapters in x's precision, for `operands`.

    Only what is written alike is common to two places, hence each adapter's two transpositions; and W.t().t() is
    simplified to W before the search for common subexpressions, unless W.t() has another reader. In the functions A.t()
    has one (dL/dx), and at one place, `twice`, B.t(); here it is a second W.t().t(), which ends up being the function's
    own copy of W: nothing is made for it.
    """
    a, g, operands = [], [], []
    for i, (lora_a, lora_b, x, dy) in enumerate(zip(adapters[::2], adapters[1::2], inputs, dys, strict=True)):
        at, bt = lora_a.to(x.dtype).t(), lora_b.to(x.dtype).t()
        a.append(at.t() @ rows(x).t())
        g.append(dy @ bt.t())
        operands += [at.t(), bt.t()] if i == twice else [at.t()]
    return a, g, operands


def _noted(
    ctx: Any,
    result: Any,
    adapters: Sequence[Tensor],
    products: tuple[list[Tensor], list[Tensor], list[Tensor]],
    scales: Sequence[float],
) -> Any:
    """The function's result, of which one adapter's gradient, the first that is needed, goes through the operator."""
    a, g, operands = products
    for at in range(FIRST, FIRST + 5 * len(a), 5):  # A; x's W, quantisation, A, B and s follow one another
        if ctx.needs_input_grad[at]:
            taken = [product.reshape(-1) for product in (*a, *g)]
            noted_fused(result[at], list(adapters[::2]), taken, [float(s) for s in scales], operands)
            break
    return result


def rows(x: Tensor) -> Tensor:
    """(..., d) as (n, d)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
