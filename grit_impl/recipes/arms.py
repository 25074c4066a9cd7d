"""The arms: ways of training from the same base, on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.recipes.bases import find_base

FIRST = "first.json"
"""In a run's folder: loss and gradient norm of the first batch, which no arm has changed yet."""
TOKEN_FILE = "tokens.json"
"""In a run's folder: what it reads."""


def _in_time(config: GRITConfig) -> Any:
    from grit_impl.trainer import GRITCallback

    return GRITCallback(config)


def _late(config: GRITConfig) -> Any:
    from grit_impl.recipes.sabotage import LateCallback

    return LateCallback(config)


def _starved(config: GRITConfig) -> Any:
    from grit_impl.recipes.sabotage import StarvedCallback

    return StarvedCallback(config)


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: Its name in records, claims and reports.
        description: One line for people.
        grit: How GRIT enters: not at all, as the trainer's own optimizer, or from a callback.
        unsloth: Whether the model is Unsloth's where there is a GPU. Without one, every arm uses plain peft.
        callback: Makes the callback, and imports what it needs when it is called.
    """

    name: str
    description: str
    grit: Literal["none", "trainer", "callback"] = "none"
    unsloth: bool = False
    callback: Callable[[GRITConfig], Any] = _in_time


ARMS = {
    arm.name: arm
    for arm in (
        Arm("baseline", "LoRA: SFTTrainer and AdamW (on a GPU: Unsloth)", unsloth=True),
        Arm("rerun", "the baseline once more: the noise floor", unsloth=True),
        Arm("pure", "GRITTrainer, plain peft", "trainer"),
        Arm("hybrid", "SFTTrainer with GRITCallback before the step (on a GPU: Unsloth)", "callback", unsloth=True),
        Arm(
            "hybrid_late",
            "the seed experiment's mistake: the callback preconditions after the step",
            "callback",
            unsloth=True,
            callback=_late,
        ),
        Arm(
            "hybrid_starved",
            "the seed experiment's other mistake: statistics from module hooks that fused kernels bypass",
            "callback",
            unsloth=True,
            callback=_starved,
        ),
        Arm("baseline_peft", "LoRA: SFTTrainer and AdamW, plain peft: what pure is timed against on a GPU"),
    )
}


def find_arm(name: str) -> Arm:
    """The arm of this name.

    Raises:
        GRITError: there is none.
    """
    if name not in ARMS:
        raise GRITError(f"unknown arm {name!r}: choose one of {', '.join(ARMS)}")
    return ARMS[name]


@dataclass(frozen=True)
class TrainingSettings:
    """How every arm trains.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences per micro-batch.
        accumulation: Micro-batches per optimizer step.
        learning_rate: Peak learning rate; linear decay to zero.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: Total norm that gradients are clipped to.
        max_length: Tokens per sequence at most.
        optimizer: transformers' name, e.g. `adamw_torch`, `adamw_8bit`, `sgd`.
        rank: LoRA's r.
        alpha: LoRA's alpha.
        precision: `fp32`, `bf16` or `fp16`.
        gradient_checkpointing: Recompute activations in the backward pass.
        threads: CPU threads of the training process.
        save_every: Optimizer steps between checkpoints; 0: none.
    """

    steps: int = 200
    batch_size: int = 2
    accumulation: int = 4
    learning_rate: float = 2e-4
    warmup_steps: int = 5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 2048
    optimizer: str = "adamw_torch"
    rank: int = 16
    alpha: int = 16
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    threads: int = 1
    save_every: int = 0


@dataclass(frozen=True)
class RunSpec:
    """Everything that determines a run's result.

    Attributes:
        arm: Name of the arm.
        base_model: What `find_base` takes.
        dataset: What `load_instructions` takes.
        seed: Seed of adapters, data order and dropout.
        training: How to train.
        grit: GRIT's options; None for arms without it.
        tokens: SHA-256 of the file with the tokens that every arm reads; empty: they are made when the run begins.
    """

    arm: str
    base_model: str = "tiny"
    dataset: str = "aqi"
    seed: int = 3407
    training: TrainingSettings = field(default_factory=TrainingSettings)
    grit: dict[str, Any] | None = None
    tokens: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RunSpec:
        """The spec that `to_dict` wrote."""
        return cls(**{**value, "training": TrainingSettings(**value["training"])})


def default_training(base_model: str, *, cuda: bool, **overrides: Any) -> TrainingSettings:
    """The plan's settings for a base model, on this kind of machine.

    Args:
        base_model: What `find_base` takes.
        cuda: Whether there is a GPU.
        **overrides: Fields of `TrainingSettings` that were asked for; None: the base's own.

    Raises:
        GRITError: there is no such base model.
    """
    base = find_base(base_model)
    asked = {name: value for name, value in overrides.items() if value is not None}
    return TrainingSettings(**{**base.training, **(base.on_gpu if cuda else base.on_cpu), **asked})


def grit_options(arm: Arm, config: GRITConfig) -> dict[str, Any] | None:
    """The options that a run of this arm records."""
    return None if arm.grit == "none" else config.to_dict()
