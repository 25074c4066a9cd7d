"""Half precision, loss scaling and overflow: float32 statistics whatever the model computes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grit_impl.config import GRITConfig
from grit_impl.method.factors import READY
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer

# bfloat16 has 8 bits: 2^-9 per rounding, through two layers and a squared quantity; measured 0.01 to 0.03.
BFLOAT16 = 0.08
# float16 has 11 bits, 8 times finer; measured 0.002.
FLOAT16 = 0.02
# A power of two as loss scale changes no mantissa in float32; what is left is the division.
SCALED = 1e-6


def factors(manager: GRITManager) -> torch.Tensor:
    s = manager.factors.covariances()
    return s / s.norm(dim=(-2, -1), keepdim=True)


def one_step(model: Any, batch: Any, autocast: torch.dtype | None = None, scale: float = 1.0) -> GRITManager:
    manager = GRITManager(model, GRITConfig(kfac_update_freq=1, kfac_min_samples=1)).attach()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(**batch).loss
    (loss * scale).backward()
    manager.precondition()
    manager.detach()
    return manager


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.bfloat16, None, BFLOAT16),
        (torch.float32, torch.bfloat16, BFLOAT16),
        (torch.float32, torch.float16, FLOAT16),
        (torch.float16, torch.float16, FLOAT16),
    ],
    ids=["bf16-model", "bf16-autocast", "fp16-autocast", "fp16-base"],
)
def test_statistics_of_half_precision_are_float32_and_right(
    dtype: Any, autocast: Any, tolerance: float, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle: the factors of the float32 model, within the rounding of the format."""
    batch = collate(sequences(4))
    reference = one_step(llama(), batch)
    manager = one_step(llama(dtype=dtype), batch, autocast, scale=128.0 if autocast is torch.float16 else 1.0)
    assert manager.factors.numerator.dtype == manager.statistics.sum_g.dtype == torch.float32
    assert relative(factors(manager), factors(reference)) < tolerance
    assert bool((manager.factors.status == READY).all())
    assert all(bool(p.grad.isfinite().all()) for p in manager.model.parameters() if p.requires_grad)


def test_bfloat16_adapters_are_preconditioned_in_place(llama: Any, sequences: Any, collate: Any) -> None:
    """Adapters that are themselves bfloat16: gradients keep their dtype and stay finite."""
    model = llama(dtype=torch.bfloat16).to(torch.bfloat16)
    manager = one_step(model, collate(sequences(4)))
    assert manager.factors.numerator.dtype == torch.float32
    assert {layer.a.grad.dtype for layer in manager.layers} == {torch.bfloat16}
    assert float(manager.applied.min()) == 1


def test_tiny_gradients_survive(linear: Any, fit: Any, relative: Any) -> None:
    """Released fault 2: S_g of 1e-20, far below float16's smallest number, is inverted as precisely as S_g of 1."""
    x, dy = torch.randn(40, 5), torch.randn(40, 6)
    directions = []
    for scale in (1.0, 1e-10):
        torch.manual_seed(0)
        manager = fit(linear(dtype=torch.float32), x, dy * scale, kfac_damping=1e-2, renormalise="gradient_norm")
        manager.precondition()
        assert manager.factors.status.tolist() == [[READY], [READY]]
        directions.append(manager.layers[0].a.grad / manager.layers[0].a.grad.norm())
    assert relative(directions[1], directions[0]) < 1e-4  # float32 times a condition number of about 100


def scaled_steps(model: Any, batches: Any, scale: float | None, poison: int | None = None) -> tuple[Any, list[float]]:
    """SGD steps by hand under GradScaler (None: without), step `poison` overflowing."""
    manager = GRITManager(model, GRITConfig(kfac_update_freq=1, kfac_min_samples=1)).attach()
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer = GRITOptimizer(inner, manager, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    norms = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(**batch).loss * (float("inf") if i == poison else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        norms.append(float(sum(p.detach().norm() for p in model.parameters() if p.requires_grad)))
    return manager, norms


def test_a_gradscaler_changes_nothing(llama: Any, sequences: Any, collate: Any, relative: Any, adapters: Any) -> None:
    """Oracle f: scaled by 2^14 and unscaled by the scaler, factors and parameters are those without scaling."""
    batches = [collate(sequences(3, seed)) for seed in range(3)]
    plain, scaled = llama(), llama()
    reference, _ = scaled_steps(plain, batches, None)
    manager, _ = scaled_steps(scaled, batches, 2.0**14)
    assert manager.step == reference.step == 3
    assert relative(factors(manager), factors(reference)) < SCALED
    assert relative(manager.factors.covariances()[1], reference.factors.covariances()[1]) < SCALED
    assert relative(adapters(scaled), adapters(plain)) < 100 * SCALED  # through inverses of condition 100


def test_a_skipped_step_is_no_step(llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Released fault 5: an overflow costs its own step and nothing after it, and no layer is disabled."""
    batches = [collate(sequences(3, seed)) for seed in range(4)]
    manager, norms = scaled_steps(llama(), batches, 2.0**4, poison=1)
    assert norms[1] == norms[0]
    assert norms[2] != norms[1]
    assert manager.step == 3
    assert bool((manager.factors.status == READY).all())
    clean, _ = scaled_steps(llama(), [batches[0], batches[2], batches[3]], 2.0**4)
    assert relative(factors(manager), factors(clean)) < SCALED


def test_one_layers_overflow_is_left_out_counted_and_forgotten(llama: Any, sequences: Any, collate: Any) -> None:
    """Released fault 5: non-finite statistics of one layer leave the other layers and the next step alone."""
    model = llama()
    manager = GRITManager(model, GRITConfig(kfac_update_freq=1, kfac_min_samples=1)).attach()
    for poison in (True, False):
        model.zero_grad()
        model(**collate(sequences(4))).loss.backward()
        if poison:
            manager.statistics.sum_g[2, 0, 0] = float("inf")
        manager.precondition()
        expected = [READY] * len(manager.layers)
        status = manager.factors.status[1].tolist()
        assert [s for i, s in enumerate(status) if i != 2] == expected[1:]
        assert (status[2] == READY) == (not poison)
    assert manager.factor_report()["layers"][2]["dropped_steps"] == 1
    assert bool(manager.factors.numerator.isfinite().all())


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_bf16_training_in_the_real_loop(kind: str, llama: Any, training: Any, losses: Any) -> None:
    """A real Trainer with bf16 autocast: every step preconditioned, losses finite."""
    trainer = training(kind, llama(), GRITConfig(kfac_update_freq=1, kfac_min_samples=1), bf16=True)
    trainer.train()
    manager = trainer.grit_manager if kind == "pure" else trainer.grit_callback.manager
    assert manager.factor_report()["coverage"] == 1.0
    assert all(loss == loss for loss in losses(trainer))
