"""The test bench of the fault zoo: one tiny random Llama with LoRA, trained for a few steps in five ways.

A case says what is done at the moments that every training loop has. The trainers bring it there:
* `loop`: a training loop written out.
* `trainer`, `sft`: transformers' Trainer and TRL's SFTTrainer, with a callback.
* `hybrid`: SFTTrainer with a GRITCallback, `pure`: Trainer with a GRITOptimizer, whose manager is the case's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

TRAINERS = ("loop", "trainer", "sft", "hybrid", "pure")
OPTIMIZERS = ("adamw", "sgd", "adamw8bit")
SEEDS = (0, 1, 2)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH, LENGTH, VOCABULARY = 2, 24, 64
Moment = Callable[[], None]


def optimizers() -> tuple[str, ...]:
    """Those that this installation has."""
    return OPTIMIZERS if importlib.util.find_spec("bitsandbytes") else OPTIMIZERS[:2]


@dataclass
class Moments:
    """What a case does, and when. All run without gradients being recorded.

    Attributes:
        ready: The optimizer exists; training begins.
        micro: After a backward pass that is not the step's last.
        before_clip: After the last backward pass (the GRIT trainers have no such moment before their own).
        before_step: Before the optimizer, after clipping (in `hybrid` and `pure` before it).
        after_step: After the optimizer, before gradients are cleared.
        step_end: After they are cleared.
    """

    ready: Moment | None = None
    micro: Moment | None = None
    before_clip: Moment | None = None
    before_step: Moment | None = None
    after_step: Moment | None = None
    step_end: Moment | None = None

    def at(self, name: str) -> None:
        """Do what is due."""
        action = getattr(self, name)
        if action is not None:
            with torch.no_grad():
                action()


@dataclass
class Bench:
    """One run of one case.

    Attributes:
        trainer, optimizer, seed: Which.
        steps, accumulation, max_norm, rate, warmup: The training arguments.
        options: What else a case asks for: see `_loop` and `_arguments`.
    """

    trainer: str = "loop"
    optimizer: str = "adamw"
    seed: int = 0
    steps: int = 8
    accumulation: int = 2
    max_norm: float = 1.0
    rate: float = 1e-3
    warmup: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    make_optimizer: Callable[[Bench], Any] | None = None

    def __post_init__(self) -> None:
        self.model: Any = tiny_model(self.seed)
        self.built: Any = None

    @property
    def lora(self) -> dict[str, nn.Parameter]:
        """Trainable LoRA tensors by name, in the model's order."""
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n and p.requires_grad}

    def build_optimizer(self) -> Any:
        """The optimizer, over what is trainable."""
        self.built = self.make_optimizer(self) if self.make_optimizer else self.standard(list(self.lora.values()))
        return self.built

    def standard(self, parameters: Any) -> Any:
        """The optimizer that the matrix asks for."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.rate, momentum=0.9)
        if self.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found,unused-ignore]

            # Tensors below min_8bit_size keep 32-bit moments.
            return AdamW8bit(parameters, lr=self.rate, min_8bit_size=16)
        return torch.optim.AdamW(parameters, lr=self.rate)

    def batches(self) -> list[dict[str, list[int]]]:
        """Enough items for all steps, from the seed."""
        generator = torch.Generator().manual_seed(100 + self.seed)
        count = BATCH * self.accumulation * self.steps
        tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator).tolist()
        return [{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in tokens]

    def train(self, moments: Moments) -> None:
        """Run the case."""
        with _quiet():
            if self.trainer == "loop":
                self._loop(moments)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    self._trainer(moments, folder)

    def _loop(self, moments: Moments) -> None:
        if "loop" in self.options:
            self.options["loop"](self, moments)
            return
        optimizer, data = self.build_optimizer(), self.batches()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule) if optimizer else None
        scale = self.options.get("scale", 2.0**10)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if self.options.get("scaler") else None
        moments.at("ready")
        clip = self.options.get("clip", torch.nn.utils.clip_grad_norm_)
        for step in range(self.steps):
            for micro in range(self.accumulation):
                start = (step * self.accumulation + micro) * BATCH
                rows = torch.tensor([row["input_ids"] for row in data[start : start + BATCH]])
                with torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
                    loss = self.model(input_ids=rows, labels=rows).loss / self.accumulation
                    loss = loss * self.options.get("loss_factor", lambda _: 1.0)(step)
                (scaler.scale(loss) if scaler else loss).backward()
                if micro + 1 < self.accumulation:
                    moments.at("micro")
            moments.at("before_clip")
            if scaler:
                scaler.unscale_(optimizer)
            if self.max_norm:
                clip(list(self.lora.values()), self.max_norm)
            moments.at("before_step")
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            elif optimizer is not None:
                optimizer.step()
            moments.at("after_step")
            if not self.options.get("keep_gradients"):
                self.model.zero_grad(set_to_none=self.options.get("set_to_none", True))
            moments.at("step_end")
            if scheduler is not None:
                scheduler.step()

    def _schedule(self, step: int) -> float:
        if "schedule" in self.options:
            return float(self.options["schedule"](step))
        return min(1.0, step / self.warmup) if self.warmup else 1.0 - 0.5 * step / self.steps

    def _trainer(self, moments: Moments, folder: str) -> None:
        from torch.optim.lr_scheduler import LambdaLR

        trainer_class, arguments, extra = self._classes(folder)
        optimizer = self.build_optimizer()
        callbacks: list[Any] = [make_callback(moments, own_moment=self.trainer in ("hybrid", "pure"))]
        callbacks += [make_callback(more) for more in self.options.get("callbacks", ())]
        if "grit" in self.options:
            trainer_class, optimizer, extra = self._with_grit(trainer_class, optimizer, arguments, callbacks, extra)
        elif self.trainer == "hybrid":
            callbacks.append(_hybrid_callback(moments))
        elif self.trainer == "pure":
            from grit_impl.method.optimizer import GRITOptimizer

            optimizer = GRITOptimizer(optimizer, cast(Any, Shell(moments)), max_grad_norm=self.max_norm)
            arguments.max_grad_norm = 0.0
        if moments.before_clip is not None:
            trainer_class = _with_before_clip(trainer_class, moments)
        trainer = trainer_class(
            self.model,
            arguments,
            train_dataset=_dataset(self.batches()),
            callbacks=callbacks,
            optimizers=(optimizer, LambdaLR(self.built, self._schedule)),
            **extra,
        )
        _silence(trainer)
        trainer.train()

    def _with_grit(
        self, trainer_class: Any, optimizer: Any, arguments: Any, callbacks: list[Any], extra: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """GRIT itself instead of a case's preconditioner."""
        from grit_impl.trainer import GRITCallback, with_grit

        if self.trainer == "hybrid":
            callbacks.append(GRITCallback(self.options["grit"]))
            return trainer_class, optimizer, extra
        return with_grit(trainer_class), optimizer, {**extra, "grit_config": self.options["grit"]}

    def _classes(self, folder: str) -> tuple[Any, Any, dict[str, Any]]:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": self.steps,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "max_grad_norm": self.max_norm,
            "learning_rate": self.rate,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "seed": self.seed,
            **self.options.get("arguments", {}),
        }
        if self.trainer in ("trainer", "pure"):
            from transformers import Trainer, TrainingArguments, default_data_collator

            return Trainer, TrainingArguments(**common), {"data_collator": default_data_collator}
        from transformers import default_data_collator
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        common = {"gradient_checkpointing": False, "bf16": False, "remove_unused_columns": False, **common}
        arguments = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        return SFTTrainer, arguments, {"data_collator": default_data_collator, "processing_class": _tokenizer()}


class Shell:
    """A case in the place of a GRITManager."""

    def __init__(self, moments: Moments) -> None:
        from grit_impl.config import GRITConfig
        from grit_impl.method.rules import rule_class

        self.moments, self.rule = moments, rule_class("precondition")(GRITConfig(), (), cast(Any, None))

    def before_step(self, parameters: Any, max_norm: float | None) -> None:
        """GRIT's moment, before clipping and the optimizer, whether there are gradients or not."""
        self.moments.at("before_step")
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def after_step(self, optimizer: Any = None) -> None:
        """After the parameters have moved."""
        self.moments.at("after_step")

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def detach(self) -> None:
        """Nothing is attached."""


def make_callback(moments: Moments, own_moment: bool = False) -> Any:
    """The case as a callback; GRIT's trainers have `before_step` and `after_step` elsewhere."""
    from transformers import TrainerCallback

    class CaseCallback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            moments.at("ready")

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            moments.at("micro")

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if not own_moment:
                moments.at("before_step")

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            if not own_moment:
                moments.at("after_step")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.at("step_end")

    return CaseCallback()


def _hybrid_callback(moments: Moments) -> Any:
    from grit_impl.trainer import GRITCallback

    class SabotagedCallback(GRITCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.manager = Shell(moments)  # type: ignore[assignment]

        def on_train_end(self, *_: Any, **__: Any) -> None:
            """There is no manager to detach."""

        def on_save(self, *_: Any, **__: Any) -> None:
            """There is nothing to save."""

    return SabotagedCallback()


def _with_before_clip(trainer_class: Any, moments: Moments) -> Any:
    class WithMoment(trainer_class):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                moments.at("before_clip")
            return loss

    return WithMoment


def tiny_model(seed: int, layers: int = 2, **lora: Any) -> Any:
    """A random Llama (hidden 32) with LoRA of rank 4 on all projections: 14 layers, 28 tensors."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=list(PROJECTIONS), **lora))
    with torch.no_grad():  # away from B = 0, where A has no gradient
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    from datasets import Dataset  # type: ignore[import-untyped]

    return Dataset.from_list(rows)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w0")


def _silence(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


class Whitening:
    """An honest small preconditioner, independent of GRIT: dA <- P dA, dB <- dB P, norms kept.

    P is the inverse of the running average of G G' (r x r), plus damping.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], damping: float = 0.1) -> None:
        self.parameters, self.damping = dict(parameters), damping
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def matrix(self, name: str, grad: Tensor) -> Tensor:
        """P for one tensor, after taking its gradient into account."""
        g = grad if "lora_A" in name else grad.T
        square = (g.float() @ g.float().T) / g.float().square().sum().clamp_min(1e-30)
        self.average[name] = 0.5 * self.average.get(name, square) + 0.5 * square
        s = self.average[name]
        eye = torch.eye(len(s))
        inverse: Tensor = torch.linalg.inv(s + (self.damping * s.trace() / len(s) + 1e-12) * eye)
        return inverse

    def product(self, name: str, grad: Tensor, matrix: Tensor) -> Tensor:
        """P applied to one gradient, with its norm."""
        new = matrix @ grad.float() if "lora_A" in name else grad.float() @ matrix
        kept: Tensor = new * grad.float().norm() / new.norm().clamp_min(1e-30)
        return kept.to(grad.dtype)

    def result(self, name: str, grad: Tensor) -> Tensor:
        """The preconditioned gradient."""
        return self.product(name, grad, self.matrix(name, grad))

    @torch.no_grad()
    def apply(self) -> None:
        """Precondition in place."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                p.grad.copy_(self.result(name, p.grad))


def whitened(bench: Bench) -> Moments:
    """That preconditioner, before every step: what most cases begin with."""
    return Moments(before_step=Whitening(bench.lora).apply)


def at_step(step: int, action: Callable[[], Any]) -> Callable[[], None]:
    """Do something once, when called for the step-th time."""
    count = [0]

    def run() -> None:
        count[0] += 1
        if count[0] == step:
            action()

    return run
