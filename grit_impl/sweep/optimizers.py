"""The opponents: each arm's optimizer over the same adapters, GRIT's with its manager."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError

if TYPE_CHECKING:
    from peft import PeftModel

    from grit_impl.method.manager import GRITManager

WEIGHT_DECAY = 0.01
"""AdamW's default, the same in every arm."""
SIMPLE = ("adamw", "rslora", "loraplus")
"""Methods whose optimizer is AdamW."""


def build_optimizer(
    model: PeftModel, method: str, settings: Mapping[str, Any], grit: GRITConfig | None, max_grad_norm: float
) -> tuple[torch.optim.Optimizer, GRITManager | None]:
    """The optimizer of a method; GRIT clips inside, after preconditioning, the others are clipped by the loop.

    Args:
        model: The PEFT model.
        method: `adamw`, `rslora` (AdamW; the scaling is the model's), `loraplus` (Hayou et al. 2024, peft),
            `riemannian` (Zhang & Pilanci 2024, peft: before Adam), `muon` on A and on B (Jordan et al. 2024, torch),
            one of `opponents.OPPONENTS`, or `grit`.
        settings: `lr`, `beta1`, `beta2`; `ratio` of B's learning rate to A's (LoRA+, and GRIT where it is given);
            `reg`, the damping (peft's Riemannian), or the floor (ours, which is relative).
        grit: GRIT's configuration.
        max_grad_norm: GRIT's clipping.

    Returns:
        The optimizer, and the attached manager for `grit`.

    Raises:
        GRITError: this torch has no Muon.
    """
    options: dict[str, Any] = {
        "lr": settings["lr"],
        "betas": (settings.get("beta1", 0.9), settings.get("beta2", 0.999)),
        "weight_decay": WEIGHT_DECAY,
    }
    if method == "riemannian":
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(model, torch.optim.AdamW, reg=settings["reg"], **options), None
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise GRITError(f"method muon needs torch.optim.Muon, of torch 2.9; this is {torch.__version__}")
        momentum = options.pop("betas")[0]
        return torch.optim.Muon(trained, momentum=momentum, adjust_lr_fn="match_rms_adamw", **options), None
    if method == "loraplus" or (grit is not None and "ratio" in settings):
        from peft.optimizers import create_loraplus_optimizer

        decay = options.pop("weight_decay")
        inner = create_loraplus_optimizer(
            model, torch.optim.AdamW, loraplus_lr_ratio=settings["ratio"], loraplus_weight_decay=decay, **options
        )
    else:
        inner = torch.optim.AdamW(trained, **options)
    if grit is None and method in SIMPLE:
        return inner, None
    from grit_impl.method.manager import GRITManager
    from grit_impl.method.optimizer import GRITOptimizer
    from grit_impl.sweep.opponents import OPPONENTS

    if grit is None:
        manager = GRITManager(model, GRITConfig(), OPPONENTS[method]).attach()
        if "reg" in settings:
            manager.rule.floor = settings["reg"]  # type: ignore[attr-defined]
        return GRITOptimizer(inner, manager), None
    manager = GRITManager(model, grit).attach()
    return GRITOptimizer(inner, manager, max_grad_norm), manager
