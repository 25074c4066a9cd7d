"""Reprojection on the Fisher's main directions, and the adapter that is left after rank adaptation.

A reprojection keeps the span of V_k, the top k eigenvectors of a factor: A <- V_k V_k' A, B <- B V_k V_k'. One-sided,
V_k comes from S_a for both, and B A is projected; two-sided, A uses S_a's and B uses S_g's directions, which is no
projection of B A but is what the published method does. A dropped direction stays dropped: the projectors are kept,
the optimizer's first moments are projected too, and the parameters are projected again after every step, because an
element-wise optimizer such as AdamW leaves any subspace.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.method.factors import READY, TRACE_FLOOR, KroneckerFactors
from grit_impl.method.spectra import eigh
from grit_impl.record import write_atomic

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair


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
        factors: Where the directions come from; after a reprojection they are projected like A and B.

    Attributes:
        ranks: Directions kept per layer.
        directions: Per layer, (V_A, V_B), each (r_layer, k); None: all are kept.
        count: Reprojections so far, also those that kept everything.
    """

    def __init__(self, layers: Sequence[LoRAFactorPair], config: GRITConfig, factors: KroneckerFactors) -> None:
        self.layers, self.config, self.factors = layers, config, factors
        self.ranks = [layer.rank for layer in layers]
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
    def reproject(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Choose the directions of every layer from the factors and project parameters, factors and moments.

        A layer whose factors are not ready keeps what it has. Waits for the device.

        Args:
            step: The optimizer step (1-based), for `rank_adaptation_start_step`.
            optimizer: Whose first moments are projected; None: none are.
        """
        factors, config = self.factors, self.config
        factors.merge()
        s = factors.covariances()
        s = s / factors.mean_eigenvalues(s).clamp_min(TRACE_FLOOR)[..., None, None]
        # Adding the projector lifts the space in use by one: its eigenvectors come last, however singular S is.
        values, vectors = eigh((s + factors.projector).double())
        # The choice of ranks is made on the host.
        values, ready = values - 1, (factors.status == READY).cpu()
        adapt = config.enable_rank_adaptation and step >= config.rank_adaptation_start_step
        sides = (0, 1 if config.use_two_sided_reprojection else 0)
        changed = False
        for i, layer in enumerate(self.layers):
            k = self.ranks[i]
            if adapt:
                k = rank_rule(values[0, i, -k:], config.rank_adaptation_threshold, config.min_lora_rank)
            elif config.reprojection_k is not None:
                k = min(k, config.reprojection_k)
            if k == self.ranks[i] or not all(ready[side, i] for side in sides):
                continue  # V V' = I on the space in use: keeping all of it changes nothing
            pair = tuple(vectors[side, i, : layer.rank, -k:] for side in sides)
            for side, v in enumerate(pair):
                factors.projector[side, i, : layer.rank, : layer.rank] = v @ v.T
            factors.kept[i] = self.ranks[i] = k
            self.directions[i] = (pair[0].to(s.dtype), pair[1].to(s.dtype))
            changed = True
        self.count += 1
        self.enforce()
        if changed:
            factors.restrict()
            if optimizer is not None:
                self._project_moments(optimizer)

    @torch.no_grad()
    def enforce(self) -> None:
        """Project A and B of the layers that lost directions; a no-op otherwise."""
        for i in self.shrunk:
            layer = self.layers[i]
            a, b, r = layer.a, layer.b, layer.rank
            pa, pb = self.factors.projector[:, i, :r, :r]
            a.copy_(pa @ a.to(pa.dtype))
            b.copy_(b.to(pb.dtype) @ pb)

    def _project_moments(self, optimizer: torch.optim.Optimizer) -> None:
        for i in self.shrunk:
            layer = self.layers[i]
            r = layer.rank
            for parameter, side in ((layer.a, 0), (layer.b, 1)):
                # An 8-bit optimizer keeps its moments quantised under other names; `enforce` alone holds there.
                for key in ("exp_avg", "momentum_buffer"):
                    moment = optimizer.state.get(parameter, {}).get(key)
                    if isinstance(moment, Tensor) and moment.is_floating_point():
                        p = self.factors.projector[side, i, :r, :r].to(moment.dtype)
                        moment.copy_(p @ moment if side == 0 else moment @ p)

    def state_dict(self) -> dict[str, Any]:
        """Ranks and directions; the projectors are part of the factors' state."""
        directions = [list(d) if d else None for d in self.directions]
        return {"ranks": list(self.ranks), "directions": directions, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        device = self.factors.eye.device
        self.ranks, self.count = list(state["ranks"]), state["count"]
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
    if reprojection is None:
        return target
    for adapter in sorted({reprojection.layers[i].adapter for i in reprojection.shrunk}):
        # peft puts every adapter but the default one in a folder of its name.
        _shrink_saved(model, target if adapter == "default" else target / adapter, adapter, reprojection)
    return target


def _shrink_saved(model: Any, folder: Path, adapter: str, reprojection: Reprojection) -> None:
    """Replace the layers that lost directions in a saved adapter."""
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file, save

    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks, scalings = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            path = name.removeprefix("base_model.model.")
            ranks[path], scalings[path] = module.r[adapter], module.scaling[adapter]
    for i in reprojection.shrunk:
        layer, directions = reprojection.layers[i], reprojection.directions[i]
        if layer.adapter != adapter or directions is None:
            continue
        name = f"base_model.model.{layer.path}"
        a, b = shrunk_factors(layer, directions)
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = a.contiguous().cpu(), b.contiguous().cpu()
        ranks[layer.path] = reprojection.ranks[i]
    # Every layer gets an entry of its own: peft takes the first pattern that matches, in an order that it sorts.
    root = math.sqrt if config.get("use_rslora") else float
    config["rank_pattern"] = ranks
    config["alpha_pattern"] = {path: scalings[path] * root(r) for path, r in ranks.items()}
    write_atomic(folder / "adapter_model.safetensors", save(weights, metadata={"format": "pt"}))
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))
