"""Optimizers of the fault zoo: two that misbehave, one from outside torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class KeepsGradients(torch.optim.Optimizer):
    """Wraps an optimizer and gives it the gradients as they were after backward."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.kept: dict[Tensor, Tensor] = {}
        self.param_groups, self.state = inner.param_groups, inner.state

    def watch(self) -> None:
        """Keep gradients from now on."""
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(lambda p: self.kept.__setitem__(p, p.grad.clone()))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Restore, then step."""
        for p, grad in self.kept.items():
            if p.grad is not None:
                p.grad.copy_(grad)
        self.inner.step()


class BufferSGD(torch.optim.Optimizer):
    """SGD on gradients that it collects itself."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def watch(self) -> None:
        """Collect from now on."""
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(lambda p: self.state[p].__setitem__("own", p.grad.clone()))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move against what was collected."""
        for group in self.param_groups:
            for p in group["params"]:
                if "own" in self.state[p]:
                    p.data.add_(self.state[p]["own"], alpha=-group["lr"])


class Lion(torch.optim.Optimizer):
    """A sign-based optimizer from outside torch (Chen et al. 2023)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_((slow * m + (1 - slow) * p.grad).sign(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - fast)
