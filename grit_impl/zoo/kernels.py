"""A CPU stand-in for fused LoRA kernels, and a preconditioner that depends on module hooks.

The kernels follow the public behaviour of Unsloth's: one autograd function takes the input, the frozen weight and the
LoRA weights as tensors, forms their gradients itself, and never calls lora_A or lora_B. `.grad` is filled as usual.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn


class FusedLoRA(torch.autograd.Function):
    """y = W x + s B A x for x (..., d_in), with hand-written gradients of x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x (..., d_in), weight (d_out, d_in), a (r, d_in), b (d_out, r)."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return x @ weight.T + scale * (x @ a.T) @ b.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b; the weight is frozen."""
        x, weight, a, b = ctx.saved_tensors
        flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        g = ctx.scale * flat_dy @ b
        return dy @ weight + (g @ a).view_as(x), None, g.T @ flat_x, ctx.scale * flat_dy.T @ (flat_x @ a.T), None


def fuse(model: nn.Module) -> int:
    """Replace the forward of every peft LoRA layer by the fused function; returns how many."""
    from peft.tuners.lora import Linear

    count = 0
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = _fused_forward(module)  # type: ignore[method-assign]
            count += 1
    return count


def _fused_forward(layer: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        name = layer.active_adapters[0]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        result: Tensor = FusedLoRA.apply(x, layer.get_base_layer().weight, a, b, layer.scaling[name])  # type: ignore[no-untyped-call]
        return result

    return forward


class HookedKFAC:
    """Preconditions B with the covariance of lora_A's output, and A with that of lora_B's incoming gradient.

    Its statistics come from hooks on the modules. Without enough of them it leaves the gradient alone, and says so only
    in `factor_report`, as released preconditioners do.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], min_samples: int = 4, every: int = 1):
        self.parameters, self.min_samples, self.every = dict(parameters), min_samples, every
        self.samples: Counter[str] = Counter()
        self.sums: dict[str, Tensor] = {}
        self.inverses: dict[str, Tensor] = {}
        self.calls = 0
        for name, module in model.named_modules():
            if f"{name}.weight" in parameters and "lora_A" in name:
                module.register_forward_hook(self._collect(name))

    def _collect(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._add(f"{name}.a", output)
            if output.requires_grad:
                output.register_hook(lambda grad: self._add(f"{name}.g", grad))  # type: ignore[no-untyped-call]

        return hook

    def _add(self, key: str, rows: Tensor) -> None:
        flat = rows.detach().reshape(-1, rows.shape[-1])
        self.samples[key] += len(flat)
        self.sums[key] = self.sums.get(key, 0) + flat.T @ flat

    @torch.no_grad()
    def apply(self, write: bool = True) -> None:
        """Precondition in place; with `write` False, on a copy."""
        self.calls += 1
        for name, p in self.parameters.items():
            side_a = "lora_A" in name
            key = name.replace("lora_B", "lora_A").removesuffix(".weight") + (".g" if side_a else ".a")
            if self.samples[key] >= self.min_samples and self.calls % self.every == 0:
                s = self.sums[key] / self.samples[key]
                s = s / s.trace().clamp_min(1e-30)
                self.inverses[key] = torch.linalg.inv(s + 0.05 * torch.eye(len(s)))
            grad = p.grad
            if grad is None or key not in self.inverses:
                continue
            target = grad if write else grad.clone()
            new = self.inverses[key] @ grad if side_a else grad @ self.inverses[key]
            target.copy_(new * grad.norm() / new.norm().clamp_min(1e-30))

    def factor_report(self) -> dict[str, Any]:
        """Per layer: samples and status."""
        layers = []
        for name in (n for n in self.parameters if "lora_A" in n):
            key = name.removesuffix(".weight")
            seen, ready = self.samples[f"{key}.a"], f"{key}.a" in self.inverses
            layers.append(
                {"name": key, "samples": seen, "status": "ready" if ready else "not-ready" if seen else "starved"}
            )
        return {"statuses": dict(Counter(layer["status"] for layer in layers)), "layers": layers}
