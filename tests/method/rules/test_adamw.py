"""Oracle c: what AdamW does to a preconditioned gradient. An effect is judged by the update, not by the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grit_impl.method.optimizer import GRITOptimizer

# AdamW's first update is g / (|g| + eps): a power of two cancels exactly, other factors to one rounding.
SCALAR_CANCELS = 1e-14
# eps 1e-8 against |g| = 1e-7: the update shrinks by 1 / 1.1 and by 1 / 1.01, 8% apart; measured 0.08 to 0.3.
SCALAR_SEEN = 0.05
# Updates of an untouched gradient have cosine 1; K-FAC's were measured at 0.4 to 0.9.
EFFECT = 0.95


def update(gradient: torch.Tensor, eps: float) -> torch.Tensor:
    """The first update that AdamW makes."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    torch.optim.AdamW([parameter], lr=1.0, eps=eps, weight_decay=0.0).step()
    return parameter.detach()


def test_adamw_ignores_a_positive_scalar(relative: Any) -> None:
    """Oracle c with eps = 0: c g and g make the same update, so a scaled identity is no preconditioner."""
    gradient = torch.randn(4, 5, dtype=torch.float64) * 1e-7
    assert relative(update(1e5 * gradient, 0.0), update(gradient, 0.0)) < SCALAR_CANCELS


def test_adamws_epsilon_does_not_ignore_it(relative: Any) -> None:
    """Oracle c with eps = 1e-8 and |g| about 1e-7: the same factor is seen."""
    gradient = torch.randn(40, 50, dtype=torch.float64) * 1e-7
    assert relative(update(10 * gradient, 1e-8), update(gradient, 1e-8)) > SCALAR_SEEN


def updates(linear: Any, fit: Any, dy_scale: float, **options: Any) -> list[float]:
    """Cosine between AdamW's first update with and without GRIT, for A and for B."""
    torch.manual_seed(3)
    x = torch.randn(64, 8) @ torch.diag(torch.logspace(0, -2, 8))
    dy = torch.randn(64, 6) @ torch.diag(torch.logspace(0, -2, 6)) * dy_scale
    results = []
    for step in (False, True):
        torch.manual_seed(4)
        model = linear(8, 6, 4, dtype=torch.float32)
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        manager = fit(model, x, dy, **options)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=0.0, weight_decay=0.0)
        (GRITOptimizer(inner, manager) if step else inner).step()
        ends = [p.detach() for p in model.parameters() if p.requires_grad]
        results.append([(e - s).flatten() for e, s in zip(ends, start, strict=True)])
    return [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_grit_changes_the_direction_of_adamws_update(scale: float, linear: Any, fit: Any) -> None:
    """Oracle c: with relative damping both updates turn, however small the gradients are."""
    assert max(updates(linear, fit, scale, kfac_damping=1e-2)) < EFFECT


def test_absolute_damping_above_the_spectrum_is_no_preconditioner(linear: Any, fit: Any) -> None:
    """Oracle c: where damping >> trace(S_g) / r, A's update is AdamW's own, although its gradient grew by 1e5."""
    cos_a, cos_b = updates(linear, fit, 1e-6, kfac_damping=1e-5, damping_mode="absolute")
    assert cos_a > 1 - 1e-4
    assert cos_b < EFFECT


def test_norm_is_kept_and_zero_stays_zero(linear: Any, fit: Any, relative: Any) -> None:
    """renormalise = gradient_norm: |Pg| = |g| per matrix, and no NaN from a gradient of zero."""
    model = linear()
    x, dy = torch.randn(20, 5).double(), torch.randn(20, 6).double()
    manager = fit(model, x, dy, kfac_damping=1e-2, renormalise="gradient_norm")
    layer = manager.layers[0]
    layer.b.grad.zero_()
    manager.completeness = torch.zeros(1)  # the check would rightly refuse a gradient that was changed
    manager.statistics.check_completeness = False
    norm = layer.a.grad.norm().clone()
    manager.precondition()
    assert relative(layer.a.grad.norm(), norm) < SCALAR_CANCELS
    assert not layer.b.grad.any()
