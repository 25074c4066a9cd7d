"""Killed and resumed, a run continues to the bit: parameters, losses and GRIT's own state."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.trainer import SHRUNK_FOLDER

STEPS = 6
CONFIG = GRITConfig(
    kfac_update_freq=2,
    kfac_min_samples=8,
    reprojection_freq=3,
    enable_rank_adaptation=True,
    rank_adaptation_threshold=0.7,
    min_lora_rank=2,
    lambda_kfac=1e-3,
    regularizer_warmup_steps=4,
    grit_cov_update_freq=2,
)


class Kill(TrainerCallback):
    """Dies in the middle of step k + 1, after the checkpoint of step k."""

    def __init__(self, k: int) -> None:
        self.k = k

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.k:
            raise KeyboardInterrupt


@pytest.fixture
def run(llama: Any, training: Any, tmp_path: Any) -> Any:
    """(kind, name, kill, resume) -> the trainer after training; dropout is on, so that random states count."""

    def go(kind: str, name: str, kill: int | None = None, resume: bool = False) -> Any:
        model = llama(seed=1, lora_dropout=0.1)
        if resume:
            # Adapters that a checkpoint has to replace.
            for parameter in (p for p in model.parameters() if p.requires_grad):
                torch.nn.init.normal_(parameter)
        arguments = {"output_dir": str(tmp_path / name), "save_strategy": "steps", "save_steps": 1}
        trainer = training(kind, model, CONFIG, max_steps=STEPS, lr_scheduler_type="linear", **arguments)
        if kill is not None:
            trainer.add_callback(Kill(kill))
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=True if resume else None)
        return trainer

    return go


def manager(trainer: Any) -> Any:
    return getattr(trainer, "grit_manager", None) or trainer.grit_callback.manager


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_killed_and_resumed_is_bit_identical(kind: str, run: Any, adapters: Any, losses: Any) -> None:
    """Oracle f: killed inside steps 2, 4 and 6 (before and after reprojections) against never killed."""
    whole = run(kind, "whole")
    for k in (1, 3, 5):
        run(kind, f"killed{k}", kill=k)
        resumed = run(kind, f"killed{k}", resume=True)
        assert resumed.state.global_step == STEPS
        assert set(resumed.model.peft_config) == {"default"}
        assert manager(resumed).reprojection.ranks == manager(whole).reprojection.ranks
        assert manager(resumed).step == STEPS
        assert torch.equal(adapters(resumed.model), adapters(whole.model))
        assert losses(resumed) == losses(whole)
        assert json.dumps(manager(resumed).factor_report()) == json.dumps(manager(whole).factor_report())
        assert manager(resumed).spectrum_history() == manager(whole).spectrum_history()


def test_hybrid_does_not_resume_without_its_state(run: Any, tmp_path: Any) -> None:
    """Never silently afresh: a checkpoint without GRIT's state is refused by name."""
    run("hybrid", "killed", kill=2)
    (tmp_path / "killed" / "checkpoint-2" / "grit_state.pt").unlink()
    with pytest.raises(GRITError, match=r"grit_state\.pt is missing"):
        run("hybrid", "killed", resume=True)


def test_checkpoints_hold_the_adapter_to_export(run: Any, tmp_path: Any, llama: Any) -> None:
    """The shrunk adapter lies in every checkpoint of a shrunk run, where resuming does not mistake it for its own."""
    from peft import PeftModel

    trainer = run("pure", "whole")
    folder = (tmp_path / "whole" / f"checkpoint-{STEPS}").joinpath(*SHRUNK_FOLDER)
    loaded = PeftModel.from_pretrained(llama(seed=1).unload(), folder)
    ranks = [loaded.base_model.model.get_submodule(layer.path).r["default"] for layer in manager(trainer).layers]
    assert ranks == manager(trainer).reprojection.ranks
    assert min(ranks) < 4
