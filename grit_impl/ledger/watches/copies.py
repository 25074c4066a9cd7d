"""Gradients with respect to copies of the parameters, as functional calls take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

_functorch: Any = torch._C._functorch


class CopyWatch:
    """Which tensors stand for the parameters in a functional call, and whether they follow them.

    Attributes:
        why: Position -> why the parameter takes no part in the forward pass: what stands for it stays as it is.
        fresh: They had the parameters' values; otherwise, as after inner steps, they are no further micro-batch.
    """

    def __init__(self) -> None:
        self.why: dict[int, str] = {}
        self.fresh = True
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def returned(self, pairs: Sequence[tuple[Tensor, Tensor]], parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
        """Position -> gradient, where one was asked for all parameters' memory, or for tensors of their shapes.

        Args:
            pairs: Tensors and the gradients with respect to them.
            parameters: The model's.
        """
        memory = {(p.data_ptr(), p.shape): i for i, p in enumerate(parameters)}
        places = [memory.get((x.data_ptr(), x.shape), -1) for x, _ in pairs]
        if max(places, default=-1) < 0:
            places = [i for i, p in enumerate(parameters) if p.requires_grad]
            if [x.shape for x, _ in pairs] != [parameters[i].shape for i in places]:
                return {}
        found = {i: g for i, (x, g) in zip(places, pairs, strict=True) if i >= 0 and g.shape == x.shape}
        self.why, self.fresh = {}, True
        for i, (x, _) in zip(places, pairs, strict=True):
            if i in found:
                p, same = parameters[i].detach(), self._before.get(i)
                current = torch.equal(x, p)
                self.fresh = self.fresh and current
                if same is not None and torch.equal(same[0], x) and not (torch.equal(same[1], p) or current):
                    self.why[i] = "a copy of it does, which stays as it was"
                self._before[i] = x.detach().clone(), p.clone()
        return found


def wrapped(x: Tensor) -> bool:
    """Whether it belongs to a function transform."""
    return bool(_functorch.is_functorch_wrapped_tensor(x))


def traced(x: Any) -> bool:
    """Whether a compiler asked for it, to write down the operations of a backward pass: it has no memory."""
    return isinstance(x, Tensor) and is_fake(x)


def plain(x: Any) -> Any:
    """What a function transform has wrapped."""
    while isinstance(x, Tensor) and wrapped(x):
        x = _functorch.get_unwrapped(x)
    return x
