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


class NormalisedSGD(torch.optim.Optimizer):
    """Divides by the norm of all gradients together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.sub_(p.grad, alpha=float(self.param_groups[0]["lr"] / norm))


class StochasticRounding(torch.optim.Optimizer):
    """SGD that rounds to bfloat16 up or down at random, so that small updates arrive on average."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    exact = (p.float() - group["lr"] * p.grad.float()).view(torch.int32)
                    noise = torch.randint_like(exact, 1 << 16)
                    p.copy_(((exact + noise) & -(1 << 16)).view(torch.float32))


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): steps at z, gradients at y between z and the average x."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                x = (p - (1 - group["beta"]) * z) / group["beta"]
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(group["beta"] * x + (1 - group["beta"]) * z)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average in the place of the weights."""
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.copy_((p - (1 - group["beta"]) * self.state[p]["z"]) / group["beta"])
