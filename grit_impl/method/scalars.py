"""What GRIT did, as the few numbers that a training log has room for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grit_impl.method.manager import GRITManager
from grit_impl.method.rules.base import WholeStep
from grit_impl.method.spectra import effective_rank, eigvalsh

PREFIX = "grit/"


class Scalars:
    """Numbers of a manager, for a step that is logged.

    Reading them waits for the device, and `before` copies the adapters' gradients: for logged steps alone.

    Args:
        manager: Whose numbers.
    """

    def __init__(self, manager: GRITManager) -> None:
        self.manager = manager
        self._raw: list[Tensor | None] | None = None
        self._turned: Tensor | None = None
        self._spectra: tuple[int, dict[str, float]] = (-1, {})

    def before(self) -> None:
        """Keep the gradients as backward left them."""
        self._raw = [None if g is None else g.detach().clone() for g in self._gradients()]

    @torch.no_grad()
    def after(self) -> None:
        """Compare them with what GRIT made of them (a rule that computes the whole step: with its direction)."""
        if self._raw is None:
            return
        pairs = [(a, b) for a, b in zip(self._raw, self._gradients(), strict=True) if a is not None and b is not None]
        self._raw = None
        dot, raw, made = (
            torch.stack([(one.float() * other.float()).sum() for one, other in which]).sum()
            for which in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
        )
        self._turned = dot / (raw * made).sqrt()

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for layer in self.manager.layers for parameter in (layer.a, layer.b)]

    def read(self) -> dict[str, float]:
        """The numbers; what is not known yet is left out.

        Returns:
            `grit/turned_degrees`: between the adapters' gradients and what GRIT made of them, in the last step for
            which `before` was called. `grit/coverage`: share of gradients so far that met a ready factor.
            `grit/inversions`. `grit/condition_a`, `grit/condition_g`: of the damped factors, median over layers, and
            `grit/effective_rank_a`, `grit/effective_rank_g`: their mean, both at the last inversion.
            `grit/predicted_kl`: by what the last step changes the model in trust_region's own metric, in nats; the
            divergence itself is 23 to 4,380 times that (docs/measurements/grit-vs-lora.md, section 12).
        """
        manager = self.manager
        found = {
            "coverage": float(manager.applied.sum()) / (max(1, manager.step) * 2 * len(manager.layers)),
            "inversions": float(manager.factors.inversions),
            **self._of_factors(),
        }
        if self._turned is not None and math.isfinite(cosine := float(self._turned)):
            found["turned_degrees"] = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        rule = manager.rule
        if isinstance(rule, WholeStep) and (decrement := getattr(rule, "decrement", None)) is not None:
            rate = max(float(group["lr"]) for group in rule.groups)
            found["predicted_kl"] = min(rate**2, float(decrement)) / 2
        return {PREFIX + name: value for name, value in found.items() if math.isfinite(value)}

    def _of_factors(self) -> dict[str, float]:
        factors = self.manager.factors
        if not factors.inversions:
            return {}
        if self._spectra[0] != factors.inversions:
            covariances = factors.covariances()
            damping = factors.damping(covariances)[..., None].cpu()
            values = eigvalsh(covariances).clamp_min(0)
            ranks = effective_rank(values).mean(-1)
            found = {}
            for side, key in enumerate("ag"):
                found[f"effective_rank_{key}"] = float(ranks[side])
                ends = values[side] + damping[side]
                # Padding of layers with fewer ranks than others is no direction.
                lowest = torch.stack([row[-layer.rank] for row, layer in zip(ends, self.manager.layers, strict=True)])
                found[f"condition_{key}"] = float((ends[:, -1] / lowest).median())
            self._spectra = (factors.inversions, found)
        return self._spectra[1]
