"""The products that a fused LoRA function takes of its adapters, noted while it takes them.

The backward of y = W0 x + s B A x multiplies A by x (for dB) and B' by dL/dy (for dA and dx): the very numbers that the
statistics are made of. The function is given an `Operand` in each adapter's place, a tensor that behaves as the adapter
does, and keeps the product when it is multiplied by x or dL/dy. So nothing has to be multiplied twice. What a version
of a library multiplies in another way is not noted, and `Products.complete` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


class Products:
    """What was noted in one call of a fused function.

    Args:
        adapters: A (r, d_in) and B (d_out, r) of its layers in turn; None where a layer has no adapter.

    Attributes:
        operands: To be given to the function in their place.
        complete: Whether a call noted all products; None: not tried yet.
        partners: Per adapter the address of x (A) or dL/dy (B), by which it will be multiplied; 0: not known yet.
        found: Per adapter A x' (r, tokens) or dL/dy B (tokens, r) of the current call; None: not noted yet.
    """

    def __init__(self, adapters: Sequence[Tensor | None]) -> None:
        self.operands = [None if w is None else _operand(w, i, self) for i, w in enumerate(adapters)]
        self.complete: bool | None = None
        self.partners: list[int] = []
        self.found: list[Any] = []
        self._nothing = [None] * len(adapters)
        self._there = [i for i, w in enumerate(adapters) if w is not None]

    def begin(self, masks: Sequence[Tensor | None], partners: list[int]) -> tuple[bool, bool]:
        """Start a call.

        Args:
            masks: Of dropout. Where there is one, the function makes the adapters' x inside.
            partners: As far as they are known; the rest can be set later.

        Returns:
            (noting, taking): whether to give the function the operands, and whether to take the products oneself.
        """
        self.partners, self.found = partners, self._nothing.copy()
        if self.complete is False:
            return False, True
        for mask in masks:
            if mask is not None:
                return False, True
        return True, self.complete is None

    def end(self) -> list[Any]:
        """What was found, all of it if `complete` says so."""
        found, self.found = self.found, self._nothing.copy()
        self.complete = all(found[i] is not None for i in self._there)
        return found


class _Turned(Tensor):
    """An operand's transpose. Functions keep it, and transpose it back to multiply: `t()` is then the operand again."""

    _operand: Operand

    # Nothing but `t` is different, and torch has nothing to ask.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def t(self) -> Tensor:
        """The operand, or the plain adapter when its product has been noted."""
        operand = self._operand
        return operand if operand._products.found[operand._slot] is None else operand._plain


class Operand(Tensor):
    """An adapter A (r, d_in) or B (d_out, r); everything but `A @ x.t()` and `dy @ B` is a plain tensor's."""

    _slot: int
    _products: Products
    _plain: Tensor
    _turned: _Turned
    _asked: tuple[torch.dtype]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Itself, where that is what it was asked for."""
        return self if args == self._asked and not kwargs else self._plain.to(*args, **kwargs)

    def t(self) -> Tensor:
        """The transpose, which knows where it comes from."""
        return self._turned

    def __matmul__(self, other: Any) -> Any:
        product, products, slot = self._plain @ other, self._products, self._slot
        if slot % 2 == 0 and products.found[slot] is None and other.data_ptr() == products.partners[slot]:
            products.found[slot] = product
        return product

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and not kwargs and type(args[1]) is Operand:
            factor, operand = args
            product, products, slot = func(factor, operand._plain), operand._products, operand._slot
            if slot % 2 == 1 and products.found[slot] is None and factor.data_ptr() == products.partners[slot]:
                products.found[slot] = product
            return product
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _operand(adapter: Tensor, slot: int, products: Products) -> Operand:
    operand = adapter.as_subclass(Operand)
    operand._slot, operand._products, operand._plain = slot, products, adapter
    operand._asked, operand._turned = (adapter.dtype,), adapter.t().as_subclass(_Turned)
    operand._turned._operand = operand
    return operand
