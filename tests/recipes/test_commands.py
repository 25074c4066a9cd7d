"""`grit train` from a user's side: every public layout, every kind of arm, and one clear line for bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from grit_impl.config import GRITConfig, training_arguments
from grit_impl.errors import GRITError
from grit_impl.recipes.arms import RunSpec, TrainingSettings, find_arm
from grit_impl.record import RunRecord

LAYOUTS = {
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "dolly": {"instruction": "Who?", "context": "Ann sings.", "response": "Ann", "category": "closed_qa"},
    "boolq": {"question": "is ice cold", "answer": True, "passage": "Ice is cold."},
    "qnli": {"question": "Who sang?", "sentence": "Bob slept.", "label": 1, "idx": 0},
    "gsm8k": {"question": "2 cats and 1 cat?", "answer": "2+1=3\n#### 3"},
}
ARM = {"alpaca": "pure", "dolly": "hybrid", "boolq": "baseline", "qnli": "pure", "gsm8k": "hybrid"}


def grit(*arguments, timeout=120):
    """Run the command as a user does."""
    command = [sys.executable, "-m", "grit_impl.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train(tmp_path, layout):
    """Oracle: a local file of each public recipe's schema trains and leaves a complete record with finite losses."""
    data = tmp_path / f"{layout}.jsonl"
    data.write_text("".join(json.dumps(LAYOUTS[layout]) + "\n" for _ in range(16)))
    out = tmp_path / "run"
    done = grit(
        "train", "--arm", ARM[layout], "--dataset", data, "--steps", 2, "--set", "kfac_update_freq=1", "--out", out
    )
    assert done.returncode == 0, done.stderr
    record = RunRecord(out)
    assert record.complete
    assert [row["step"] for row in record.steps] == [1, 2]
    assert all(0 < row["loss"] < 20 for row in record.steps)
    again = grit(
        "train", "--arm", ARM[layout], "--dataset", data, "--steps", 2, "--set", "kfac_update_freq=1", "--out", out
    )
    assert "is complete" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--set", "kfac_update_freq=0"), "kfac_update_freq = 0"),
        (("--set", "kfac_dampling=1"), "did you mean kfac_damping?"),
        (("--set", "learning_rate=1"), "it belongs to the training arguments"),
        (("--dataset", "no/such/file.jsonl"), "no/such/file.jsonl"),
        (("--base-model", "./no-such-model"), "./no-such-model"),
        (("--arm", "purest"), "purest"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, named):
    """Oracle: the project's rule for bad input: status 2, one line that names the thing, no traceback, no record."""
    done = grit("train", "--steps", 2, "--out", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run" / "COMPLETE").exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Gives the spec, and the output, of a `grit train` that ends before it trains."""
    from grit_impl.runs import execute
    from grit_impl.runs.commands import train

    seen: list[RunSpec] = []

    def run_arms(specs: Any, *_: Any, **__: Any) -> None:
        seen.extend(specs)
        raise GRITError("enough")

    monkeypatch.setattr(execute, "run_arms", run_arms)
    monkeypatch.setattr(execute, "with_tokens", lambda spec, _: spec)

    def ask(*arguments: object) -> tuple[RunSpec, str]:
        done = CliRunner().invoke(train, [*map(str, arguments), "--out", str(tmp_path / f"run{len(seen)}")])
        if not seen or str(done.exception) != "enough":
            raise done.exception or AssertionError(done.output)
        return seen[-1], done.output

    return ask


def test_the_default_preset_fits_the_arm(asked: Any) -> None:
    """Oracle: the evidence's rule where GRIT is the optimizer, one that leaves the loop's alone in a callback."""
    assert asked("--arm", "pure")[0].grit == GRITConfig.preset("recommended").to_dict()
    assert asked("--arm", "hybrid")[0].grit == GRITConfig.preset("precondition").to_dict()
    assert asked("--arm", "baseline")[0].grit is None


def test_a_preset_trains_with_what_it_was_tuned_with(asked: Any) -> None:
    """Oracle: the table that `grit sweep report` wrote, for every task of the base."""
    text = (
        Path("docs/measurements/grit-vs-lora.md").read_text().partition("### Base `tiny`")[2].partition("### Base `")[0]
    )
    rows = re.findall(r"^\| \w+ \| eigenbasis \| \d of 8 \| (.*?) \|", text, re.MULTILINE)
    training, _ = asked("--arm", "pure")
    found = training.training
    said = f"beta1 {found.adam_beta1}, beta2 {found.adam_beta2}, lr {found.learning_rate}, warmup {found.warmup_steps}"
    assert rows == [said] * 4
    assert asked("--arm", "pure", "--preset", "precondition")[0].training.learning_rate == 2e-3
    assert asked("--arm", "baseline")[0].training.learning_rate == 2e-3
    assert asked("--arm", "pure", "--lr", "1e-3")[0].training.learning_rate == 1e-3
    assert asked("--arm", "pure", "--lr", "1e-3")[0].training.adam_beta2 == 0.95


def test_a_learning_rate_that_nobody_tuned_is_told(asked: Any) -> None:
    """Oracle: a base without an entry; nothing is said where the rate was chosen or the base is known."""
    other = ("--base-model", "random:tiny")
    assert "is a guess" in asked("--arm", "pure", *other)[1]
    assert "is a guess" not in asked("--arm", "pure", *other, "--lr", "1e-3")[1]
    assert "is a guess" not in asked("--arm", "pure")[1]
    assert "is a guess" not in asked("--arm", "baseline", *other)[1]
    with pytest.raises(GRITError, match="was tuned on tiny, 40m, not on 'mine'"):
        training_arguments("recommended", base="mine")


OPTIONS = {
    "per_device_train_batch_size": ("1", "batch_size", 1),
    "gradient_accumulation_steps": ("2", "accumulation", 2),
    "max_steps": ("7", "steps", 7),
    "learning_rate": ("1e-3", "learning_rate", 1e-3),
    "lr_scheduler_type": ("cosine", "lr_scheduler_type", "cosine"),
    "warmup_steps": ("0", "warmup_steps", 0),
    "weight_decay": ("0.1", "weight_decay", 0.1),
    "adam_beta1": ("0.85", "adam_beta1", 0.85),
    "adam_beta2": ("0.99", "adam_beta2", 0.99),
    "max_grad_norm": ("0.5", "max_grad_norm", 0.5),
    "optim": ("sgd", "optimizer", "sgd"),
    "gradient_checkpointing": (None, "gradient_checkpointing", True),
    "save_steps": ("3", "save_every", 3),
    "report_to": ("tensorboard", "report_to", "tensorboard"),
}
PEFT = {
    "r": ("8", "rank", 8),
    "lora_alpha": ("32", "alpha", 32),
    "lora_dropout": ("0.1", "dropout", 0.1),
    "target_modules": ("q_proj, v_proj", "target_modules", "q_proj,v_proj"),
    "use_rslora": (None, "rslora", True),
}


@pytest.mark.parametrize("form", ["dashes", "underscores", "file"])
def test_options_have_the_names_of_transformers_and_peft(asked: Any, tmp_path: Path, form: str) -> None:
    """Oracle: the fields of the libraries' own classes, given on the command line and in a file."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    assert set(OPTIONS) <= {each.name for each in fields(TrainingArguments)}
    assert set(PEFT) <= {each.name for each in fields(LoraConfig)}
    given = {**OPTIONS, **{"lora_r" if name == "r" else name: what for name, what in PEFT.items()}}
    if form == "file":
        file = tmp_path / "mine.yaml"
        lines = [f"{name}: {'true' if value is None else value}" for name, (value, *_) in given.items()]
        file.write_text("\n".join([*lines, "grit:", "  kfac_update_freq: 3"]))
        spec, _ = asked("--config", file)
        assert spec.grit is not None
        assert spec.grit["kfac_update_freq"] == 3
        assert asked("--config", file, "--max-steps", 9)[0].training.steps == 9, "the command line comes first"
    else:
        arguments: list[str] = []
        for name, (value, *_) in given.items():
            arguments += [f"--{name if form == 'underscores' else name.replace('_', '-')}", *([value] if value else [])]
        spec, _ = asked(*arguments)
    assert {name: getattr(spec.training, name) for _, name, _ in given.values()} == {
        name: value for _, name, value in given.values()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean learning-rate?"),
        ("learning_rate: fast", "--learning-rate takes a number above 0, not 'fast'"),
        ("learning_rate: {a: 1}", "takes one value"),
        ("grit: 3", "grit holds GRIT's options"),
        ("grit: {kfac_update_freq: 0}", "kfac_update_freq = 0"),
        ("- learning_rate", "holds no options"),
        ("a: [", "is no YAML file"),
        ("lr_scheduler_type: sideways", "--lr-scheduler-type takes one of linear"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(asked: Any, tmp_path: Path, text: str, message: str) -> None:
    """Oracle: the message names the file's mistake."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(GRITError, match=re.escape(message)):
        asked("--config", tmp_path / "mine.yaml")


def test_settings_reach_the_trainer(tmp_path: Path) -> None:
    """Oracle: what the optimizer, the schedule and the adapters of a built trainer hold."""
    from grit_impl.recipes.tokens import make_tokens, read_tokens
    from grit_impl.recipes.train import StepLog, build_model, build_trainer

    training = TrainingSettings(
        steps=4, warmup_steps=1, lr_scheduler_type="cosine", learning_rate=1e-3, adam_beta1=0.85, adam_beta2=0.96,
        weight_decay=0.2, rank=4, alpha=8, dropout=0.25, target_modules="q_proj,v_proj", rslora=True,
    )  # fmt: skip
    spec = RunSpec("baseline", training=training)
    data = read_tokens(tmp_path / f"{make_tokens(spec, tmp_path)}.json", make_tokens(spec, tmp_path))
    model, tokenizer = build_model(spec, use_unsloth=False)
    log = StepLog(RunRecord.create(tmp_path / "run"))
    trainer, _ = build_trainer(find_arm("baseline"), spec, model, tokenizer, data, tmp_path / "out", log)
    trainer.create_optimizer_and_scheduler(4)
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.85, 0.96), 0.2)
    assert trainer.lr_scheduler.lr_lambdas[0].func.__name__ == "_get_cosine_schedule_with_warmup_lr_lambda"
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.25, True)
    assert set(config.target_modules) == {"q_proj", "v_proj"}


def test_the_bar_shows_the_last_loss(tmp_path: Path) -> None:
    """Oracle: the last whole line; nothing before there is one, or while one is being written."""
    from grit_impl.runs.commands import _last_loss

    assert _last_loss(tmp_path) == ""
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.25}\n')
    assert _last_loss(tmp_path) == "loss 1.2500"
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert _last_loss(tmp_path) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", "choose tensorboard, wandb"), ("clearml", "needs the package clearml: pip install clearml")],
)
def test_a_logger_that_is_not_there_is_told_before_training(asked: Any, name: str, message: str) -> None:
    """Oracle: one line; transformers would say so after the model was loaded, in a traceback."""
    with pytest.raises(GRITError, match=re.escape(message)):
        asked("--report-to", name)
    assert asked("--report-to", "none")[0].training.report_to == "none"
    assert asked("--report-to", "tensorboard")[0].training.report_to == "tensorboard"
