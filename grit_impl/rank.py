"""Reprojection on the Fisher's main directions, and the adapter that is left after rank adaptation.

A reprojection keeps the span of V_k, the top k eigenvectors of a factor: A <- V_k V_k' A, B <- B V_k V_k'. One-sided,
V_k comes from S_a for both, and B A is projected; two-sided, A uses S_a's and B uses S_g's directions, which is no
projection of B A but is what the published method does. A dropped direction stays dropped: the projectors are kept,
the optimizer's first moments are projected too, and the parameters are projected again after every step, because an
element-wise optimizer such as AdamW leaves any subspace.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.factors import TRACE_FLOOR

if TYPE_CHECKING:
    from grit_impl.manager import LoRAFactorPair


def rank_rule(eigenvalues: Tensor, threshold: float, minimum: int) -> int:
    """Smallest k whose top-k eigenvalues hold `threshold` of the energy, clipped to [minimum, r].

    Args:
        eigenvalues: (r,), any order; negative ones (rounding) count as zero.
        threshold: Share of the sum to hold, 0 to 1.
        minimum: Lower limit of k.

    Returns:
        k. All of r where the spectrum is zero: there is nothing to choose by.
    """
    values = eigenvalues.clamp_min(0).double().sort(descending=True).values
    total = values.sum()
    if total <= TRACE_FLOOR:
        return len(values)
    share = values.cumsum(0) / total
    # Rounding must not ask for one direction more than the energy needs.
    k = int((share < threshold - 1e-9).sum()) + 1
    return max(min(minimum, len(values)), min(k, len(values)))


class Reprojection:
    """Chooses directions, projects, and keeps what was dropped dropped.

    Args:
        layers: The layers' parameters.
        config: When and how much to keep.
        rank: Largest rank, r.
        device: Where the adapters are.

    Attributes:
        ranks: Directions kept per layer.
        projector: (2, L, r, r), V V' applied to A and to B.
        directions: Per layer, (V_A, V_B), each (r_layer, k).
    """

    def __init__(self, layers: Sequence[LoRAFactorPair], config: GRITConfig, rank: int, device: torch.device) -> None:
        self.layers, self.config = layers, config
        self.ranks = [layer.rank for layer in layers]
        self.projector = torch.eye(rank, device=device).expand(2, len(layers), rank, rank).clone()
        self.directions: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        self.count = 0

    @property
    def shrunk(self) -> list[int]:
        """Indices of the layers that lost directions."""
        return [i for i, layer in enumerate(self.layers) if self.ranks[i] < layer.rank]

    def due(self, step: int) -> bool:
        """Whether a reprojection follows optimizer step `step` (1-based)."""
        config = self.config
        return bool(
            config.reprojection_freq
            and step % config.reprojection_freq == 0
            and step >= config.reprojection_warmup_steps
        )

    @torch.no_grad()
    def reproject(self, covariances: Tensor, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Choose the directions of every layer from the factors and project parameters and moments.

        Args:
            covariances: (2, L, r, r), S_a and S_g.
            step: The optimizer step (1-based), for `rank_adaptation_start_step`.
            optimizer: Whose first moments are projected; None: none are.
        """
        values, vectors = torch.linalg.eigh(covariances.double())
        # One transfer for all layers: the choice of ranks is made on the host.
        values_host = values.cpu()
        adapt = self.config.enable_rank_adaptation and step >= self.config.rank_adaptation_start_step
        for i, layer in enumerate(self.layers):
            # A layer of smaller rank uses the leading block; its unused eigenvalues are zero and come first.
            r, unused = layer.rank, covariances.shape[-1] - layer.rank
            spectrum = values_host[0, i, unused:]
            k = self.ranks[i]
            if adapt:
                k = min(k, rank_rule(spectrum, self.config.rank_adaptation_threshold, self.config.min_lora_rank))
            elif self.config.reprojection_k is not None:
                k = min(k, self.config.reprojection_k)
            source_b = 1 if self.config.use_two_sided_reprojection and values_host[1, i].sum() > TRACE_FLOOR else 0
            if k == r or values_host[0, i].sum() <= TRACE_FLOOR:
                continue  # V V' = I: keeping every direction changes nothing
            pair = tuple(vectors[side, i, :r, -k:].to(self.projector.dtype) for side in (0, source_b))
            self.ranks[i], self.directions[i] = k, (pair[0], pair[1])
            for side, v in enumerate(pair):
                self.projector[side, i, :r, :r] = v @ v.T
        self.count += 1
        self.enforce()
        if optimizer is not None:
            self._project_moments(optimizer)

    @torch.no_grad()
    def enforce(self) -> None:
        """Project A and B of the layers that lost directions; a no-op otherwise."""
        for i in self.shrunk:
            layer = self.layers[i]
            a, b, r = layer.a, layer.b, layer.rank
            pa, pb = self.projector[0, i, :r, :r], self.projector[1, i, :r, :r]
            a.copy_(pa @ a.float())
            b.copy_(b.float() @ pb)

    def _project_moments(self, optimizer: torch.optim.Optimizer) -> None:
        for i in self.shrunk:
            layer = self.layers[i]
            r = layer.rank
            for parameter, side in ((layer.a, 0), (layer.b, 1)):
                # An 8-bit optimizer keeps its moments quantised under other names; `enforce` alone holds there.
                for key in ("exp_avg", "momentum_buffer"):
                    moment = optimizer.state.get(parameter, {}).get(key)
                    if isinstance(moment, Tensor) and moment.is_floating_point():
                        p = self.projector[side, i, :r, :r].to(moment.dtype)
                        moment.copy_(p @ moment if side == 0 else moment @ p)

    def state_dict(self) -> dict[str, Any]:
        """Ranks, projectors and directions."""
        return {
            "ranks": list(self.ranks),
            "projector": self.projector,
            "directions": [list(d) if d else None for d in self.directions],
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        device = self.projector.device
        self.ranks, self.count = list(state["ranks"]), state["count"]
        self.projector = state["projector"].to(device).clone()
        self.directions = [(d[0].to(device), d[1].to(device)) if d else None for d in state["directions"]]


def shrunk_factors(layer: LoRAFactorPair, directions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The k directions of a projected layer: (A', B') with B' A' = B A, A' (k, d_in), B' (d_out, k).

    With A = V_A V_A' A and B = B V_B V_B', B A = (B V_B) (V_B' V_A) (V_A' A).
    """
    v_a, v_b = (v.double() for v in directions)
    a = (v_b.T @ v_a) @ (v_a.T @ layer.a.detach().double())
    b = layer.b.detach().double() @ v_b
    return a.to(layer.a.dtype), b.to(layer.b.dtype)


def save_adapter(model: Any, path: str | Path, reprojection: Reprojection | None = None) -> Path:
    """Save a PEFT adapter; layers that lost directions are saved with their smaller rank.

    The smaller rank goes to `rank_pattern`, and `alpha_pattern` keeps alpha/r (or alpha/sqrt(r)) what it was, so
    that plain peft loads an adapter that computes the same function.

    Args:
        model: The PeftModel.
        path: Folder to write.
        reprojection: The manager's; None: nothing was dropped.

    Returns:
        The folder.
    """
    target = Path(path)
    model.save_pretrained(str(target))
    shrunk = reprojection.shrunk if reprojection is not None else []
    if reprojection is None or not shrunk:
        return target
    from safetensors.torch import load_file, save_file

    weights = load_file(target / "adapter_model.safetensors")
    config = json.loads((target / "adapter_config.json").read_text())
    ranks, alphas = copy.copy(config.get("rank_pattern") or {}), copy.copy(config.get("alpha_pattern") or {})
    for i in shrunk:
        layer, directions = reprojection.layers[i], reprojection.directions[i]
        assert directions is not None
        a, b = shrunk_factors(layer, directions)
        name = f"base_model.model.{layer.path}"
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = a.contiguous().cpu(), b.contiguous().cpu()
        k, r = reprojection.ranks[i], layer.rank
        alpha = float(layer.module.lora_alpha[layer.adapter])
        ranks[layer.path] = k
        alphas[layer.path] = alpha * (math.sqrt(k / r) if config.get("use_rslora") else k / r)
    config["rank_pattern"], config["alpha_pattern"] = ranks, alphas
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return target
