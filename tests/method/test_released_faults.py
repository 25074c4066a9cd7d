"""The eight faults of the released code, each planted here, and the oracle that catches it.

Every test asks its oracle twice: of GRIT as it is (holds) and of GRIT with a copy of the fault (fails). Two of the
faults have their tests elsewhere too: moments and basis in test_reprojection.py, the all-reduce in test_processes.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.method import factors
from grit_impl.method.capture import modules as autograd
from grit_impl.method.capture.rank_statistics import RankStatistics
from grit_impl.method.factors import READY, KroneckerFactors
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer
from grit_impl.method.reprojection import Reprojection
from grit_impl.method.rules.base import UpdateRule

# Oracles in float64 hold to this or are off by their own size.
EXACT = 1e-9
# Oracles on float32 training.
CLOSE = 1e-4


def caught(oracle: Callable[[], bool], plant: Callable[[], None]) -> None:
    """The oracle holds, and after the fault is planted it does not."""
    assert oracle()
    plant()
    assert not oracle()


def test_fault_1_swapped_factors(linear: Any, fit: Any, relative: Any, monkeypatch: Any) -> None:
    """(S_a + d)^-1 dA and dB (S_g + d)^-1. Oracle b: R = 2I must scale dA's step by 1/2."""

    def oracle() -> bool:
        torch.manual_seed(1)
        x, dy = torch.randn(12, 5).double(), torch.randn(12, 6).double()
        model, steps = linear(), []
        for scale in (1.0, 2.0):
            with torch.no_grad():
                model.base_model.model.proj.lora_A["default"].weight.div_(scale)
                model.base_model.model.proj.lora_B["default"].weight.mul_(scale)
            manager = fit(model, x, dy)
            manager.precondition()
            steps.append(manager.layers[0].a.grad.clone())
        return relative(steps[1], steps[0] / 2) < EXACT

    def swap() -> None:
        build = UpdateRule.__init__

        def swapped(self: Any, *given: Any) -> None:
            build(self, *given)
            self.sides = (0, 1)

        monkeypatch.setattr(UpdateRule, "__init__", swapped)

    caught(oracle, swap)


def test_fault_2_half_precision_statistics(linear: Any, fit: Any, relative: Any, monkeypatch: Any) -> None:
    """S_g in float16, of mean-loss gradients. Oracle e: S_g = s^2 B' S_dy B; stored like that it is 0."""

    def oracle() -> bool:
        torch.manual_seed(1)
        x, dy = torch.randn(64, 5), 1e-3 * torch.randn(64, 6)
        manager = fit(linear(dtype=torch.float32), x, dy)
        layer = manager.layers[0]
        b, s = layer.b.detach(), layer.module.scaling["default"]
        manager.precondition()
        return relative(manager.factors.covariances()[1, 0], s**2 * b.T @ (dy.T @ dy / 64) @ b) < CLOSE

    original = RankStatistics.add

    def add(self: RankStatistics, layer: int, a: Tensor, g: Tensor, context: Any) -> None:
        context = copy.copy(context)
        context.tokens_per_unit = torch.tensor(1.0)
        original(self, layer, a, g, context)
        self.sum_g[layer] = (self.sum_g[layer] / len(a)).half().float() * len(a)

    caught(oracle, lambda: monkeypatch.setattr(RankStatistics, "add", add))


def test_fault_3_reprojection_from_a_zero_factor(linear: Any, fit: Any, monkeypatch: Any) -> None:
    """Directions of a zero S_g are arbitrary coordinates. Oracle: where S_g is zero, no column of B may vanish."""

    def oracle() -> bool:
        torch.manual_seed(1)
        model = linear()
        x = torch.randn(30, 5).double()
        manager = fit(model, x, torch.zeros(30, 6).double())
        options = {"reprojection_freq": 1, "reprojection_k": 2, "use_two_sided_reprojection": True}
        manager.reprojection.config = GRITConfig(**options)
        manager.precondition()
        manager.after_step()
        return bool(manager.layers[0].b.detach().norm(dim=0).min() > 0.1)

    def plant() -> None:
        original = Reprojection.reproject

        def reproject(self: Reprojection, step: int, optimizer: Any) -> None:
            self.factors.status = torch.full_like(self.factors.status, READY)
            original(self, step, optimizer)

        monkeypatch.setattr(Reprojection, "reproject", reproject)

    caught(oracle, plant)


def test_fault_4_preconditioning_after_clipping(llama: Any, training: Any, monkeypatch: Any) -> None:
    """Oracle h: the norm of what the inner optimizer consumes is at most max_grad_norm."""
    limit = 1e-3

    def oracle() -> bool:
        norms: list[float] = []
        config = GRITConfig(kfac_update_freq=1, kfac_min_samples=1, renormalise="none")
        trainer = training("pure", llama(), config, max_grad_norm=limit, optim="sgd")
        step = torch.optim.SGD.step

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]])))
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", watched)
            trainer.train()
        return len(norms) == 4 and max(norms) < limit * (1 + CLOSE)

    def late(self: GRITOptimizer, closure: Any = None) -> None:
        torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.max_grad_norm)
        self.manager.precondition()
        self.inner.step()

    caught(oracle, lambda: monkeypatch.setattr(GRITOptimizer, "step", late))


def test_fault_4_a_wrapper_that_is_never_installed(llama: Any, training: Any, monkeypatch: Any) -> None:
    """An override of a method that transformers never calls. Oracle h: one preconditioning per optimizer step."""
    from grit_impl.trainer import GRITTrainer

    def oracle() -> bool:
        trainer = training("pure", llama(), GRITConfig(kfac_update_freq=1, kfac_min_samples=1))
        trainer.train()
        return trainer.grit_manager.step == trainer.state.global_step == 4

    def plant() -> None:
        monkeypatch.delattr(GRITTrainer, "create_optimizer")
        monkeypatch.setattr(
            GRITTrainer, "optimizer_step", lambda self, *a, **k: self.grit_manager.precondition(), raising=False
        )

    caught(oracle, plant)


def test_fault_5_damping_overwritten_after_eleven_logs(llama: Any, training: Any, monkeypatch: Any) -> None:
    """Oracle: after twelve logged losses the inverse is (S + d I)^-1 with the damping that was asked for."""
    config = {"kfac_update_freq": 1, "kfac_min_samples": 1, "kfac_damping": 0.3}

    def oracle() -> bool:
        trainer = training("pure", llama(), GRITConfig(**config), max_steps=12)
        trainer.train()
        s, inverse = (
            x.double() for x in (trainer.grit_manager.factors.covariances(), trainer.grit_manager.factors.inverse)
        )
        d = 0.3 * s.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(4)
        return bool(((s + d) @ inverse - torch.eye(4)).abs().max() < 1e-3)

    def plant() -> None:
        from grit_impl.trainer import GRITTrainer

        log = GRITTrainer.log

        def overwrite(self: Any, logs: Any, *args: Any, **kwargs: Any) -> None:
            self.logged = getattr(self, "logged", 0) + ("loss" in logs)
            if self.logged >= 11:
                object.__setattr__(self.grit_manager.config, "kfac_damping", 1e-3)
            log(self, logs, *args, **kwargs)

        monkeypatch.setattr(GRITTrainer, "log", overwrite)

    caught(oracle, plant)


def test_fault_5_rank_cut_although_adaptation_is_off(llama: Any, training: Any, monkeypatch: Any) -> None:
    """Oracle: enable_rank_adaptation = False leaves every A and B of full rank."""
    config = {"kfac_update_freq": 1, "kfac_min_samples": 1, "reprojection_freq": 2}

    def oracle() -> bool:
        trainer = training("pure", llama(), GRITConfig(**config))
        trainer.train()
        return all(torch.linalg.matrix_rank(layer.a, rtol=CLOSE) == layer.rank for layer in trainer.grit_manager.layers)

    def plant() -> None:
        original = Reprojection.__init__

        def default_k(self: Reprojection, layers: Any, config: GRITConfig, factors: Any) -> None:
            original(self, layers, GRITConfig(**{**config.to_dict(), "reprojection_k": 2}), factors)

        monkeypatch.setattr(Reprojection, "__init__", default_k)

    caught(oracle, plant)


def test_fault_5_padding_counted_as_samples(llama: Any, sequences: Any, collate: Any, monkeypatch: Any) -> None:
    """Oracle: kfac_min_samples = 64 is not met by 30 real tokens, however they are padded."""

    def oracle() -> bool:
        model = llama()
        manager = GRITManager(model, GRITConfig(kfac_update_freq=1, kfac_min_samples=64)).attach()
        model(**collate(sequences(4), "right", 40)).loss.backward()
        manager.precondition()
        return float(manager.applied.sum()) == 0

    caught(oracle, lambda: monkeypatch.setattr(autograd, "_real_tokens", lambda mask: None))


def test_fault_5_one_overflow_disables_a_layer(linear: Any, attach: Any, monkeypatch: Any) -> None:
    """Oracle: in the step after an overflow every factor is ready again."""

    def oracle() -> bool:
        model = linear()
        manager = attach(model, factor_decay=0.9, kfac_damping=1e-2)
        manager.loss_tokens = 20
        for scale in (1.0, float("inf"), 1.0):
            model.zero_grad()
            model(x=torch.randn(20, 5).double(), dy=torch.randn(20, 6).double() * scale)["loss"].backward()
            manager.precondition()
        return manager.factors.status.unique().tolist() == [READY]

    def absorb(self: KroneckerFactors, statistics: RankStatistics) -> None:
        decay = self.config.factor_decay
        self.numerator = decay * self.numerator + torch.stack((statistics.sum_a, statistics.sum_g))
        self.tokens = decay * self.tokens + statistics.tokens
        self.seen = self.seen + statistics.tokens

    caught(oracle, lambda: monkeypatch.setattr(KroneckerFactors, "absorb", absorb))


def test_fault_6_labels_on_padding(llama: Any, sequences: Any, collate: Any) -> None:
    """Oracle f: a loss is of the supervised tokens, so that twenty more columns of padding do not change it."""
    mask_labels = [True]

    def oracle() -> bool:
        model, values = llama(), []
        for length in (12, 32):
            batch = collate(sequences(4), "right", length)
            if not mask_labels[0]:
                batch["labels"] = batch["input_ids"].clone()
            values.append(float(model(**batch).loss))
        return abs(values[0] - values[1]) < CLOSE

    caught(oracle, lambda: mask_labels.__setitem__(0, False))


def test_fault_7_statistics_of_a_basis_that_is_gone(linear: Any, fit: Any, monkeypatch: Any) -> None:
    """Oracle d: after a reprojection the factors have nothing in the dropped space."""

    def oracle() -> bool:
        torch.manual_seed(1)
        manager = fit(
            linear(), torch.randn(30, 5).double(), torch.randn(30, 6).double(), reprojection_freq=1, reprojection_k=2
        )
        manager.precondition()
        manager.after_step()
        outside = torch.eye(3) - manager.factors.projector
        s = manager.factors.covariances()
        return bool((outside @ s).norm() / s.norm() < EXACT)

    caught(oracle, lambda: monkeypatch.setattr(KroneckerFactors, "restrict", lambda self: None))


def test_fault_7_no_state_in_checkpoints(
    llama: Any, training: Any, adapters: Any, monkeypatch: Any, tmp_path: Any
) -> None:
    """Oracle f: stopped after step 3 and resumed, a run ends with the bits of one that was not."""

    def oracle() -> bool:
        ends = []
        for stop in (None, 3):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            arguments = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
            config = GRITConfig(kfac_update_freq=2, kfac_min_samples=1)
            trainer = training("pure", llama(), config, **arguments)
            trainer.train()
            if stop:
                trainer = training("pure", llama(), config, **arguments)
                trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
            ends.append(adapters(trainer.model))
        return torch.equal(*ends)

    caught(oracle, lambda: monkeypatch.setattr(GRITOptimizer, "state_dict", lambda self: self.inner.state_dict()))


def test_fault_7_running_mean_since_step_zero(linear: Any, attach: Any, relative: Any, monkeypatch: Any) -> None:
    """Oracle: forty steps after A was doubled the factor is that of the new A, not an average with the old one."""

    def oracle() -> bool:
        torch.manual_seed(1)
        model = linear()
        manager = attach(model, factor_decay=0.5, kfac_damping=1e-2)
        x, dy = torch.randn(20, 5).double(), torch.randn(20, 6).double()
        manager.loss_tokens = 20
        layer = manager.layers[0]
        for step in range(60):
            if step == 20:
                with torch.no_grad():
                    layer.a.mul_(2)
            model.zero_grad()
            model(x=x, dy=dy)["loss"].backward()
            manager.precondition()
        a = x @ layer.a.detach().T
        return relative(manager.factors.covariances()[0, 0], a.T @ a / 20) < CLOSE

    def absorb(self: KroneckerFactors, statistics: RankStatistics) -> None:
        self.numerator = self.numerator + torch.stack((statistics.sum_a, statistics.sum_g))
        self.tokens, self.seen = self.tokens + statistics.tokens, self.seen + statistics.tokens

    caught(oracle, lambda: monkeypatch.setattr(KroneckerFactors, "absorb", absorb))


def test_fault_8_a_thousandfold_first_step(linear: Any, fit: Any, relative: Any, monkeypatch: Any) -> None:
    """(0 + d)^-1 = 1000 at B = 0. Oracle: where S_g is zero, the gradient that it preconditions is left alone."""
    released = {"pairing": "released", "damping_mode": "absolute", "kfac_damping": 1e-3}

    def oracle() -> bool:
        torch.manual_seed(1)
        model = linear()
        with torch.no_grad():
            model.base_model.model.proj.lora_B["default"].weight.zero_()
        manager = fit(model, torch.randn(30, 5).double(), torch.randn(30, 6).double(), **released)
        raw = manager.layers[0].b.grad.clone()
        manager.precondition()
        return torch.equal(manager.layers[0].b.grad, raw)

    def plant() -> None:
        def invert(self: KroneckerFactors) -> None:
            s = self.covariances()
            self.inverse = torch.linalg.inv(s + self.damping(s)[..., None, None] * self.eye)
            self.status = torch.full_like(self.status, READY)

        monkeypatch.setattr(factors.KroneckerFactors, "invert", invert)

    caught(oracle, plant)
