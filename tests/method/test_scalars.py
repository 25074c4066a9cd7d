"""What a training log says of GRIT: each number against one that was worked out another way."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from grit_impl.config import GRITConfig, update_rules
from grit_impl.ledger.verdict import Verdict
from grit_impl.method.rules import rule_class
from grit_impl.trainer import GRITCallback, GRITTrainer

STEPS = 6
NAMES = {"coverage", "inversions", "effective_rank_a", "effective_rank_g", "condition_a", "condition_g"}


def train(rule: str, folder: Path, *, callback: bool = False, **options: Any) -> Any:
    """A small training under a rule; gives the trainer, and the gradients before and after GRIT, step by step."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (32, 12)).tolist()]
    defaults = {"learning_rate": 1e-2, "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1}
    defaults |= {"report_to": []}
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True,
        optim="sgd" if callback else "adamw_torch", **{**defaults, **options},
    )  # fmt: skip
    config = GRITConfig(update_rule=rule, kfac_update_freq=2, kfac_min_samples=8)
    if callback:
        own = GRITCallback(config)
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[own])
        own.log_through(trainer)
    else:
        trainer = GRITTrainer(model=model, args=args, train_dataset=rows, grit_config=config)
    trainer.train()
    return trainer


def logged(trainer: Any) -> list[dict[str, float]]:
    """GRIT's numbers in each row with a loss."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{name[5:]: value for name, value in row.items() if name.startswith("grit/")} for row in rows]


@pytest.mark.parametrize("callback", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("rule", update_rules())
def test_every_rule_logs_its_numbers(rule: str, callback: bool, tmp_path: Path) -> None:
    """Oracle: the table of names; a rule with a metric has a prediction, at most lr^2 / 2; some have no factors."""
    found = logged(train(rule, tmp_path, callback=callback))
    assert len(found) == STEPS
    assert set(found[-1]) == {"turned_degrees"} | ({"predicted_kl"} if rule == "trust_region" else set()) | (
        NAMES if rule_class(rule).captures else {"coverage", "inversions"}
    )
    assert all(0 <= row["turned_degrees"] <= 180 for row in found)
    assert all(row.get("predicted_kl", 0) <= (1e-2) ** 2 / 2 * (1 + 1e-6) for row in found)
    assert [row["inversions"] for row in found] == sorted(row["inversions"] for row in found)


def test_numbers_are_those_of_the_factors(tmp_path: Path) -> None:
    """Oracle: `factor_report`, which works layer by layer in float64, after a last step that inverted."""
    trainer = train("precondition", tmp_path)
    found, report = logged(trainer)[-1], trainer.grit_manager.factor_report()
    assert found["coverage"] == pytest.approx(report["coverage"])
    assert found["inversions"] == report["inversions"] == STEPS // 2
    for key in "ag":
        ranks = [layer[f"effective_rank_{key}"] for layer in report["layers"]]
        assert found[f"effective_rank_{key}"] == pytest.approx(statistics.fmean(ranks), rel=1e-4)
        conditions = sorted(layer[f"condition_{key}"] for layer in report["layers"])
        assert found[f"condition_{key}"] == pytest.approx(conditions[(len(conditions) - 1) // 2], rel=1e-3)


def test_degrees_are_those_between_the_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the gradients before and after `before_step`, copied by the test."""
    from grit_impl.method.manager import GRITManager

    original, angles = GRITManager.before_step, []

    def before_step(self: Any, parameters: Any, max_norm: Any) -> None:
        lora = [p for layer in self.layers for p in (layer.a, layer.b)]
        raw = torch.cat([p.grad.flatten() for p in lora]).double()
        original(self, parameters, max_norm)
        made = torch.cat([p.grad.flatten() for p in lora]).double()
        angles.append(math.degrees(math.acos(min(1.0, float(raw @ made / raw.norm() / made.norm())))))

    monkeypatch.setattr(GRITManager, "before_step", before_step)
    found = [row["turned_degrees"] for row in logged(train("precondition", tmp_path))]
    assert found[1:] == pytest.approx(angles[1:], abs=0.05)
    assert found[0] < 0.1, "nothing is inverted yet"
    assert found[-1] > 5


def test_only_logged_steps_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the calls counted; copying gradients in every step would cost every step."""
    from grit_impl.method.scalars import Scalars

    original, calls = Scalars.before, []
    monkeypatch.setattr(Scalars, "before", lambda self: (calls.append(1), original(self)))
    assert len(logged(train("eigenbasis", tmp_path, logging_steps=3))) == 2
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("callback", [False, True], ids=["trainer", "callback"])
def test_loggers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callback: bool) -> None:
    """Oracle: TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train("precondition", tmp_path, callback=callback, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    assert {f"train/grit/{name}" for name in NAMES | {"turned_degrees"}} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/grit/turned_degrees")) == STEPS


def test_a_notebook_shows_verdicts_and_configurations() -> None:
    """Oracle: by hand; what a run says is escaped."""
    shown = Verdict("dropped", False, "No: <b>gone</b>")._repr_html_()
    assert "dropped" in shown
    assert "&lt;b&gt;gone" in shown
    assert "<b>gone" not in shown
    shown = GRITConfig.preset("recommended", kfac_update_freq=3)._repr_html_()
    assert shown.index("update_rule") < shown.index("kfac_update_freq") < shown.index("kfac_damping")
    assert "<td>3</td><td></td>" in shown
