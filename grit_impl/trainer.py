"""GRIT inside Hugging Face's loop: GRITTrainer (pure) and GRITCallback (hybrid).

The loop, in transformers 4.57 and 5: backward, clip, on_pre_optimizer_step, optimizer.step, on_optimizer_step,
zero_grad. Only what happens before optimizer.step can change an update.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.manager import GRITManager
from grit_impl.optim import GRITOptimizer
from grit_impl.rank import save_adapter

STATE_FILE = "grit_state.pt"


def with_grit(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of any Trainer whose optimizer is a GRITOptimizer.

    The new class takes `grit_config` besides its base's arguments, and has the manager as `grit_manager`. Clipping
    moves from the loop into the optimizer, after preconditioning; the logged gradient norm is the raw one.
    """

    class WithGRIT(trainer_class):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, grit_config: GRITConfig | None = None, **kwargs: Any) -> None:
            arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
            self._grit_clip = float(getattr(arguments, "max_grad_norm", None) or 0.0)
            if arguments is not None:
                arguments = copy.copy(arguments)
                arguments.max_grad_norm = 0.0
                if "args" in kwargs:
                    kwargs["args"] = arguments
                else:
                    args = (args[0], arguments, *args[2:])
            super().__init__(*args, **kwargs)
            self.grit_manager = GRITManager(self.model, grit_config).attach()

        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            super().create_optimizer(*args, **kwargs)
            if not isinstance(self.optimizer, GRITOptimizer):
                self.optimizer = GRITOptimizer(self.optimizer, self.grit_manager, self._grit_clip)
            return self.optimizer

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            if output_dir is not None and state_dict is None and self.grit_manager.reprojection.shrunk:
                # Beside the full-rank adapter that training resumes from: the one to export.
                save_adapter(self.model, Path(output_dir) / "adapter_shrunk", self.grit_manager.reprojection)

    WithGRIT.__name__ = WithGRIT.__qualname__ = f"GRIT{trainer_class.__name__}"
    WithGRIT.__module__ = __name__
    return WithGRIT


GRITTrainer = with_grit(Trainer)


class GRITCallback(TrainerCallback):  # type: ignore[misc]
    """GRIT for trainers that cannot be subclassed (TRL's SFTTrainer, Unsloth's): preconditions from a callback.

    Args:
        config: The hyperparameters.
        moment: When to precondition. Only `on_pre_optimizer_step` works. The others reproduce a mistake: gradients
            changed in `on_optimizer_step` or `on_step_end` are never used.
        capture: Where statistics are taken; see `GRITManager`.

    Attributes:
        manager: The GRITManager; None until training begins.

    Raises:
        GRITError: at the beginning of training, where the order precondition, clip, step cannot be kept.
    """

    def __init__(
        self,
        config: GRITConfig | None = None,
        moment: Literal["on_pre_optimizer_step", "on_optimizer_step", "on_step_end"] = "on_pre_optimizer_step",
        capture: Literal["auto", "modules"] = "auto",
    ) -> None:
        if moment not in ("on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
            raise GRITError(f"moment = {moment!r}: choose on_pre_optimizer_step, on_optimizer_step or on_step_end")
        self.config, self.moment, self.capture = config or GRITConfig(), moment, capture
        self.manager: GRITManager | None = None
        self._clip = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Build the manager, restore it on a resumed run, and take over clipping where its place matters."""
        self.manager = GRITManager(kw["model"], self.config, self.capture).attach()
        if state.global_step:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
            if not file.is_file():
                raise GRITError(f"cannot resume GRIT: {file} is missing")
            self.manager.load_state_dict(torch.load(file, weights_only=True))
        # With norms kept, clipping before and after preconditioning are the same; otherwise it has to come after.
        clip = float(args.max_grad_norm or 0.0)
        if clip and self.config.renormalise == "none" and self.moment == "on_pre_optimizer_step":
            if args.fp16:
                raise GRITError(
                    "renormalise='none' with fp16 and clipping needs GRITTrainer: in a callback the gradients would be "
                    "clipped before they are preconditioned"
                )
            self._clip, args.max_grad_norm = clip, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Precondition and clip."""
        self._at("on_pre_optimizer_step")
        if self._clip:
            parameters = [p for p in kw["model"].parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self._clip)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Reproject when due."""
        self._at("on_optimizer_step")
        if self.manager is not None and self.moment == "on_pre_optimizer_step":
            optimizer = kw.get("optimizer")
            self.manager.after_step(getattr(optimizer, "optimizer", optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Only the mistake of that name does anything here."""
        self._at("on_step_end")

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Write GRIT's state beside the optimizer's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.manager is not None and args.should_save and folder.is_dir():
            torch.save(self.manager.state_dict(), folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Remove the hooks and give clipping back."""
        if self._clip:
            args.max_grad_norm, self._clip = self._clip, 0.0
        if self.manager is not None:
            self.manager.detach()

    def _at(self, moment: str) -> None:
        if self.manager is not None and self.moment == moment:
            self.manager.precondition()
