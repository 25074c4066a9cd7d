"""Statistics from inside fused LoRA functions, with every fused kernel left on.

`FusedTap` puts subclasses in the place of the functions that `sites.py` describes. Their backward runs the original and
reads the products that it takes of x, dL/dy and the adapters, so that each token is counted once, where its gradient
is, whatever gradient checkpointing does to the forward. In a compiled layer the subclasses' backward is traced and not
run: see fused_traced.py.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from grit_impl.errors import GRITError
from grit_impl.method.capture import compiled
from grit_impl.method.capture.fused_traced import traced
from grit_impl.method.capture.modules import LossTap
from grit_impl.method.capture.products import Products
from grit_impl.method.capture.rank_statistics import RankStatistics
from grit_impl.method.capture.sites import Dropout, FromKernel, Site, dropped, inputs_and_gradients, rows

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair


class _Prepared(NamedTuple):
    """What is the same at every call of one fused function.

    Attributes:
        cast: Copies of A and B in turn; None where there is none.
        copies: Those that there are.
        layers: (place in the function, index of the layer) each.
        products: What becomes of the copies in the function.
    """

    cast: list[Any]
    copies: list[Tensor]
    layers: list[tuple[int, int]]
    products: Products


class _StandIn:
    """A function's context with some attributes replaced.

    The real one is left alone, because it is part of a reference cycle: what is stored in it, and the activations that
    hang on it, would live until the garbage collector runs.
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
        tried: A function was called for the first time since this was reset: what counted of it are products that were
            computed here, not those that it will be read by.
    """

    def __init__(self, layers: Sequence[LoRAFactorPair]) -> None:
        self._layers = layers
        self._addresses: list[int] = []
        self.tried = False
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts anew: operands are tied to the adapters that they stand for.
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
            self._prepared: dict[Any, _Prepared] = {}
            self._functions: dict[Any, list[int]] = {}

    def cast(self, adapters: Sequence[Tensor | None], dtype: torch.dtype) -> _Prepared:
        """Copy A and B of a function's layers, given in turn, in x's precision.

        A function casts its adapters one by one, and takes one that has x's precision as it is. Here one call casts
        all of them, because it is the host's time that this costs, into buffers that blocks of one shape share.
        Gradients are off, as they are in a backward without `create_graph`, which fused functions do not support.
        """
        there = [w for w in adapters if w is not None]
        key = (dtype, *[0 if a is None else a.data_ptr() for a in adapters[::2]])
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = self._prepare(adapters, dtype)
        if there:
            torch._foreach_copy_(prepared.copies, there)
        return prepared

    def _prepare(self, adapters: Sequence[Tensor | None], dtype: torch.dtype) -> _Prepared:
        key = (dtype, *(None if w is None else w.shape for w in adapters))
        if key not in self._buffers:
            self._buffers[key] = [None if w is None else torch.empty_like(w, dtype=dtype) for w in adapters]
        cast = self._buffers[key]
        layers = [(i, self.find(a)) for i, a in enumerate(adapters[::2]) if a is not None]
        return _Prepared(cast, [w for w in cast if w is not None], layers, Products(cast))

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

    Both are noted as the function multiplies (`Products`). At its first call they are computed here, to count, and
    noted to see whether every one can be. Where one cannot, or where dropout gives the adapters another x, they are
    computed here at every call.

    Args:
        adapters: Of the manager's layers.
        statistics: Where the sums go.
        loss: Knows the tokens of the current forward pass.
        sites: The functions, of modules that are loaded.
    """

    def __init__(
        self, adapters: FusedAdapters, statistics: RankStatistics, loss: LossTap, sites: Sequence[Site]
    ) -> None:
        self._adapters, self._statistics, self._loss = adapters, statistics, loss
        self._functions = {(sys.modules[site.module], site.name) for site in sites}
        for site in sites:
            module = sys.modules[site.module]
            setattr(module, site.name, _instrumented(site, getattr(module, site.name)))
        compiled.fused_taps.append(self)

    def remove(self) -> None:
        """Put the original functions back, once nobody else reads them."""
        compiled.fused_taps.remove(self)
        for module, name in self._functions.difference(*(tap._functions for tap in compiled.fused_taps)):
            function = getattr(module, name)
            setattr(module, name, vars(function).get("_grit_original", function))

    def owns(self, lora_a: Tensor) -> bool:
        """Whether this is an adapter of the manager's."""
        return self._adapters.owns(lora_a)

    def note(self, lora_a: list[Tensor], products: list[Tensor], scales: list[float]) -> bool:
        """Add a copy of what compiled code has computed; False: these layers are somebody else's.

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

    def read(
        self, site: Site, original: Any, dropout: Dropout | None, ctx: Any, saved: Sequence[Any], dys: Sequence[Tensor]
    ) -> Any:
        """Run a function's backward, take its statistics and return what it returns."""
        given, dys = list(saved), [_contiguous(dy) for dy in dys]
        for at in site.x:
            if not isinstance(at, FromKernel):
                given[at] = _contiguous(given[at])
        xs, gs = inputs_and_gradients(site, given, dys)
        prepared = self._adapters.cast([given[i] for i in site.adapters], next(x for x in xs if x is not None).dtype)
        scales, masks = site.scales(ctx), () if site.masks is None else given[site.masks :]
        products = prepared.products
        noting, taking = products.begin(masks, _addresses(xs, gs))

        def take(xs: Sequence[Tensor], gs: Sequence[Tensor]) -> None:
            if taking:
                self._take(prepared, scales, [dropped(dropout, ctx, x, masks, i) for i, x in enumerate(xs)], gs)

        replaced: dict[str, Any] = {}
        if site.kernel is None:
            take(xs, gs)
        else:
            attribute, place = site.kernel
            kept, known = list(getattr(ctx, attribute)), tuple(given)
            kernel = kept[place]

            def element_wise(*arguments: Tensor) -> Any:
                # The only place where some x and dL/dy exist.
                returned = kernel(*arguments)
                xs, gs = inputs_and_gradients(site, known, dys, returned)
                take(xs, gs)
                products.partners = _addresses(xs, gs)
                return returned

            kept[place] = element_wise
            replaced[attribute] = tuple(kept)
        for i, adapter in zip(site.adapters, products.operands if noting else prepared.cast, strict=True):
            given[i] = adapter
        result = original.backward(_StandIn(ctx, saved_tensors=tuple(given), **replaced), *dys)
        if noting:
            self._add_noted(prepared, scales)
        return result

    def _wanted(self) -> bool:
        return self._loss.context is not None and self._statistics.collecting

    def _add_noted(self, prepared: _Prepared, scales: Sequence[Any]) -> None:
        """Count the products that the function has noted; after its first call, only see whether all were."""
        products, context = prepared.products, self._loss.context
        assert context is not None
        tried, found = products.complete is not None, products.end()
        if not tried:
            self._adapters.tried = True
            return
        if not products.complete:
            raise GRITError("a fused LoRA function took other products in this backward than before: please report it")
        for i, layer in prepared.layers:
            if scales[i] != 1:  # in place, for the function does not need them any more
                found[2 * i + 1] *= scales[i]
            self._statistics.add(layer, found[2 * i], found[2 * i + 1], context, turned=True)

    def _take(
        self, prepared: _Prepared, scales: Sequence[Any], inputs: Sequence[Tensor], dys: Sequence[Tensor]
    ) -> None:
        """Compute a = A x and g = s B' dL/dy of a function's layers; those that read the same x share one product."""
        context = self._loss.context
        assert context is not None
        for _, group in itertools.groupby(prepared.layers, lambda pair: id(inputs[pair[0]])):
            same = list(group)
            lora_a = [prepared.cast[2 * i] for i, _ in same]
            products = torch.mm(rows(inputs[same[0][0]]), torch.cat(lora_a).t())
            values = products.split_with_sizes([len(a) for a in lora_a], 1)
            for (i, layer), value in zip(same, values, strict=True):
                lora_b = prepared.cast[2 * i + 1]
                gradient = torch.mm(rows(dys[i]).to(lora_b.dtype), lora_b)
                if scales[i] != 1:
                    gradient *= scales[i]
                self._statistics.add(layer, value, gradient, context)


@functools.cache
def _instrumented(site: Site, original: Any) -> Any:
    """A subclass whose backward is read; one for each function, so that compiled code is not compiled anew."""
    if "_grit_original" in vars(original):
        return original
    dropout = site.dropout(sys.modules[site.module]) if site.dropout else None
    in_graph = traced(site, original, dropout)

    def backward(ctx: Any, *dys: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return in_graph(ctx, *dys)
        if not any(tap._wanted() for tap in compiled.fused_taps):
            return original.backward(ctx, *dys)
        saved = ctx.saved_tensors  # once: checkpointing that is not reentrant gives them once
        tap = compiled.fused_tap([saved[i] for i in site.a])
        if tap is None or not tap._wanted():
            return original.backward(_StandIn(ctx, saved_tensors=saved), *dys)
        return tap.read(site, original, dropout, ctx, saved, dys)

    return type(site.name, (original,), {"backward": staticmethod(backward), "_grit_original": original})


def _addresses(xs: Sequence[Tensor | None], gs: Sequence[Tensor | None]) -> list[int]:
    """Of x and dL/dy of each layer in turn; 0: not known yet."""
    return [0 if t is None else t.data_ptr() for pair in zip(xs, gs, strict=True) for t in pair]


def _contiguous(x: Tensor) -> Tensor:
    """x itself where its rows are one matrix; else a copy as the function would make it, at a known address."""
    if x.is_contiguous():
        return x
    flat = rows(x)
    return x if flat.data_ptr() == x.data_ptr() else flat.view(x.shape)
