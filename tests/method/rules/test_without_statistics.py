"""Rules that take no statistics: slow references, parameter by parameter, and that nothing is captured or read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer
from grit_impl.method.spectra import ROOT_FLOOR, inverse_root

RULES = ["gram", "spectral"]
# Eigenvalue solvers against iterations that lift eigenvalues by a millionth of the trace: measured 1e-5.
FLOORED = 1e-3
LR, DECAY, BETAS, STEPS = 0.03, 0.1, (0.8, 0.95), 4


def root(s: Tensor, power: float) -> Tensor:
    """S^power from its eigenvalues."""
    values, vectors = torch.linalg.eigh(s)
    return vectors @ torch.diag(values**power) @ vectors.T


def adam_in_gram_basis(gradients: list[Tensor], p: Tensor) -> Tensor:
    """SOAP of the rows' side, written out: the basis anew every step, the first moment kept in plain coordinates."""
    m, v, gram, q = torch.zeros_like(p), torch.zeros_like(p), torch.zeros(len(p), len(p)).to(p), None
    for t, g in enumerate(gradients, 1):
        gram = 0.95 * gram + g @ g.T
        new = torch.linalg.eigh(gram)[1].flip(-1)
        if q is not None:
            v = (q.T @ new).square().T @ v
        q, m = new, BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * (q.T @ g).square()
        direction = (q.T @ m) / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
        p = p - LR * (q @ direction + DECAY * p)
    return p


def spectral(gradients: list[Tensor], others: list[Tensor], p: Tensor) -> Tensor:
    """The step of the rows' side by singular values; `others` are the other factor's matrices, rank first."""
    m = torch.zeros_like(p)
    for g, other in zip(gradients, others, strict=True):
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        lifted = other @ other.T + 1e-2 * p.square().sum() * torch.eye(len(p)).to(p)
        white = root(lifted, -0.5)
        u, _, vh = torch.linalg.svd(white @ m, full_matrices=False)
        p = p - LR * (white @ u @ vh + DECAY * p)
    return p


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_is_its_slow_reference(rule: str, llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Oracle: the same mathematics for one parameter at a time, by LAPACK, on the gradients that the run had."""
    model = llama(dtype=torch.float64)
    manager = GRITManager(model, GRITConfig(update_rule=rule, kfac_update_freq=1)).attach()
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, BETAS, weight_decay=DECAY)
    optim = GRITOptimizer(inner, manager)
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in manager.layers]
    for step in range(STEPS):
        model(**collate(sequences(3, step))).loss.backward()
        for layer, found in zip(manager.layers, seen, strict=True):
            found.append(tuple(t.detach().clone() for t in (layer.a, layer.b.T, layer.a.grad, layer.b.grad.T)))
        optim.step()
        optim.zero_grad()
    assert not manager.statistics.tokens.any()
    for layer, found in zip(manager.layers, seen, strict=True):
        a, b, grad_a, grad_b = (list(column) for column in zip(*found, strict=True))
        for end, own, gradients, other in ((layer.a, a, grad_a, b), (layer.b.T, b, grad_b, a)):
            args = (gradients, own[0]) if rule == "gram" else (gradients, other, own[0])
            expected = (adam_in_gram_basis if rule == "gram" else spectral)(*args)
            assert relative(end.detach() - own[0], expected - own[0]) < (1e-8 if rule == "gram" else FLOORED)


def test_inverse_roots_are_those_of_the_solver() -> None:
    """Oracle: LAPACK, for condition numbers up to that of the floor; a matrix of zero gets the identity."""
    q = torch.linalg.qr(torch.randn(5, 6, 6, dtype=torch.float64)).Q
    values = torch.logspace(0, -5, 6, dtype=torch.float64) * torch.logspace(-8, 8, 5, dtype=torch.float64)[:, None]
    s = q @ torch.diag_embed(values) @ q.mT
    lifted = s + ROOT_FLOOR * values.sum(1)[:, None, None] * torch.eye(6).double()
    for dtype, error in ((torch.float64, 1e-7), (torch.float32, 1e-2)):
        for found, wanted in zip(inverse_root(s.to(dtype)), lifted, strict=True):
            assert (found.double() - root(wanted, -0.5)).norm() < error * root(wanted, -0.5).norm()
    assert torch.equal(inverse_root(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("option", [{"lambda_kfac": 0.1}, {"lambda_reproj": 0.1}, {"reprojection_freq": 5}])
def test_what_reads_the_factors_is_refused(rule: str, option: dict[str, Any], llama: Any) -> None:
    """One line that names the option; nothing is silently without effect."""
    with pytest.raises(GRITError, match=f"takes no statistics, which {next(iter(option))} needs"):
        GRITManager(llama(), GRITConfig(update_rule=rule, **option))
