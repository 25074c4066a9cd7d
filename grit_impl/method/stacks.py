"""Gradients of all layers, those of one shape handled as one tensor: few kernels, however many layers there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair

# Elements that are stacked at once: temporaries of 16 MiB in float32, of which there are three.
CHUNK = 1 << 22


class _Stack(NamedTuple):
    side: int  # 0: A, 1: B
    rank: int
    layers: list[int]
    indices: Tensor  # the same, on the device


class GradientStacks:
    """Multiplies the gradients of A from the left and those of B from the right, each layer by its own r x r matrix.

    Args:
        layers: The manager's layers, in order.
    """

    def __init__(self, layers: Sequence[LoRAFactorPair]) -> None:
        self._layers = layers
        groups: dict[tuple[int, torch.Size], list[int]] = {}
        for i, layer in enumerate(layers):
            groups.setdefault((0, layer.a.shape), []).append(i)
            groups.setdefault((1, layer.b.shape), []).append(i)
        self._stacks = []
        for (side, shape), members in groups.items():
            size = max(1, CHUNK // shape.numel())
            for start in range(0, len(members), size):
                part = members[start : start + size]
                self._stacks.append(_Stack(side, shape[side], part, torch.tensor(part, device=layers[0].a.device)))

    def multiply(self, left: Tensor, right: Tensor, *, keep_norm: bool) -> bool:
        """dA <- left dA and dB <- dB right, in place.

        Args:
            left: (L, r, r) for A.
            right: (L, r, r) for B.
            keep_norm: Scale every result to the norm of what it was made of; a gradient of zero stays zero.

        Returns:
            Whether there was any gradient.
        """
        found = False
        for stack, parameters in self._with_gradients():
            found = True
            # A missing gradient counts as zero, and nothing is written for it.
            raw = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]).to(left.dtype)
            new = _product(stack, left, right, raw)
            if keep_norm:
                size = torch.linalg.vector_norm(new, dim=(1, 2), keepdim=True)
                new *= torch.where(size > 0, torch.linalg.vector_norm(raw, dim=(1, 2), keepdim=True) / size, 0.0)
            pairs = [(p.grad, x) for p, x in zip(parameters, new.unbind(), strict=True) if p.grad is not None]
            torch._foreach_copy_([g for g, _ in pairs], [x for _, x in pairs])
        return found

    def add(self, left: Tensor, right: Tensor) -> None:
        """dA <- dA + left A and dB <- dB + B right, in place; shapes as in `multiply`."""
        for stack, parameters in self._with_gradients():
            new = _product(stack, left, right, torch.stack([p.detach() for p in parameters]).to(left.dtype))
            pairs = [(p.grad, x.to(p.grad.dtype)) for p, x in zip(parameters, new, strict=True) if p.grad is not None]
            torch._foreach_add_([g for g, _ in pairs], [x for _, x in pairs])

    def _with_gradients(self) -> Iterator[tuple[_Stack, list[nn.Parameter]]]:
        for stack in self._stacks:
            # Looked up each time: peft may re-create parameters.
            parameters = [self._layers[i].b if stack.side else self._layers[i].a for i in stack.layers]
            if any(p.grad is not None for p in parameters):
                yield stack, parameters


def _product(stack: _Stack, left: Tensor, right: Tensor, values: Tensor) -> Tensor:
    matrices = (right if stack.side else left)[stack.indices, : stack.rank, : stack.rank]
    return values @ matrices if stack.side else matrices @ values
