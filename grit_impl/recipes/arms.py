"""The arms: ways of training from the same base, on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from grit_impl.config import GRITConfig, preset_training
from grit_impl.errors import GRITError
from grit_impl.recipes.bases import find_base
from grit_impl.recipes.shapes import PROJECTIONS
from grit_impl.settings import amount, count, fraction, one_of, positive, setting, whole, words

FIRST = "first.json"
"""In a run's folder: loss and gradient norm of the first batch, which no arm has changed yet."""
TOKEN_FILE = "tokens.json"
"""In a run's folder: what it reads."""


SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


def length(text: str) -> int:
    """a whole number of at least 8"""
    if (value := int(text)) < 8:
        raise ValueError(text)
    return value


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
        preset: GRIT's options in a verification, and the training options that they were tuned with; None: the
            options of the verification, and the same training as every other arm.
    """

    name: str
    description: str
    grit: Literal["none", "trainer", "callback"] = "none"
    unsloth: bool = False
    callback: Callable[[GRITConfig], Any] = _in_time
    preset: str | None = None


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
        Arm(
            "recommended",
            "GRITTrainer with the preset `recommended`, and the learning rate and betas it was tuned with",
            "trainer",
            preset="recommended",
        ),
        Arm(
            "published",
            "GRIT as published: K-FAC's gradient without renormalisation, reprojection, rank adaptation, then AdamW",
            "trainer",
            preset="released_defaults",
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
    """How an arm trains: the options of `grit train`, under the names that transformers and peft have for them."""

    steps: int = setting(200, "optimizer steps", count, "max_steps", "steps")
    batch_size: int = setting(2, "sequences per micro-batch", count, "per_device_train_batch_size", "batch_size")
    accumulation: int = setting(4, "micro-batches per step", count, "gradient_accumulation_steps", "accumulation")
    learning_rate: float = setting(2e-4, "peak learning rate", positive, "learning_rate", "lr")
    lr_scheduler_type: str = setting(
        "linear", f"schedule of the learning rate: {', '.join(SCHEDULES)}", one_of(*SCHEDULES)
    )
    warmup_steps: int = setting(5, "steps of linear warm-up", whole)
    weight_decay: float = setting(0.01, "AdamW's, and that of the rules in its place", amount)
    adam_beta1: float = setting(0.9, "decay of the mean gradient", fraction)
    adam_beta2: float = setting(0.999, "decay of the mean squared gradient", fraction)
    max_grad_norm: float = setting(1.0, "total norm that gradients are clipped to", positive)
    max_length: int = setting(2048, "tokens per sequence at most", length)
    optimizer: str = setting("adamw_torch", "optimizer of arms without GRIT's own, by transformers' name", str, "optim")
    rank: int = setting(16, "LoRA's rank", count, "lora_r", "rank")
    alpha: int = setting(16, "LoRA's scaling is alpha / r", count, "lora_alpha")
    dropout: float = setting(0.0, "share of LoRA's inputs that are dropped", fraction, "lora_dropout")
    target_modules: str = setting(
        ",".join(PROJECTIONS), "linear layers with adapters", words, "lora_target_modules", "target_modules"
    )
    rslora: bool = setting(False, "LoRA's scaling is alpha / sqrt(r)", str, "use_rslora")
    precision: str = setting("fp32", "numbers of the training: fp32, bf16 or fp16", one_of("fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    threads: int = setting(1, "CPU threads of the training process", count)
    save_every: int = setting(0, "optimizer steps between checkpoints; 0: none", whole, "save_steps", "save_every")
    report_to: str = setting("", "where to log: tensorboard, wandb, trackio, ..., separated by commas", words)


NEUTRAL = ("save_every", "report_to")
"""Settings that change nothing that is learnt."""


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


def default_training(base_model: str, *, cuda: bool, preset: str | None = None, **overrides: Any) -> TrainingSettings:
    """The plan's settings for a base model, on this kind of machine.

    Args:
        base_model: What `find_base` takes.
        cuda: Whether there is a GPU.
        preset: Of GRIT: what it was tuned with on this base comes before the base's own.
        **overrides: Fields of `TrainingSettings` that were asked for; None: the base's own.

    Raises:
        GRITError: there is no such base model, or no such preset.
    """
    base = find_base(base_model)
    asked = {name: value for name, value in overrides.items() if value is not None}
    tuned = preset_training(preset, base_model) if preset else {}
    return TrainingSettings(**{**base.training, **(base.on_gpu if cuda else base.on_cpu), **tuned, **asked})


def grit_options(arm: Arm, config: GRITConfig) -> dict[str, Any] | None:
    """The options that a run of this arm records."""
    return None if arm.grit == "none" else config.to_dict()
