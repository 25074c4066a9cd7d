"""One run of one arm, in this process: base, adapter, data, trainer, run record."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

import grit_impl.compatibility  # noqa: F401 (refuses versions that do not go together)
from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError, RunFailed
from grit_impl.machine import git_commit, versions
from grit_impl.method.factors import world_size
from grit_impl.processes import place
from grit_impl.recipes.arms import FIRST, NEUTRAL, TOKEN_FILE, Arm, RunSpec, TrainingSettings, find_arm
from grit_impl.recipes.bases import find_base
from grit_impl.recipes.tokens import Tokens, make_tokens, read_tokens
from grit_impl.record import RunRecord, fingerprint, write_atomic

Observer = Callable[[Any, int], contextlib.AbstractContextManager[Any]]


def machine() -> dict[str, Any]:
    """What a run was measured on."""
    about: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count(), "processor": platform.machine()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return about


def peak_memory() -> int:
    """Peak memory in bytes: the GPU's allocations where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepLog(TrainerCallback):
    """Writes `steps.jsonl`: the unrounded loss, tokens, seconds and memory of every optimizer step.

    The loss is summed where `training_step` returns it, because some versions of transformers round what they log.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._row: dict[str, Any] = {}
        self._loss = torch.zeros(())
        self._tokens, self._batch, self._began, self._step = 0, 0, 0.0, 0
        self.saved: Callable[[], None] = lambda: None

    def watch(self, trainer: Any) -> None:
        """Wrap the trainer's `training_step` to see each micro-batch and its loss."""
        original = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            ids = inputs["input_ids"]
            mask = inputs.get("attention_mask")
            self._tokens += int(mask.sum()) if mask is not None else ids.numel()
            self._batch = zlib.crc32(ids.cpu().numpy().tobytes(), self._batch)
            loss = original(model, inputs, *args, **kwargs)
            self._loss = self._loss.to(loss.device) + loss.detach().float()
            if self._step == 0 and trainer.accelerator.gradient_state.sync_gradients:
                self._first(model, trainer.accelerator.scaler)
            return loss

        trainer.training_step = training_step

    def _first(self, model: Any, scaler: Any) -> None:
        """What the first batch gives before anything is clipped, preconditioned or updated."""
        gradients = [p.grad.float() for p in model.parameters() if p.requires_grad and p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / (scaler.get_scale() if scaler else 1.0)
        loss, _, batch = self._of_all()
        content = {"loss": loss, "gradient_norm": norm, "batch": batch}
        write_atomic(self.record.path / FIRST, json.dumps(content))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Start the clock."""
        self._loss, self._tokens, self._batch, self._step = torch.zeros(()), 0, 0, state.global_step
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Collect; the gradient norm comes with the log that follows."""
        loss, tokens, batch = self._of_all()  # waits for the device, so that the clock is honest
        self._row = {
            "step": state.global_step,
            "loss": loss,
            "tokens": tokens,
            "batch": batch,
            "seconds": time.perf_counter() - self._began,
            "memory_bytes": peak_memory(),
        }

    def _of_all(self) -> tuple[float, int, str]:
        """Loss, tokens and the mark of the batch, over all processes; the loss is the mean of theirs."""
        if (processes := world_size()) == 1:
            return float(self._loss), self._tokens, f"{self._batch:08x}"
        counts = torch.tensor([self._tokens, self._batch], dtype=torch.double, device=self._loss.device)
        sums = torch.cat([self._loss.double()[None], counts])
        torch.distributed.all_reduce(sums)
        loss, tokens, batch = sums.tolist()
        return loss / processes, int(tokens), f"{int(batch) % 2**32:08x}"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
        """Write the row."""
        if self._row and logs and "loss" in logs:
            for name in ("grad_norm", "learning_rate"):
                self._row[name] = float(logs[name]) if name in logs else None
            self.record.append_step(self._row)
            step, loss = self._row["step"], self._row["loss"]
            self._row = {}
            if not math.isfinite(loss):  # before a checkpoint of it would be written
                raise _diverged(self.record, f"the loss is {loss} at step {step}")

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """A checkpoint was written: what observes the run keeps what it has seen, too."""
        self.saved()


def train(spec: RunSpec, path: Path, observer: Observer | None = None, checkpoints: Path | None = None) -> RunRecord:
    """Train one arm and leave a complete run record.

    Where a launcher has started several processes, each calls this with a folder of its own; losses and tokens are
    those of all of them.

    Args:
        spec: What to train.
        path: The record's folder. Checkpoints of an unfinished run of the same spec are continued from.
        observer: Called with the model and the steps made before, returns a context that encloses the training (the
            gradient ledger), whose value has a `flush()` to be called with every checkpoint.
        checkpoints: Where they are, the same for all processes. Default: in the record's folder.

    Returns:
        The record, complete.

    Raises:
        GRITError: the base model, the data set or the settings are wrong, or the folder holds checkpoints of another
            run.
        RunFailed: it diverged, or could not go on.
    """
    arm = find_arm(spec.arm)
    settings = spec.training
    cuda = torch.cuda.is_available() and find_base(spec.base_model).gpu
    use_unsloth = arm.unsloth and cuda
    if not cuda:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(settings.threads)
    if settings.precision == "fp16" and not cuda:
        raise GRITError("precision fp16 needs a CUDA GPU: choose bf16 or fp32")
    rank, processes = place()
    if processes > 1:
        _meet(cpu=not cuda)
    checkpoints = checkpoints or path / "checkpoints"
    last = _last_checkpoint(checkpoints)
    if last is not None and rank == 0:
        _require_same_run(path, spec)
    data = _tokens(spec, path, use_unsloth)
    set_seed(spec.seed)
    model, tokenizer = build_model(spec, use_unsloth)
    record = RunRecord.create(
        path,
        arm=arm.name,
        base_model=spec.base_model,
        seed=spec.seed,
        steps=settings.steps,
        config=spec.to_dict(),
        grit=spec.grit,
        versions=versions(),
        git_commit=git_commit(Path(__file__).parent),
        machine=machine(),
        unsloth=use_unsloth,
        processes=processes,
        resumed_from=None,
        started=_now(),
        finished=None,
        train_seconds=None,
        peak_memory_bytes=None,
        grit_report=None,
    )
    log = StepLog(record)
    if settings.report_to:
        # Beside the checkpoints, which are removed when the run is complete.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(path / "logs"))
    trainer, grit = build_trainer(arm, spec, model, tokenizer, data, checkpoints, log)
    done = int(last.name.rpartition("-")[2]) if last else 0
    record.truncate_steps(done)
    record.update(resumed_from=done or None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with observer(model, done) if observer else contextlib.nullcontext() as observing:
        if observing is not None:
            log.saved = observing.flush
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except GRITError as error:
            raise RunFailed(str(error)) from error
    seconds = time.perf_counter() - began

    from grit_impl.method.reprojection import save_adapter
    from grit_impl.recipes.unsloth import compiled_layers

    if bad := [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]:
        raise _diverged(record, f"{len(bad)} weights hold numbers that are not finite, first {bad[0]}")
    manager = grit()
    save_adapter(model, record.adapter, manager.reprojection if manager else None)
    report = None
    if manager is not None:
        report = {**manager.factor_report(), "spectra": manager.spectrum_history()}
    record.update(
        finished=_now(),
        # What was really in this process, not what was asked for.
        unsloth="unsloth" in sys.modules,
        train_seconds=seconds,
        peak_memory_bytes=peak_memory(),
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if cuda else None,
        compiled_layers=compiled_layers(model),
        grit_report=report,
    )
    if rank == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def _meet(cpu: bool) -> None:
    """Wait for the other processes: the first one's folder is ready when its process has started."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState(cpu=cpu).wait_for_everyone()


def _tokens(spec: RunSpec, path: Path, use_unsloth: bool) -> Tokens:
    """What the run learns from: the session's tokens, or, for a run by itself, its own."""
    if spec.tokens:
        return read_tokens(path / TOKEN_FILE, spec.tokens)
    if use_unsloth:
        raise GRITError("Unsloth changes tokenizers: make the tokens before it is imported (runs.execute.with_tokens)")
    made = make_tokens(spec, path)
    return read_tokens(path / f"{made}.json", made)


def _require_same_run(path: Path, spec: RunSpec) -> None:
    def hashed(config: dict[str, Any]) -> str:
        training = {key: value for key, value in config["training"].items() if key not in NEUTRAL}
        return fingerprint({**config, "training": training})

    if hashed(RunRecord(path).run["config"]) != hashed(spec.to_dict()):
        raise GRITError(f"{path} holds checkpoints of a run with other options: choose another folder")


def _diverged(record: RunRecord, what: str) -> RunFailed:
    why = f"it diverged: {what}; nothing after that means anything. Lower the learning rate, or look at the data"
    record.update(diverged=why)
    return RunFailed(why)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def build_model(spec: RunSpec, use_unsloth: bool) -> tuple[Any, Any]:
    """Base model with its adapter, and the tokenizer. The adapter's initial weights depend on the seed alone."""
    from grit_impl.recipes.lora import LoRASettings, add_lora

    settings = spec.training
    lora = LoRASettings(
        r=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        target_modules=tuple(settings.target_modules.split(",")),
        rslora=settings.rslora,
    )
    if use_unsloth:
        from grit_impl.recipes.unsloth import load_unsloth

        return load_unsloth(spec.base_model, lora, settings, spec.seed)
    from grit_impl.recipes.bases import load_base

    base, tokenizer = load_base(spec.base_model, device=None if find_base(spec.base_model).gpu else "cpu")
    if getattr(base, "is_loaded_in_4bit", False):
        from peft import prepare_model_for_kbit_training

        base = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            base, use_gradient_checkpointing=settings.gradient_checkpointing
        )
    return add_lora(base, lora, spec.seed), tokenizer


def _arguments(settings: TrainingSettings, seed: int, folder: Path, cpu: bool) -> dict[str, Any]:
    """Every training argument that has a default which differs between libraries, set explicitly."""
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": cpu,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 500,
        "save_total_limit": 1,
        "report_to": settings.report_to.split(",") if settings.report_to else [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def build_trainer(
    arm: Arm, spec: RunSpec, model: Any, tokenizer: Any, data: Tokens, folder: Path, log: StepLog
) -> tuple[Any, Callable[[], Any]]:
    """The arm's trainer, and a function that returns its GRITManager (or None) once training has begun."""
    cpu = not (find_base(spec.base_model).gpu and torch.cuda.is_available())
    arguments = _arguments(spec.training, spec.seed, folder, cpu)
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": data.dataset(),
        "data_collator": data.collate,
        "processing_class": tokenizer,
        "callbacks": [log],
    }
    config = GRITConfig.from_dict(spec.grit or {})
    if arm.grit == "trainer":
        from transformers import TrainingArguments

        from grit_impl.trainer import GRITTrainer

        pure: Any = GRITTrainer
        trainer = pure(args=TrainingArguments(**arguments), grit_config=config, **common)
        manager = trainer.grit_manager
        log.watch(trainer)
        return trainer, lambda: manager
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    from grit_impl.method.rules import rule_class

    if arm.grit == "callback" and rule_class(config.update_rule).whole_step:
        arguments["optim"] = "sgd"  # takes the rule's directions as they are
    sft = SFTConfig(
        max_length=spec.training.max_length, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, **arguments
    )
    callback = None if arm.grit == "none" else arm.callback(config)
    if callback is not None:
        common["callbacks"].append(callback)
    trainer = SFTTrainer(args=sft, **common)
    log.watch(trainer)
    if callback is None:
        return trainer, lambda: None
    callback.log_through(trainer)
    return trainer, lambda: callback.manager


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: a run may have been killed while it wrote one, whose state comes last."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            json.loads(state.read_text())["global_step"]
            whole.append(state.parent)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
