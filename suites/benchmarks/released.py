"""Factor statistics and preconditioning layer by layer, as the released code does it: what stacking is compared with.

Per layer one running mean of a a' and one of g g', each with its own small kernels, per-layer inverses in a Python
loop, and per-layer products with the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PerLayer:
    """Hooks on `lora_A` of every layer.

    Args:
        layers: (lora_A, lora_B) of each layer.
        every: Steps between inversions.
        damping: Absolute.
    """

    def __init__(self, layers: list[tuple[nn.Module, nn.Module]], every: int = 5, damping: float = 1e-3) -> None:
        self.layers, self.every, self.damping, self.step = layers, every, damping, 0
        self.cov: dict[tuple[int, str], Tensor] = {}
        self.count: dict[tuple[int, str], int] = {}
        self.inverse: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Begin to collect."""
        self._handles = [a.register_forward_hook(self._hook(i)) for i, (a, _) in enumerate(self.layers)]

    def detach(self) -> None:
        """Stop."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, i: int) -> Any:
        def forward_hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._update((i, "a"), output.detach())
            output.register_hook(lambda g: self._update((i, "g"), g))

        return forward_hook

    def _update(self, key: tuple[int, str], values: Tensor) -> None:
        rows = values.reshape(-1, values.shape[-1]).float()
        n, new = self.count.get(key, 0), rows.T @ rows / len(rows)
        self.cov[key] = new if key not in self.cov else (n * self.cov[key] + len(rows) * new) / (n + len(rows))
        self.count[key] = n + len(rows)

    @torch.no_grad()
    def precondition(self) -> None:
        """Invert when due, and change all gradients."""
        self.step += 1
        for i, (a, b) in enumerate(self.layers):
            if self.step % self.every == 0:
                for side in "ag":
                    cov = self.cov[i, side]
                    eye = torch.eye(len(cov), device=cov.device)
                    self.inverse[i, side] = torch.linalg.inv(cov + self.damping * eye)
            if (i, "g") in self.inverse:
                a.weight.grad.copy_(self.inverse[i, "g"] @ a.weight.grad)
                b.weight.grad.copy_(b.weight.grad @ self.inverse[i, "a"])
