"""Parameters of one kind and shape, handled as one tensor: few kernels, however many layers there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair

A, B = 0, 1
# Elements that are stacked at once where three temporaries are needed: 16 MiB each in float32.
LAYER_ELEMENTS = 1 << 22


class Stack:
    """Some parameters and their gradients; n of them.

    Args:
        side: A (0), B (1), or None for trained parameters that are no LoRA factors.
        members: (index of the layer, look-up of the parameter) each; peft may re-create parameters.
        group: Index of their parameter group.

    Attributes:
        layers: (n,) indices of the layers, on the device.
    """

    def __init__(self, side: int | None, members: Sequence[tuple[int, Callable[[], nn.Parameter]]], group: int) -> None:
        self.side, self.group = side, group
        self._members = [look_up for _, look_up in members]
        first = self._members[0]()
        self.shape = (len(members), *first.shape)
        self.rank = 0 if side is None else first.shape[side]
        self.layers = torch.tensor([i for i, _ in members], device=first.device)
        self.dtype = torch.promote_types(torch.float32, first.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in order."""
        return [look_up() for look_up in self._members]

    def zeros(self) -> Tensor:
        """(n, *shape) in float32 or better."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.layers.device)

    def values(self) -> Tensor:
        """(n, *shape) copies of the parameters."""
        return torch.stack([p.detach() for p in self.parameters()]).to(self.dtype)

    def gradients(self) -> Tensor | None:
        """(n, *shape) copies; a missing one counts as zero. None: all are missing."""
        parameters = self.parameters()
        if all(p.grad is None for p in parameters):
            return None
        return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]).to(self.dtype)

    def there(self) -> Tensor | None:
        """(n,): 1 where there is a gradient, 0 where there is none; None: all have one. Nothing waits for a device."""
        parameters = self.parameters()
        found = [p.grad is not None for p in parameters]
        if all(found):
            return None
        there = torch.zeros(len(found), dtype=self.dtype, device=self.layers.device)
        if any(found):
            torch._foreach_add_([one for one, has in zip(there.unbind(), found, strict=True) if has], 1.0)
        return there

    def each(self, x: Tensor) -> Tensor:
        """(n,) numbers, shaped so that each meets its own parameter."""
        return x.view(-1, *(1,) * (len(self.shape) - 1))

    def write(self, directions: Tensor) -> None:
        """Put the directions (n, *shape) where the gradients were; nothing where there is none."""
        torch._foreach_copy_(*self._there(directions))

    def add(self, values: Tensor) -> None:
        """Add (n, *shape) values to the gradients."""
        grads, there = self._there(values)
        if grads:
            torch._foreach_add_(grads, [x.to(g.dtype) for g, x in zip(grads, there, strict=True)])

    def scale(self, factors: Tensor) -> None:
        """Multiply the gradients by (n,) factors."""
        grads, there = self._there(factors)
        if grads:
            torch._foreach_mul_(grads, [f.to(g.dtype) for g, f in zip(grads, there, strict=True)])

    def _there(self, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that there are, and what belongs to each."""
        pairs = [(p.grad, v) for p, v in zip(self.parameters(), values.unbind(), strict=True) if p.grad is not None]
        return [g for g, _ in pairs], [v for _, v in pairs]

    def of(self, matrices: Tensor) -> Tensor:
        """(n, r, r): of (L, r_max, r_max) matrices, one per layer, those of these layers."""
        return matrices[self.layers, : self.rank, : self.rank]

    def gram(self, x: Tensor) -> Tensor:
        """x x' for A, x' x for B: (n, *shape) -> (n, r, r)."""
        return x @ x.mT if self.side == A else x.mT @ x

    def put(self, matrices: Tensor, values: Tensor) -> None:
        """Write (n, r, r) values into (2, L, r_max, r_max) matrices, at this side and these layers."""
        matrices[self.side, self.layers, : self.rank, : self.rank] = values

    def multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """matrix x for A, x matrix for B: (n, *shape) times (n, r, r) on the r-side."""
        return matrix @ x if self.side == A else x @ matrix

    def turn(self, x: Tensor, matrix: Tensor) -> Tensor:
        """matrix' x for A, x matrix for B: the r-side of (n, *shape) in the coordinates of the columns of (n, r, r)."""
        return self.multiply(x, matrix.mT if self.side == A else matrix)


def make_stacks(
    layers: Sequence[LoRAFactorPair], groups: Sequence[dict[str, Any]], elements: int, paired: bool = False
) -> list[Stack]:
    """Stacks of all parameters in an optimizer's groups; what is no LoRA factor has a stack of its own.

    Args:
        layers: The manager's layers, in order.
        groups: An optimizer's `param_groups`.
        elements: How many a stack may have, unless one parameter alone has more.
        paired: The layers' other factors have one shape in a stack, too.
    """
    places: dict[int, tuple[int, int]] = {}
    for i, layer in enumerate(layers):
        places[id(layer.a)], places[id(layer.b)] = (A, i), (B, i)
    alike: dict[Any, list[tuple[int, Callable[[], nn.Parameter]]]] = defaultdict(list)
    for g, group in enumerate(groups):
        for p in group["params"]:
            side, i = places.get(id(p), (None, -1))
            key: Any = (g, None, id(p)) if side is None else (g, side, p.shape, p.dtype)
            if paired and side is not None:
                key += ((layers[i].b if side == A else layers[i].a).shape,)
            alike[key].append((i, _look_up(layers, side, i, p)))
    stacks = []
    for (g, side, *_), members in alike.items():
        most = max(1, elements // members[0][1]().numel())
        stacks += [Stack(side, members[i : i + most], g) for i in range(0, len(members), most)]
    return stacks


def layer_stacks(layers: Sequence[LoRAFactorPair]) -> list[Stack]:
    """Stacks of all A and B."""
    return make_stacks(layers, [{"params": [p for layer in layers for p in (layer.a, layer.b)]}], LAYER_ELEMENTS)


def _look_up(
    layers: Sequence[LoRAFactorPair], side: int | None, i: int, parameter: nn.Parameter
) -> Callable[[], nn.Parameter]:
    if side is None:
        return lambda: parameter
    return (lambda: layers[i].a) if side == A else (lambda: layers[i].b)
