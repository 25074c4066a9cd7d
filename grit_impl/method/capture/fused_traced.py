"""The backward of fused LoRA functions inside a compiled layer.

Unsloth of 2026 compiles each decoder layer as one region: the functions' Python runs once, over tensors without
numbers, and becomes part of a graph of operators. So nothing can be noted there. Instead the products A x and B' dL/dy
are written down a second time, in the functions' own words, of which the compiler keeps one (it eliminates common
subexpressions), and handed to `grit::noted_fused`, which it cannot look into and which runs with the compiled code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from grit_impl.method.capture.compiled import noted_fused
from grit_impl.method.capture.sites import Dropout, FromKernel, Site, dropped, inputs_and_gradients, rows


def traced(site: Site, original: Any, dropout: Dropout | None) -> Callable[..., Any]:
    """The backward (ctx, *dL/dy) of a fused function, for a compiler to trace.

    Args:
        site: The function's.
        original: The function, a subclass of torch.autograd.Function.
        dropout: What `site.dropout` made.
    """
    # The plain function: Dynamo refuses a call of `original.backward`.
    backward = inspect.getattr_static(original, "backward").__func__
    places = site.adapters
    # Where x comes out of the kernel, dL/dx was computed to call it, from the same B' dL/dy.
    twice = [isinstance(at, FromKernel) for at in site.x]

    def in_graph(ctx: Any, *dys: Tensor) -> Any:
        saved, found = ctx.saved_tensors, []
        adapters, masks = [saved[i] for i in places], () if site.masks is None else saved[site.masks :]

        def write_down(returned: Any = ()) -> None:
            xs, gs = inputs_and_gradients(site, saved, dys, returned)
            inputs = [dropped(dropout, ctx, rows(x), masks, i) for i, x in enumerate(xs)]
            found.append(_products(adapters, inputs, [rows(g) for g in gs], twice))

        if site.kernel is None:
            write_down()
        else:
            attribute, place = site.kernel
            kept = list(getattr(ctx, attribute))
            kernel = kept[place]

            def element_wise(*arguments: Tensor) -> Any:
                returned = kernel(*arguments)
                write_down(returned)
                return returned

            kept[place] = element_wise
            setattr(ctx, attribute, tuple(kept))
        result = backward(ctx, *dys)
        a, g, operands = found[0]
        for at in site.arguments:  # one adapter's gradient, the first that is needed, goes through the operator
            if ctx.needs_input_grad[at]:
                taken = [product.reshape(-1) for product in (*a, *g)]
                noted_fused(result[at], list(adapters[::2]), taken, [float(s) for s in site.scales(ctx)], operands)
                break
        return result

    return in_graph


def _products(
    adapters: Sequence[Tensor], inputs: Sequence[Tensor], dys: Sequence[Tensor], twice: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A x' and dL/dy B of each layer, as the functions take them; and transposed adapters, which nothing reads.

    The compiler keeps one of two expressions only where they are written alike. The functions write A' as
    `A.to(dtype).t()`, and transpose it again to multiply: so it is done here. Before the compiler looks for common
    expressions, it takes away two transpositions in a row, unless something else reads the first one's result. In the
    functions something does: dL/dx is made with A', and where B' dL/dy is computed twice (`twice`), B' has two readers
    as well. Here the third list is that reader. It costs nothing: its tensors end up being the functions' own.
    """
    a, g, operands = [], [], []
    for i, (lora_a, lora_b, x, dy) in enumerate(zip(adapters[::2], adapters[1::2], inputs, dys, strict=True)):
        at, bt = lora_a.to(x.dtype).t(), lora_b.to(x.dtype).t()
        a.append(at.t() @ rows(x).t())
        g.append(dy @ bt.t())
        operands += [at.t(), bt.t()] if twice[i] else [at.t()]
    return a, g, operands
