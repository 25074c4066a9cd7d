"""Opponents against slow references, one parameter at a time, and what they make of another parametrisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grit_impl.sweep.invariance import METHODS, transforms, travelled
from grit_impl.sweep.optimizers import WEIGHT_DECAY, build_optimizer

STEPS, RANK, BETAS, LR = 4, 4, (0.8, 0.95), 0.01
# Two ways to the same numbers in float64; LoRA-Muon's roots lift eigenvalues by a millionth of the trace.
SAME, FLOORED = 1e-8, 1e-3


@pytest.fixture
def made() -> Callable[[], Any]:
    """Makes the tiny base with adapters on two kinds of layers, in float64, B at random."""
    from grit_impl.recipes.bases import load_base
    from grit_impl.recipes.lora import LoRASettings, add_lora

    def make() -> Any:
        settings = LoRASettings(r=RANK, alpha=RANK, target_modules=("q_proj", "down_proj"))
        model = add_lora(load_base("tiny", device="cpu")[0], settings, 0).double()
        generator = torch.Generator().manual_seed(7)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return model

    return make


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Four steps of two random sequences."""
    drawn = torch.randint(5, 200, (STEPS, 2, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def msign(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def root(s: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return vectors @ torch.diag(values**power) @ vectors.T


def averages(gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Adam's corrected moments after each step."""
    m, v, first, second = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0]), [], []
    for t, g in enumerate(gradients, 1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        first.append(m / (1 - BETAS[0] ** t))
        second.append(v / (1 - BETAS[1] ** t))
    return first, second


def lora_muon(gradients: list[Tensor], own: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """By singular values; `own` and `others` are (r, d) of each step."""
    whites = [root(other @ other.T, -0.5) for other in others]
    return [w @ msign(w @ m) / 2 for w, m in zip(whites, averages(gradients)[0], strict=True)]


def lifted(own: Tensor, other: Tensor) -> Tensor:
    return other @ other.T + 0.01 * own.square().sum() * torch.eye(len(own)).to(own)


def riemannian_sgd(gradients: list[Tensor], own: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """A solve for each tensor."""
    steps = zip(own, others, averages(gradients)[0], strict=True)
    return [torch.linalg.solve(lifted(p, other), m) for p, other, m in steps]


def riemannian_after(gradients: list[Tensor], own: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Adam's direction, then the solve."""
    steps = zip(own, others, *averages(gradients), strict=True)
    return [torch.linalg.solve(lifted(p, other), m / (v.sqrt() + 1e-8)) for p, other, m, v in steps]


def lora_rite(gradients: list[Tensor], own: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The moments kept in the d-dimensional space that the bases span, so that nothing has to be carried along."""
    found: list[Tensor] = []
    m = v = torch.zeros(())
    for t, (g, other) in enumerate(zip(gradients, others, strict=True), 1):
        q, r = torch.linalg.qr(other.T)
        project, g = q @ q.T, q @ torch.linalg.solve(r.T, g)
        weights = [(1 - beta) / (1 - beta**t) for beta in BETAS]
        v = (
            (1 - weights[1]) * project @ v @ project + weights[1] * g @ g.T / g.shape[1]
            if t > 1
            else g @ g.T / g.shape[1]
        )
        u = q @ torch.linalg.inv(root(q.T @ v @ q, 0.5) + 1e-6 * torch.eye(RANK).to(g)) @ q.T @ g
        m = (1 - weights[0]) * project @ m + weights[0] * u if t > 1 else u
        found.append(torch.linalg.solve(r, q.T @ m))
    return found


REFERENCES = {f.__name__: f for f in (lora_muon, riemannian_sgd, riemannian_after, lora_rite)}


@pytest.mark.parametrize("method", REFERENCES)
def test_an_opponent_is_its_papers_formula(method: str, made: Any, batches: Any) -> None:
    """Oracle: the formula, by LAPACK, for every tensor and step, on the gradients and weights that the run had."""
    from grit_impl.method.layers import find_layers

    model = made()
    optimizer, manager = build_optimizer(model, method, {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1]}, None, 1.0)
    assert manager is None
    layers = find_layers(model)
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in layers]
    ends: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for batch in batches:
        model(**batch).loss.backward()
        for layer, found in zip(layers, seen, strict=True):
            found.append(tuple(t.detach().clone() for t in (layer.a, layer.b.T, layer.a.grad, layer.b.grad.T)))
        optimizer.step()
        optimizer.zero_grad()
        for layer, after in zip(layers, ends, strict=True):
            after.append((layer.a.detach().clone(), layer.b.detach().T.clone()))
    for found, after in zip(seen, ends, strict=True):
        columns = [list(column) for column in zip(*found, strict=True)]
        for side in (0, 1):
            own, other, gradients = columns[side], columns[1 - side], columns[2 + side]
            for step, wanted in enumerate(REFERENCES[method](gradients, own, other)):
                moved = (own[step] - after[step][side]) / LR - WEIGHT_DECAY * own[step]
                assert (moved - wanted).norm() < (FLOORED if method == "lora_muon" else SAME) * wanted.norm(), (
                    side,
                    step,
                )


# Which parametrisations a method must not see. Moments of the Riemannian momentum are in coordinates that move with the
# weights, so that it is exact for small steps alone.
EXACT = {
    "AdamW, rsLoRA": set(),
    "Riemannian before Adam (peft)": set(),
    "Riemannian after Adam": set(),
    "Riemannian, momentum": {"orthogonal", "scale", "general"},
    "LoRA-Muon": {"orthogonal", "scale", "general"},
    "LoRA-RITE": {"orthogonal", "scale", "general"},
    "`gram` (SOAP on the r side)": {"orthogonal"},
    "`eigenbasis`": {"orthogonal"},
    "`spectral`": {"orthogonal"},
}


@pytest.mark.parametrize("name", EXACT)
def test_invariance_is_what_the_formula_says(name: str, made: Any, batches: Any) -> None:
    """Oracle: B A moves alike from (A, B) and (R A, B R^-1) where the mathematics says so, and not alike elsewhere."""
    plain = travelled(*METHODS[name], made, batches, torch.eye(RANK).double())
    for kind, r in transforms(RANK).items():
        error = float((travelled(*METHODS[name], made, batches, r) - plain).norm() / plain.norm())
        assert (error < 0.01) == (kind in EXACT[name]), (kind, error)


def test_muon_is_torchs(made: Any) -> None:
    """The library's own class, with AdamW's size of a step; rows of A and columns of B become orthogonal."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip(f"needs torch.optim.Muon; found torch {torch.__version__}")
    optimizer, _ = build_optimizer(made(), "muon", {"lr": LR, "beta1": 0.95}, None, 1.0)
    assert type(optimizer) is torch.optim.Muon
    assert optimizer.defaults["momentum"] == 0.95
