"""GRIT inside Hugging Face's loop: GRITTrainer (pure) and GRITCallback (hybrid).

The loop, in transformers 4.57 and 5: backward, clip, on_pre_optimizer_step, optimizer.step, on_optimizer_step,
zero_grad. Only what happens before optimizer.step can change an update.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import grit_impl.compatibility  # noqa: F401 (refuses versions that do not go together)
from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.engines import keep_whole
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer
from grit_impl.method.reprojection import save_adapter
from grit_impl.method.rules.base import WholeStep
from grit_impl.method.scalars import PREFIX, Scalars

STATE_FILE = "grit_state.pt"
SHRUNK_FOLDER = ("grit", "adapter")
# The loop measures (and in fp16 unscales) the gradients without clipping them; 0 would skip that in transformers 4.57.
MEASURE_ONLY = float("inf")


def _logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step that is being made will be logged."""
    step = state.global_step + 1
    return step % max(1, int(state.logging_steps)) == 0 or (step == 1 and args.logging_first_step)


def with_grit(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of any Trainer whose optimizer is a GRITOptimizer.

    The new class takes `grit_config` besides its base's arguments, and has the manager as `grit_manager`. Clipping
    moves from the loop into the optimizer, after preconditioning; the logged gradient norm is the raw one. What is
    logged with the loss has GRIT's numbers too (`grit/*`, see `method.scalars`), for whatever `report_to` names.
    """

    class WithGRIT(trainer_class):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, grit_config: GRITConfig | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.args: TrainingArguments = copy.copy(self.args)
            self._grit_clip = float(self.args.max_grad_norm or 0.0)
            self.args.max_grad_norm = MEASURE_ONLY
            keep_whole(self.model, self.args)
            self.grit_manager = GRITManager(self.model, grit_config)
            self._grit_scalars = Scalars(self.grit_manager)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.grit_manager.attach()
            try:
                return super().train(*args, **kwargs)
            finally:
                self.grit_manager.detach()

        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            inner = super().create_optimizer(*args, **kwargs) or self.optimizer
            if not isinstance(inner, GRITOptimizer):
                inner = GRITOptimizer(inner, self.grit_manager, self._grit_clip)
                # Before GRIT turns the gradients, and before the optimizer inside steps with what it made of them.
                inner.register_step_pre_hook(self._before_grit)
                inner.inner.register_step_pre_hook(lambda *_: self._grit_scalars.after())
            self.optimizer: torch.optim.Optimizer = inner
            return inner

        def _before_grit(self, *_: Any) -> None:
            if _logged(self.args, self.state):
                self._grit_scalars.before()

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, **self._grit_scalars.read()} if "loss" in logs else logs, *args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            # On every process, before one of them writes: what has not been added up yet.
            self.grit_manager.factors.merge()
            super()._save_checkpoint(*args, **kwargs)

        @contextlib.contextmanager
        def _whole_adapters(self) -> Iterator[None]:
            """Checkpoints under FSDP2 are those of one process: what is trained, and its optimizer, are whole.

            torch's own way through FSDP makes a trial step of the optimizer, and leaves GRIT's state out.
            """
            sharded: bool = vars(self)["is_fsdp_enabled"]
            self.is_fsdp_enabled = False
            try:
                yield
            finally:
                self.is_fsdp_enabled = sharded

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            with self._whole_adapters():
                super().save_model(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, *args: Any) -> None:
            with self._whole_adapters():
                super()._save_optimizer_and_scheduler(*args)

        def _load_optimizer_and_scheduler(self, *args: Any) -> None:
            with self._whole_adapters():
                super()._load_optimizer_and_scheduler(*args)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            reprojection = self.grit_manager.reprojection
            if self.args.should_save and state_dict is None and reprojection.shrunk:
                # Beside the full-rank adapter that training resumes from: the one to export. Two folders deep, because
                # a resuming Trainer loads adapters in a checkpoint's subfolders too.
                save_adapter(self.model, Path(str(output_dir or self.args.output_dir), *SHRUNK_FOLDER), reprojection)

    WithGRIT.__name__ = WithGRIT.__qualname__ = f"GRIT{trainer_class.__name__}"
    WithGRIT.__module__ = __name__
    return WithGRIT


GRITTrainer = with_grit(Trainer)


class GRITCallback(TrainerCallback):
    """GRIT for trainers that cannot be subclassed (TRL's SFTTrainer, Unsloth's): preconditions from a callback.

    Args:
        config: The hyperparameters.

    With a GradScaler, a step that the scaler skips counts here (it does not in `GRITTrainer`); statistics that are not
    finite are left out either way.

    Attributes:
        manager: The GRITManager; None until training begins.

    Raises:
        GRITError: at the beginning of training, where a checkpoint holds no GRIT state to resume from, or where an
            `update_rule` that computes the whole step meets another optimizer than plain SGD.
    """

    manager_class: ClassVar[type[GRITManager]] = GRITManager

    def __init__(self, config: GRITConfig | None = None) -> None:
        self.config = config or GRITConfig()
        self.manager: GRITManager | None = None
        self._scalars: Scalars | None = None
        self._given_clip: float | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Where the callback is among the trainer's `callbacks`: what an engine must know before it takes the model."""
        keep_whole(kw["model"], args)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Build the manager, restore it on a resumed run, and take over clipping."""
        keep_whole(kw["model"], args)
        self.manager = self.manager_class(kw["model"], self.config).attach()
        self._scalars = Scalars(self.manager)
        if isinstance(self.manager.rule, WholeStep):
            self._bind(self.manager.rule, args, kw["optimizer"])
        if state.global_step:
            file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_FILE
            if not file.is_file():
                raise GRITError(f"cannot resume GRIT: {file} is missing")
            self.manager.load_state_dict(torch.load(file, weights_only=True))
        # The loop clips before on_pre_optimizer_step; the order is precondition, clip, step.
        # Kept on the arguments, which outlive a training that was interrupted.
        self._given_clip = vars(args).setdefault("_grit_max_grad_norm", args.max_grad_norm)
        args.max_grad_norm = MEASURE_ONLY

    def _bind(self, rule: WholeStep, args: TrainingArguments, optimizer: Any) -> None:
        """A callback cannot replace the loop's optimizer: the rule's direction needs one that takes it as it is."""
        optimizer, name = getattr(optimizer, "optimizer", optimizer), f"update_rule = {self.config.update_rule!r}"
        plain = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)
        if not plain or args.fp16:
            found = "fp16" if plain else type(optimizer).__name__
            raise GRITError(
                f"{name} in a callback needs optim='sgd' (the rule is the optimizer) and no fp16; found {found}: "
                "change it, or use GRITTrainer (with_grit of your trainer), which takes both"
            )
        for group in optimizer.param_groups:
            group.setdefault("betas", (args.adam_beta1, args.adam_beta2))
            group.setdefault("eps", args.adam_epsilon)
        rule.bind(optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Precondition and clip."""
        if self.manager is None:
            return
        scalars = self._scalars if _logged(args, state) else None
        if scalars is not None:
            scalars.before()
        self.manager.before_step(list(kw["model"].parameters()), self._given_clip)
        if scalars is not None:
            scalars.after()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
        """Add GRIT's numbers to the history; loggers have been told before, unless `log_through` was called."""
        if self._scalars is not None and logs and "loss" in logs and f"{PREFIX}coverage" not in logs:
            logs.update(found := self._scalars.read())
            if state.log_history:
                state.log_history[-1].update(found)

    def log_through(self, trainer: Trainer) -> None:
        """Log GRIT's numbers (`grit/*`) with this trainer's loss, for whatever its `report_to` names."""
        log = trainer.log

        def with_scalars(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            found = self._scalars.read() if self._scalars is not None and "loss" in logs else {}
            log({**logs, **found}, *args, **kwargs)

        trainer.log = with_scalars  # type: ignore[method-assign]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Reproject when due."""
        if self.manager is not None:
            optimizer = kw.get("optimizer")
            self.manager.after_step(getattr(optimizer, "optimizer", optimizer))

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Write GRIT's state beside the optimizer's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.manager is not None:
            self.manager.factors.merge()
        if self.manager is not None and args.should_save and folder.is_dir():
            torch.save(self.manager.state_dict(), folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Remove the hooks and give clipping back."""
        if self.manager is not None:
            self._give_clipping_back(args)
            self.manager.detach()

    def _give_clipping_back(self, args: Any) -> None:
        args.max_grad_norm = vars(args).pop("_grit_max_grad_norm", args.max_grad_norm)
