"""Oracle b: (A, B) and (R^-1 A, B R) are the same model, and must take the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

# Two matrix inversions and four products in float64, condition numbers below 1e3.
EXACT = 1e-10
# 2I scales the released pairing's update by 1/4 and 4 instead of 2 and 1/2; its measured error is 7.5.
WRONG = 1.0
RANK = 3


def transformed_step_error(r_matrix: Tensor, linear: Any, fit: Any, **options: Any) -> float:
    """Relative distance between the step of the transformed model and the transformed step, worst of A and B."""
    torch.manual_seed(1)
    x, dy = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    model = linear()
    manager = fit(model, x, dy, **options)
    layer, inverse = manager.layers[0], torch.linalg.inv(r_matrix)
    a, b = layer.a.detach().clone(), layer.b.detach().clone()
    manager.precondition()
    step_a, step_b = layer.a.grad.clone(), layer.b.grad.clone()
    with torch.no_grad():
        layer.a.copy_(inverse @ a)
        layer.b.copy_(b @ r_matrix)
    manager.detach()
    other = fit(model, x, dy, **options)
    other.precondition()
    expected_a, expected_b = inverse @ step_a, step_b @ r_matrix
    layer = other.layers[0]
    return max(
        float((layer.a.grad - expected_a).norm() / expected_a.norm()),
        float((layer.b.grad - expected_b).norm() / expected_b.norm()),
    )


def test_right_pairing_commutes_with_doubling(linear: Any, fit: Any) -> None:
    """Oracle b at R = 2I, without damping."""
    assert transformed_step_error(2 * torch.eye(RANK).double(), linear, fit) < EXACT


@pytest.mark.parametrize("seed", range(5))
def test_right_pairing_commutes_with_any_invertible_matrix(seed: int, linear: Any, fit: Any) -> None:
    """Oracle b at random R, without damping."""
    generator = torch.Generator().manual_seed(seed)
    r_matrix = torch.randn(RANK, RANK, generator=generator, dtype=torch.float64) + 2 * torch.eye(RANK).double()
    assert transformed_step_error(r_matrix, linear, fit) < EXACT


@pytest.mark.parametrize("pairing", ["fisher", "released"])
def test_both_pairings_commute_with_rotations(pairing: str, linear: Any, fit: Any) -> None:
    """Oracle b: with identity damping both are O(r) equivariant, so rotations cannot tell the pairings apart."""
    rotation = torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64)).Q
    error = transformed_step_error(
        rotation, linear, fit, pairing=pairing, kfac_damping=0.1, damping_mode="absolute", renormalise="gradient_norm"
    )
    assert error < EXACT


def test_released_pairing_fails_at_doubling(linear: Any, fit: Any) -> None:
    """Released fault 1, oracle b: the swapped factors do not commute with R = 2I."""
    assert transformed_step_error(2 * torch.eye(RANK).double(), linear, fit, pairing="released") > WRONG


def test_damping_breaks_only_what_it_must(linear: Any, fit: Any) -> None:
    """Oracle b: relative damping commutes with scaling (R = 2I) too; absolute damping does not."""
    doubling = 2 * torch.eye(RANK).double()
    assert transformed_step_error(doubling, linear, fit, kfac_damping=0.1) < EXACT
    assert transformed_step_error(doubling, linear, fit, kfac_damping=0.1, damping_mode="absolute") > 1e-3
