"""Statistics from inside Unsloth's fused LoRA functions, with every fused kernel left on.

Unsloth's `LoRA_MLP`, `LoRA_QKV` and `LoRA_W` (unsloth/kernels/fast_lora.py) take the LoRA weights as tensors and never
call the `lora_A` and `lora_B` modules, so module hooks see nothing. Their backward functions hold everything that the
statistics need: the input X, the adapters, and dL/dy. `FusedTap` puts subclasses in their place whose backward runs
the original and reads the products that it takes of these, so that each token is counted once, where its gradient is,
whatever gradient checkpointing does to the forward. Read in unsloth 2025.10.9 and 2026.10.9, which look the functions
up by name at call time; both save A, B (gate, up, down or q, k, v) and X in the order used here. In a compiled decoder
layer, which 2026.10.9 makes, the subclasses' backward is traced and not run: see fused_traced.py.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from grit_impl.errors import GRITError
from grit_impl.method.capture import compiled
from grit_impl.method.capture.fused_traced import dropped, rows, traced
from grit_impl.method.capture.modules import LossTap
from grit_impl.method.capture.products import Products
from grit_impl.method.capture.rank_statistics import RankStatistics

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair

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
    return module


class _Group(NamedTuple):
    """Layers of one fused function with one d_in: their places in it, their indices, ranks, and A' side by side."""

    places: list[int]
    layers: list[int]
    ranks: list[int]
    lora_a: Tensor


class _Plan(NamedTuple):
    """What is the same at every call of one fused function.

    Attributes:
        cast: Copies of A and B in turn; None where there is none.
        copies: Those that there are.
        groups: Layers with one d_in.
        layers: (place in the function, index of the layer) each.
        products: What becomes of the copies in the function.
    """

    cast: list[Any]
    copies: list[Tensor]
    groups: list[_Group]
    layers: list[tuple[int, int]]
    products: Products


class _StandIn:
    """A function's context with some attributes replaced.

    The real one is left alone: what it is given lives until the garbage collector runs, activations included.
    """

    def __init__(self, ctx: Any, **replaced: Any) -> None:
        self._ctx = ctx
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class FusedAdapters:
    """Which layers the fused functions' tensors belong to, and copies of the adapters in the precision of the inputs.

    What was found out is kept while the adapters stay where they are: hooks may come and go.

    Args:
        layers: The manager's layers, in order.

    Attributes:
        tried: A function was called for the first time since somebody last looked: its products were taken twice.
    """

    def __init__(self, layers: Sequence[LoRAFactorPair]) -> None:
        self._layers = layers
        self._addresses: list[int] = []
        self.tried = False
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds out anew: operands are tied to the adapters that they stand for.
        return {"_layers": self._layers, "_addresses": [], "tried": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.refresh()

    def refresh(self) -> None:
        """Forget everything if an adapter has moved."""
        addresses = [layer.a.data_ptr() for layer in self._layers]
        if addresses != self._addresses:
            self._addresses = addresses
            self._index = {address: i for i, address in enumerate(addresses)}
            self._buffers: dict[Any, list[Any]] = {}
            self._plans: dict[Any, _Plan] = {}
            self._functions: dict[Any, list[int]] = {}

    def cast(self, adapters: Sequence[Tensor | None], dtype: torch.dtype) -> _Plan:
        """Copy A and B of a function's layers, given in turn, in x's precision.

        The original casts each of them on its own; what it is given here it takes as it is. One call fills buffers
        that blocks of one shape share: the host's time, not the device's, is what this costs. For a backward pass
        without `create_graph`, where gradients are off; Unsloth's functions have no other.
        """
        there = [w for w in adapters if w is not None]
        key = (dtype, *[0 if a is None else a.data_ptr() for a in adapters[::2]])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(adapters, dtype)
        if there:
            torch._foreach_copy_(plan.copies, there)
        return plan

    def _plan(self, adapters: Sequence[Tensor | None], dtype: torch.dtype) -> _Plan:
        key = (dtype, *(None if w is None else w.shape for w in adapters))
        places = [i for i in range(len(adapters) // 2) if adapters[2 * i] is not None]
        same = [list(group) for _, group in itertools.groupby(places, lambda i: _width(adapters[2 * i]))]
        if key not in self._buffers:
            buffers: list[Any] = [None if w is None else torch.empty_like(w, dtype=dtype) for w in adapters]
            for group in same:
                # Layers of one d_in lie one below the other, so that together they are one matrix.
                ranks = [buffers[2 * i].shape[0] for i in group]
                stacked = buffers[2 * group[0]].new_empty(sum(ranks), buffers[2 * group[0]].shape[1])
                for i, part in zip(group, torch.split(stacked, ranks), strict=True):
                    buffers[2 * i] = part
            self._buffers[key] = buffers
        cast = self._buffers[key]
        groups = []
        for group in same:
            first, ranks = cast[2 * group[0]], [cast[2 * i].shape[0] for i in group]
            lora_a = first.as_strided((sum(ranks), first.shape[1]), first.stride()).t()
            groups.append(_Group(group, [self.find(adapters[2 * i]) for i in group], ranks, lora_a))
        layers = [pair for group in groups for pair in zip(group.places, group.layers, strict=True)]
        return _Plan(cast, [w for w in cast if w is not None], groups, layers, Products(cast))

    def owns(self, a: Tensor) -> bool:
        """Whether this is one of the layers' lora_A."""
        if a.data_ptr() not in self._index:
            self.refresh()
        return a.data_ptr() in self._index

    def layers(self, lora_a: Sequence[Tensor]) -> list[int] | None:
        """Indices of one function's layers; None where none of them is among the manager's."""
        key = tuple([a.data_ptr() for a in lora_a])
        found = self._functions.get(key)
        if found is None and any(map(self.owns, lora_a)):
            found = self._functions[key] = [self.find(a) for a in lora_a]
        return found

    def find(self, a: Tensor | None) -> int:
        """Index of the layer whose lora_A this is. Saved tensors are the parameters themselves, at their address."""
        if a is None or not self.owns(a):
            raise GRITError("a fused LoRA function used a weight that is in none of the model's LoRA layers")
        return self._index[a.data_ptr()]


class FusedTap:
    """Reads a = A x and g = s B' dL/dy in the backward of the fused functions.

    Both are noted as the function multiplies. Its first call takes them here as well, and shows whether that works;
    where it does not, and where dropout gives the adapters another x, they go on being taken here.

    Args:
        adapters: Of the manager's layers.
        statistics: Where the sums go.
        loss: Knows the tokens of the current forward pass.
        module: `unsloth.kernels.fast_lora`.
    """

    def __init__(self, adapters: FusedAdapters, statistics: RankStatistics, loss: LossTap, module: Any) -> None:
        self._adapters, self._statistics, self._loss, self._module = adapters, statistics, loss, module
        for name in FUNCTIONS:
            setattr(module, name, _instrumented(name, getattr(module, name)))
        compiled.fused_taps.append(self)

    def remove(self) -> None:
        """Put the original functions back, once nobody else reads them."""
        compiled.fused_taps.remove(self)
        if any(tap._module is self._module for tap in compiled.fused_taps):
            return
        for name in FUNCTIONS:
            function = getattr(self._module, name)
            setattr(self._module, name, vars(function).get("_grit_original", function))

    def owns(self, lora_a: Tensor) -> bool:
        """Whether this is an adapter of the manager's."""
        return self._adapters.owns(lora_a)

    def note(self, lora_a: list[Tensor], products: list[Tensor], scales: list[float]) -> bool:
        """Add what compiled code has taken, in memory that it will use again; False: these layers are somebody else's.

        Args:
            lora_a: The layers' parameters A.
            products: A x' (r, tokens) of each, then dL/dy B (tokens, r) of each, as one row.
            scales: Of each, not applied yet.
        """
        context = self._loss.context
        if context is None or not self._statistics.collecting:
            return any(map(self.owns, lora_a))
        layers = self._adapters.layers(lora_a)
        if layers is None:
            return False
        n = len(layers)
        alike = len({product.numel() for product in products}) == 1
        for each in [slice(0, n)] if alike else [slice(i, i + 1) for i in range(n)]:
            values = torch.stack(products[each] + products[n:][each]).view(2, each.stop - each.start, -1)
            if len(set(scales[each])) > 1:
                for gradient, scale in zip(values[1], scales, strict=True):
                    gradient.mul_(scale)
            elif scales[each.start] != 1:
                values[1].mul_(scales[each.start])
            self._statistics.add_together(layers[each], values, lora_a[each.start].shape[0], context)
        return True

    def _mlp(self, original: Any, ctx: Any, saved: Sequence[Any], dy: Tensor) -> Any:
        adapters, rest = saved[:6], saved[6:]
        x, masks = rest[0], rest[3:]
        *weights, kernel = ctx.custom_saved_tensors
        plan, dy = self._adapters.cast(adapters, x.dtype), _contiguous(dy)
        products, scales = plan.products, weights[2::3]
        # Gate, up and down: x (A) and dL/dy (B) of each.
        noting, taking = products.begin(masks, [x.data_ptr(), 0, x.data_ptr(), 0, 0, dy.data_ptr()])
        if taking:
            gate_x, up_x = self._dropped(x, masks, 0, ctx), self._dropped(x, masks, 1, ctx)

        def element_wise(*arguments: Tensor) -> Any:
            # The only place where the gradients at the outputs of gate and up exist.
            h, d_up, d_gate = kernel(*arguments)
            if taking:
                down_x = self._dropped(h, masks, 2, ctx)
                self._take(plan, scales, (gate_x, up_x, down_x), (d_gate, d_up, dy))
            products.factors[1:5] = d_gate.data_ptr(), x.data_ptr(), d_up.data_ptr(), h.data_ptr()
            return h, d_up, d_gate

        operands = products.operands if noting else plan.cast
        stand_in = _StandIn(ctx, saved_tensors=(*operands, *rest), custom_saved_tensors=(*weights, element_wise))
        result = original.backward(stand_in, dy)
        if noting:
            self._add_noted(plan, scales)
        return result

    def _qkv(self, original: Any, ctx: Any, saved: Sequence[Any], *dys: Tensor) -> Any:
        x, adapters, masks = saved[0], saved[1:7], saved[7:]
        return self._linear(original, ctx, (x,) * len(dys), adapters, masks, dys, lambda w: (x, *w, *masks))

    def _w(self, original: Any, ctx: Any, saved: Sequence[Any], dy: Tensor) -> Any:
        adapters, x, masks = saved[:2], _contiguous(saved[2]), saved[3:]
        return self._linear(original, ctx, (x,), adapters, masks, (dy,), lambda w: (*w, x, *masks))

    def _linear(
        self,
        original: Any,
        ctx: Any,
        xs: Sequence[Tensor],
        adapters: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
        dys: Sequence[Tensor],
        arranged: Callable[[Sequence[Any]], tuple[Any, ...]],
    ) -> Any:
        """A function whose x and dL/dy are known before it runs; `arranged` puts adapters into what it saved."""
        plan, dys = self._adapters.cast(adapters, xs[0].dtype), [_contiguous(dy) for dy in dys]
        products, scales = plan.products, ctx.custom_saved_tensors[2::3]
        noting, taking = products.begin(masks, [w.data_ptr() for pair in zip(xs, dys, strict=True) for w in pair])
        if taking:
            self._take(plan, scales, [self._dropped(x, masks, i, ctx) for i, x in enumerate(xs)], dys)
        stand_in = _StandIn(ctx, saved_tensors=arranged(products.operands if noting else plan.cast))
        result = original.backward(stand_in, *dys)
        if noting:
            self._add_noted(plan, scales)
        return result

    def _wanted(self) -> bool:
        return self._loss.context is not None and self._statistics.collecting

    def _dropped(self, x: Tensor, masks: Sequence[Tensor | None], i: int, ctx: Any) -> Tensor:
        """What the LoRA branch saw: x after dropout, where this Unsloth fuses dropout."""
        return dropped(vars(self._module).get("_dropout_replay"), x, masks, i, ctx)

    def _add_noted(self, plan: _Plan, scales: Sequence[Any]) -> None:
        """Use the products that the function has taken; after its first call, see whether all were noted."""
        products, context = plan.products, self._loss.context
        assert context is not None
        tried, found = products.complete is not None, products.end()
        if not tried:
            self._adapters.tried = True
            return
        if not products.complete:
            raise GRITError("a fused LoRA function took other products in this backward than before: please report it")
        for i, layer in plan.layers:
            if scales[i] != 1:  # the function is done with them
                found[2 * i + 1] *= scales[i]
            self._statistics.add(layer, found[2 * i], found[2 * i + 1], context, turned=True)

    def _take(self, plan: _Plan, scales: Sequence[Any], inputs: Sequence[Tensor], dys: Sequence[Tensor]) -> None:
        """Take a = A x and g = s B' dL/dy of a function's layers; those that read the same x share one product."""
        context = self._loss.context
        assert context is not None
        for group in plan.groups:
            x = inputs[group.places[0]]
            if all(inputs[i] is x for i in group.places[1:]):
                values = torch.mm(rows(x), group.lora_a).split_with_sizes(group.ranks, 1)
            else:
                values = tuple(torch.mm(rows(inputs[i]), plan.cast[2 * i].t()) for i in group.places)
            for i, layer, value in zip(group.places, group.layers, values, strict=True):
                lora_b, dy = plan.cast[2 * i + 1], rows(dys[i])
                if dy.dtype != lora_b.dtype:
                    dy = dy.to(lora_b.dtype)
                gradient = torch.mm(dy, lora_b)
                if scales[i] != 1:
                    gradient *= scales[i]
                self._statistics.add(layer, value, gradient, context)


_READERS: dict[str, Callable[..., Any]] = {
    "LoRA_MLP": FusedTap._mlp,
    "LoRA_QKV": FusedTap._qkv,
    "LoRA_W": FusedTap._w,
}
_PLACES = {"LoRA_MLP": slice(0, 6, 2), "LoRA_QKV": slice(1, 7, 2), "LoRA_W": slice(0, 2, 2)}
"""Where each function saves its layers' A."""


@functools.cache
def _instrumented(name: str, original: Any) -> Any:
    """A subclass whose backward is read; one for each function, so that compiled code is not compiled anew."""
    if "_grit_original" in vars(original):
        return original
    in_graph = traced(name, original)

    def backward(ctx: Any, *dys: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return in_graph(ctx, *dys)
        if not any(tap._wanted() for tap in compiled.fused_taps):
            return original.backward(ctx, *dys)
        saved = ctx.saved_tensors  # once: checkpointing that is not reentrant gives them once
        tap = compiled.fused_tap(saved[_PLACES[name]])
        if tap is None or not tap._wanted():
            return original.backward(_StandIn(ctx, saved_tensors=saved), *dys)
        return _READERS[name](tap, original, ctx, saved, *dys)

    return type(name, (original,), {"backward": staticmethod(backward), "_grit_original": original})


def _width(a: Tensor | None) -> int:
    return 0 if a is None else a.shape[1]


def _contiguous(x: Tensor) -> Tensor:
    """x where its rows are one matrix, else the copy that the function would make, so that it multiplies by ours."""
    if x.is_contiguous():
        return x
    flat = rows(x)
    return x if flat.data_ptr() == x.data_ptr() else flat.view(x.shape)
