"""Oracle h: what a spy on real trainers sees, on whichever transformers is installed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer

STEP = ["backward", "backward", "precondition", "clip", "step"]
# clip_grad_norm_ adds 1e-6 to the norm; the rest is float32 rounding of a sum of some thousand squares.
CLIPPED = 1e-5


@pytest.fixture
def spy(monkeypatch: Any) -> Any:
    """Events in the order they happen, and the norm of the gradients at every inner optimizer step."""
    from accelerate import Accelerator

    events: list[str] = []
    norms: list[float] = []
    backward, precondition, clip = Accelerator.backward, GRITManager.precondition, torch.nn.utils.clip_grad_norm_

    def spy_backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = backward(self, *args, **kwargs)
        events.append("backward")
        return result

    def spy_precondition(self: Any) -> None:
        events.append("precondition")
        precondition(self)

    def spy_clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        if math.isfinite(max_norm):
            events.append("clip")
        return clip(parameters, max_norm, *args, **kwargs)

    def spy_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not isinstance(optimizer, GRITOptimizer):
            events.append("step")
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    monkeypatch.setattr(Accelerator, "backward", spy_backward)
    monkeypatch.setattr(GRITManager, "precondition", spy_precondition)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    handle = register_optimizer_step_pre_hook(spy_step)
    yield events, norms
    handle.remove()


@pytest.mark.parametrize("kind", ["pure", "hybrid", "sft", "sft-pure"])
@pytest.mark.parametrize("renormalise", ["gradient_norm", "none"])
def test_backward_precondition_clip_step(kind: str, renormalise: str, llama: Any, training: Any, spy: Any) -> None:
    """Oracle h: in this order, once per optimizer step; what the optimizer consumes is clipped and preconditioned."""
    events, norms = spy
    config = GRITConfig(kfac_update_freq=1, kfac_min_samples=1, renormalise=renormalise)
    trainer = training(kind, llama(), config, max_grad_norm=1e-3)
    trainer.train()
    assert events == STEP * 4
    assert norms == pytest.approx([1e-3] * 4, rel=CLIPPED)
    manager = trainer.grit_callback.manager if kind in ("hybrid", "sft") else trainer.grit_manager
    assert manager.step == 4
    assert manager.factor_report()["coverage"] == 1.0
    # The loop goes on measuring, and a callback gives the arguments back as they were.
    assert all(math.isfinite(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row)
    assert any("grad_norm" in row for row in trainer.state.log_history)
    if kind in ("hybrid", "sft"):
        assert trainer.args.max_grad_norm == 1e-3


def test_without_clipping_nothing_is_clipped(llama: Any, training: Any, spy: Any) -> None:
    """Oracle h with max_grad_norm = 0."""
    events, _ = spy
    for kind in ("pure", "hybrid"):
        training(kind, llama(), GRITConfig(), max_grad_norm=0.0, max_steps=2).train()
    assert "clip" not in events
    assert events.count("precondition") == events.count("step") == 4


def test_pure_and_hybrid_are_the_same_method(llama: Any, training: Any, adapters: Any) -> None:
    """Oracle: two ways into the loop, one mathematics: bit-identical adapters."""
    models = []
    for kind in ("pure", "hybrid"):
        models.append(llama())
        config = GRITConfig(kfac_update_freq=2, kfac_min_samples=1, reprojection_freq=3, reprojection_k=3)
        training(kind, models[-1], config, max_grad_norm=0.1, max_steps=6).train()
    assert torch.equal(adapters(models[0]), adapters(models[1]))


def test_too_late_is_too_late(llama: Any, training: Any, adapters: Any) -> None:
    """Oracle h, control: preconditioned in on_optimizer_step or on_step_end, a run equals the one without GRIT."""
    plain = llama()
    training("none", plain).train()
    for moment in ("on_optimizer_step", "on_step_end"):
        late = llama()
        training("hybrid", late, GRITConfig(kfac_update_freq=1, kfac_min_samples=1), moment=moment).train()
        assert torch.equal(adapters(late), adapters(plain))
    with pytest.raises(GRITError, match="choose on_optimizer_step or on_step_end"):
        training("hybrid", llama(), GRITConfig(), moment="on_log")


def test_an_optimizer_given_to_the_trainer_is_wrapped(llama: Any, training: Any) -> None:
    """Released fault 4: the wrapper is installed whichever way the optimizer came, on transformers 4 and 5."""
    trainer = training("pure", llama(), GRITConfig(), max_steps=1)
    trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], 0.1)
    trainer.train()
    wrapped = trainer.optimizer.optimizer
    assert isinstance(wrapped, GRITOptimizer)
    assert isinstance(wrapped.inner, torch.optim.SGD)
    assert trainer.grit_manager.step == 1


def test_two_managers_of_one_model_do_not_both_act(llama: Any, training: Any) -> None:
    """Never silently twice: the trainer whose manager was displaced refuses to step."""
    from grit_impl.trainer import GRITCallback

    trainer = training("pure", llama(), GRITConfig())
    trainer.add_callback(GRITCallback(GRITConfig()))
    with pytest.raises(GRITError, match="not attached"):
        trainer.train()


def test_an_interrupted_training_gives_clipping_back(llama: Any, training: Any, spy: Any) -> None:
    """A second training with the same arguments after a crash still clips."""
    from transformers import TrainerCallback

    class Crash(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = training("hybrid", llama(), GRITConfig(), max_grad_norm=1e-3, max_steps=1)
    trainer.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Crash)
    events, norms = spy
    events.clear()
    norms.clear()
    trainer.train()
    assert norms == pytest.approx([1e-3], rel=CLIPPED)
    assert trainer.args.max_grad_norm == 1e-3


def test_stepping_without_gradients_is_refused(llama: Any) -> None:
    """Never silently nothing: a step before backward is an error."""
    model = llama()
    manager = GRITManager(model, GRITConfig()).attach()
    optimizer = GRITOptimizer(torch.optim.SGD(model.parameters(), 0.1), manager)
    with pytest.raises(GRITError, match="no gradient"):
        optimizer.step()
