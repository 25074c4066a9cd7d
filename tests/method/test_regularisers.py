"""The two regularisers, warm-ups, schedules, statuses and what is logged of the spectrum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grit_impl.config import GRITConfig
from grit_impl.method.factors import READY, STARVED, STATUS, TOO_FEW, ZERO
from grit_impl.method.manager import GRITManager

# The same quadratic form through autograd, in float64.
EXACT = 1e-11


def data(n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 5).double(), torch.randn(n, 6).double()


@pytest.mark.parametrize("warmup", [0, 4])
def test_gradients_of_the_regularisers(warmup: int, linear: Any, fit: Any, relative: Any) -> None:
    """Oracle: torch's autograd on tr(A' S_g A) + tr(B S_a B') and |(I-P)A|^2 + |B(I-P)|^2, S and P constants."""
    kfac, reproj = 0.3, 0.7
    model = linear()
    manager = fit(
        model, *data(), ng_warmup_steps=9, lambda_kfac=kfac, lambda_reproj=reproj, regularizer_warmup_steps=warmup
    )
    layer = manager.layers[0]
    v = torch.linalg.qr(torch.randn(3, 2).double()).Q
    manager.factors.projector[:, 0] = v @ v.T
    raw = layer.a.grad.clone(), layer.b.grad.clone()
    manager.precondition()
    (s_a, s_g), p = manager.factors.covariances()[:, 0], manager.factors.projector[0, 0]
    a, b = layer.a.detach().clone().requires_grad_(), layer.b.detach().clone().requires_grad_()
    outside = torch.eye(3).double() - p
    loss = kfac * ((a.T @ s_g @ a).trace() + (b @ s_a @ b.T).trace())
    loss = loss + reproj * ((outside @ a).square().sum() + (b @ outside).square().sum())
    expected = torch.autograd.grad(loss * (0.25 if warmup else 1.0), (a, b))
    for grad, before, reference in zip((layer.a.grad, layer.b.grad), raw, expected, strict=True):
        assert relative(grad - before, reference) < EXACT


def test_no_regulariser_is_no_change(linear: Any, fit: Any) -> None:
    """Both weights zero and preconditioning held back: the gradients are the raw ones, to the bit."""
    manager = fit(linear(), *data(), ng_warmup_steps=9)
    raw = manager.layers[0].a.grad.clone()
    manager.precondition()
    assert torch.equal(manager.layers[0].a.grad, raw)


def steps(model: Any, manager: GRITManager, n: int) -> list[bool]:
    """n steps by hand; whether each one changed the gradient."""
    changed = []
    for i in range(n):
        torch.manual_seed(i)
        model.zero_grad()
        x, dy = data()
        manager.loss_tokens = len(x)
        model(x=x, dy=dy)["loss"].backward()
        raw = manager.layers[0].a.grad.clone()
        manager.precondition()
        changed.append(not torch.equal(manager.layers[0].a.grad, raw))
    return changed


def test_schedules(linear: Any, attach: Any) -> None:
    """ng_warmup_steps and kfac_update_freq: the first changed gradient is at the first step that both allow."""
    model = linear()
    assert steps(model, attach(model, ng_warmup_steps=3), 5) == [False] * 3 + [True] * 2
    assert steps(model, attach(model, kfac_update_freq=3), 5) == [False] * 2 + [True] * 3
    manager = attach(model, kfac_update_freq=2)
    steps(model, manager, 7)
    assert manager.factors.inversions == 3


def test_statistics_are_collected_when_asked(linear: Any, attach: Any) -> None:
    """grit_cov_update_freq = 3: the tokens of steps 1, 4 and 7, of 30 each."""
    model = linear()
    manager = attach(model, grit_cov_update_freq=3, factor_decay=1.0)
    steps(model, manager, 7)
    assert float(manager.factors.seen[0]) == 90


def test_too_few_samples_is_the_identity_and_says_so(linear: Any, attach: Any) -> None:
    """kfac_min_samples = 100 real tokens is met at the fourth step of 30, not before."""
    model = linear()
    manager = attach(model, kfac_min_samples=100, factor_decay=0.5)
    assert steps(model, manager, 3) == [False] * 3
    assert manager.factors.status.unique().tolist() == [TOO_FEW]
    report = manager.factor_report()
    assert report["statuses"] == {"not-ready": 1}
    assert report["coverage"] == 0.0
    assert steps(model, manager, 1) == [True]
    assert manager.factors.status.unique().tolist() == [READY]


def test_zero_gradients_are_the_identity_and_say_so(linear: Any, fit: Any) -> None:
    """Released fault 8, oracle: at B = 0 S_g is zero; A's factor is the identity (not 1/d), B's is ready."""
    model = linear()
    with torch.no_grad():
        model.base_model.model.proj.lora_B["default"].weight.zero_()
    manager = fit(model, *data())
    layer = manager.layers[0]
    manager.precondition()
    assert manager.factors.status[:, 0].tolist() == [READY, ZERO]
    assert not layer.a.grad.any()
    assert torch.equal(manager.factors.inverse[1, 0], torch.eye(3).double())
    assert STATUS[ZERO] in manager.factor_report()["statuses"]


def test_no_samples_is_starvation_and_says_so(linear: Any, fit: Any) -> None:
    """A factor that never saw a token is the identity, and its status is starved."""
    manager = fit(linear(), *data())
    manager.statistics.reset()
    manager.statistics.check_completeness = False
    raw = manager.layers[0].a.grad.clone()
    manager.precondition()
    assert manager.factors.status.unique().tolist() == [STARVED]
    assert torch.equal(manager.layers[0].a.grad, raw)


def test_the_report_is_plain_and_true(linear: Any, fit: Any) -> None:
    """Oracle: traces, condition and identity distance recomputed with dense linear algebra; JSON values only."""
    import json

    manager = fit(linear(), *data(), kfac_damping=0.1)
    manager.precondition()
    row = json.loads(json.dumps(manager.factor_report()))["layers"][0]
    s = manager.factors.covariances()[1, 0]
    damped = s + 0.1 * s.trace() / 3 * torch.eye(3).double()
    assert row["trace_g"] == pytest.approx(float(s.trace()))
    assert row["condition_g"] == pytest.approx(float(torch.linalg.cond(damped)))
    inverse = torch.linalg.inv(damped)
    distance = (inverse / inverse.trace() * 3 - torch.eye(3)).norm() / math.sqrt(3)
    assert row["identity_distance_g"] == pytest.approx(float(distance))
    assert row["samples"] == 30
    assert row["status"] == "ready"


def test_spectrum_log(llama: Any, sequences: Any, collate: Any) -> None:
    """Oracle: numpy's eigenvalues of the factors at that step; effective rank is exp of the entropy."""
    import numpy as np

    model = llama()
    manager = GRITManager(model, GRITConfig(kfac_update_freq=2, kfac_min_samples=1, log_top_eigs=3)).attach()
    kept = {}
    for step in range(1, 6):
        model.zero_grad()
        model(**collate(sequences(4, step))).loss.backward()
        manager.precondition()
        kept[step] = manager.factors.covariances().double().numpy()
    history = manager.spectrum_history()
    assert [row["step"] for row in history] == [2, 4]
    assert manager.spectrum_history() == history
    values = np.linalg.eigvalsh(kept[4])[..., ::-1].clip(0)
    p = values / values.sum(-1, keepdims=True)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    assert history[1]["top_a"] == pytest.approx(values[0, :, :3].mean(0).tolist(), rel=1e-4)
    assert history[1]["top_g"] == pytest.approx(values[1, :, :3].mean(0).tolist(), rel=1e-4)
    assert history[1]["effective_rank_g"] == pytest.approx(np.exp(entropy)[1].mean(), rel=1e-3)
    quiet = GRITManager(model, GRITConfig(log_fisher_spectrum=False, kfac_update_freq=1)).attach()
    model.zero_grad()
    model(**collate(sequences(4))).loss.backward()
    quiet.precondition()
    assert quiet.spectrum_history() == []


@pytest.mark.parametrize("inner", ["AdamW", "SGD", "fused"])
def test_any_inner_optimizer(inner: str, llama: Any, sequences: Any, collate: Any, adapters: Any) -> None:
    """Oracle: the inner optimizer run by hand on the preconditioned gradients, to the bit; schedules reach it."""
    from grit_impl.method.optimizer import GRITOptimizer

    makers = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    }
    models = [llama(), llama()]
    optimizers, managers = [], []
    for model in models:
        managers.append(GRITManager(model, GRITConfig(kfac_update_freq=1, kfac_min_samples=1)).attach())
        optimizers.append(makers[inner]([p for p in model.parameters() if p.requires_grad]))
    grit = GRITOptimizer(optimizers[0], managers[0])
    assert isinstance(grit, torch.optim.Optimizer)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4) for o in (grit, optimizers[1])]
    for seed in range(3):
        for model in models:
            model(**collate(sequences(3, seed))).loss.backward()
        grit.step()
        managers[1].precondition()
        optimizers[1].step()
        for schedule in schedules:
            schedule.step()
        grit.zero_grad()
        optimizers[1].zero_grad()
        assert torch.equal(adapters(models[0]), adapters(models[1]))
    assert grit.param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    state = grit.state_dict()
    fresh = GRITOptimizer(makers[inner](grit.param_groups[0]["params"]), GRITManager(models[0], managers[0].config))
    fresh.load_state_dict(state)
    assert fresh.manager.step == 3
    assert str(fresh.inner.state_dict()) == str(grit.inner.state_dict())
    fresh.load_state_dict(grit.inner.state_dict())  # of the inner optimizer alone: GRIT keeps what it has


def test_a_closure_is_called_once_before_preconditioning(linear: Any, attach: Any) -> None:
    """optimizer.step(closure) evaluates, preconditions, steps."""
    from grit_impl.method.optimizer import GRITOptimizer

    model = linear()
    manager = attach(model)
    x, dy = data()
    manager.loss_tokens = len(x)
    calls = []

    def closure() -> float:
        calls.append(1)
        loss = model(x=x, dy=dy)["loss"]
        loss.backward()
        return float(loss)

    optimizer = GRITOptimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), manager)
    assert isinstance(optimizer.step(closure), float)
    assert calls == [1]
    assert manager.step == 1
