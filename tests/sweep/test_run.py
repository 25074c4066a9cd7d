"""One run: the lean loop against transformers' Trainer, every method, and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grit_impl.sweep.plan import load_plan, split_settings
from grit_impl.sweep.run import MAX_GRAD_NORM, _encode, _model, _schedule, collate, held_out_loss, train

STEPS, SIZE = 4, 4
SETTINGS = {"lr": 3e-3, "warmup": 2, "rank": 4, "alpha": 4, "steps": STEPS, "batch_size": SIZE, "every": 2}


def job(method: str, **rest: Any) -> dict[str, Any]:
    """A run on the tiny base."""
    return {"base": "tiny", "task": "convert", "method": method, "seed": 3, "phase": "evaluation", **rest}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("none", {"steps": 0}),
        ("loraplus", {"ratio": 4.0}),
        ("riemannian", {"reg": 0.01}),
        ("rslora", {"beta2": 0.99}),
        ("grit", {"update_rule": "eigenbasis", "kfac_update_freq": 1}),
    ],
)
def test_every_method_trains(method: str, options: dict[str, Any]) -> None:
    """Losses fall, curves have a point per evaluation, GRIT says how much it touched and repeats itself to the bit."""
    result = train(job(method), {**SETTINGS, **options}, "cpu")
    assert result["status"] == "done"
    if method == "none":
        assert [point[0] for point in result["curve"]] == [0]
        return
    assert [point[0] for point in result["curve"]] == [2, STEPS]
    assert result["curve"][-1][1] == result["loss"] < result["losses"][0]
    assert (result["coverage"] is not None) == (method == "grit")
    if method == "grit":
        assert train(job(method), {**SETTINGS, **options}, "cpu")["losses"] == result["losses"]


def test_a_run_that_diverges_says_so() -> None:
    """No loss is reported, and nothing is raised."""
    result = train(job("adamw"), {**SETTINGS, "lr": 1e12}, "cpu")
    assert (result["status"], result["loss"], result["retention"]) == ("diverged", None, None)


@pytest.mark.parametrize("method", ["adamw", "grit"])
def test_the_loop_is_the_trainers(method: str, tmp_path: Path) -> None:
    """Oracle: transformers' Trainer (GRITTrainer) on the same batches, schedule and clipping gives the same losses."""
    import random

    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from grit_impl.recipes.tasks import find_task
    from grit_impl.trainer import with_grit

    options = {"kfac_update_freq": 1, "kfac_min_samples": 1} if method == "grit" else {}
    settings = {**SETTINGS, **options}
    model, tokenizer = _model(job(method), settings, "cpu")
    rows = _encode(find_task("convert").training(STEPS * SIZE, 3), tokenizer)
    random.Random(3).shuffle(rows)

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(rows)

    losses: list[float] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        learning_rate=settings["lr"],
        warmup_steps=settings["warmup"],
        weight_decay=0.01,
        max_grad_norm=MAX_GRAD_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    keep = {"callbacks": [Keep()], "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)}
    if method == "grit":
        config = split_settings("grit", settings)[1]
        trainer: Any = with_grit(InOrder)(model=model, args=arguments, train_dataset=rows, grit_config=config, **keep)
    else:
        trainer = InOrder(model=model, args=arguments, train_dataset=rows, **keep)
    trainer.train()
    held_out = collate(_encode(find_task("convert").held_out("test"), tokenizer), tokenizer, "cpu")
    expected = held_out_loss(model.eval(), [held_out])[0]
    result = train(job(method), {**settings, "every": STEPS}, "cpu")
    assert result["losses"][0] == pytest.approx(sum(losses) / STEPS, abs=2e-4)  # transformers 4 rounds to 4 digits
    assert result["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_schedule_is_transformers() -> None:
    """Oracle: `get_linear_schedule_with_warmup`. Its first step has learning rate 0, in every arm alike."""
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, 20)
    for step in range(1, 21):
        assert schedule.get_last_lr() == pytest.approx([_schedule(step, 20, 5)], abs=1e-12)
        optimizer.step()
        schedule.step()
    assert _schedule(1, 20, 5) == 0


def test_accuracy_is_what_greedy_generation_gives() -> None:
    """Oracle: generate() on every question of a trained-enough model's set, compared to the letter."""
    from grit_impl.recipes.tiny_llama import knowledge
    from grit_impl.recipes.tiny_llama.corpus import SHORT_TEMPLATE

    model, tokenizer = _model(job("none"), {**SETTINGS, "steps": 0}, "cpu")
    facts = [(item["question"], item["answer"]) for item in knowledge.frozen_items()[:12]]
    rows = [*facts[:8], *((question, "no such thing") for question, _ in facts[8:])]
    right = 0
    for question, answer in rows:
        prompt = tokenizer(SHORT_TEMPLATE.format(instruction=question), return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += text == answer
    _, accuracy = held_out_loss(model, [collate(_encode(rows, tokenizer), tokenizer, "cpu")])
    assert accuracy == right / len(rows)
    assert 0 < right <= 8


def test_the_projects_plan_trains_every_arm_from_its_first_trial(tmp_path: Path) -> None:
    """The plan of the document, cut to two steps: nothing in it fails on the way."""
    plan = load_plan("grit-vs-lora-tiny")
    for arm in plan.trials:
        first = next(j for j in plan.jobs() if j.phase == "tuning" and j.arm == arm and j.task == "convert")
        settings = {**plan.settings(first, {}), "steps": 2, "batch_size": 2}
        assert train(job(first.method, phase="tuning"), settings, "cpu")["status"] == "done"


def test_training_seconds_are_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a clock of one second per look; in tuning there is one evaluation, at the end, but several blocks."""
    from grit_impl.sweep import run

    ticks = iter(range(1000))
    monkeypatch.setattr(run, "_clock", lambda device: float(next(ticks)))
    blocks = STEPS // SETTINGS["every"]
    for phase in ("tuning", "evaluation"):
        assert train(job("adamw", phase=phase), SETTINGS, "cpu")["train_seconds"] == blocks, phase


def test_a_ratio_is_for_those_that_have_one() -> None:
    """Oracle: the learning rates of the parameter groups. LoRA+ without its ratio is an error, not AdamW."""
    from grit_impl.config import GRITConfig
    from grit_impl.recipes.bases import load_base
    from grit_impl.recipes.lora import LoRASettings, add_lora
    from grit_impl.sweep.optimizers import build_optimizer

    settings = {"lr": 1e-3, "ratio": 4.0}
    wanted = {"adamw": {1e-3}, "rslora": {1e-3}, "loraplus": {1e-3, 4e-3}, "grit": {1e-3, 4e-3}}
    for method, rates in wanted.items():
        model = add_lora(load_base("tiny", device="cpu")[0], LoRASettings(r=4, alpha=4), 0)
        grit = GRITConfig(update_rule="eigenbasis") if method == "grit" else None
        optimizer, _ = build_optimizer(model, method, settings, grit, 1.0)
        assert {group["lr"] for group in optimizer.param_groups if group["params"]} == rates, method
    with pytest.raises(KeyError, match="ratio"):
        build_optimizer(model, "loraplus", {"lr": 1e-3}, None, 1.0)
