"""LoRA set-up: the same adapters for every arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grit_impl.compatibility  # noqa: F401 (refuses versions that do not go together)
from grit_impl.errors import GRITError
from grit_impl.recipes.shapes import PROJECTIONS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoRASettings:
    """y = W0 x + s B A x, with A (r, d_in), B (d_out, r) and s = alpha / r.

    Args:
        r: Rank, at least 1.
        alpha: Numerator of the scaling, above 0.
        dropout: Probability in [0, 1) that an input of A is dropped.
        target_modules: Names of the linear layers that get an adapter.
        rslora: Scale by alpha / sqrt(r) instead.
        dora: Learn magnitude and direction separately.
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] = PROJECTIONS
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise GRITError(f"LoRA rank r={self.r} is out of range: use 1 or more")
        if not self.alpha > 0:
            raise GRITError(f"LoRA alpha={self.alpha} is out of range: use more than 0")
        if not 0 <= self.dropout < 1:
            raise GRITError(f"LoRA dropout={self.dropout} is out of range: use 0 <= dropout < 1")
        if not self.target_modules:
            raise GRITError(f"LoRA target_modules is empty: name at least one layer, e.g. {PROJECTIONS[0]}")


def add_lora(model: PreTrainedModel, settings: LoRASettings, seed: int) -> PeftModel:
    """Freeze `model` and put adapters in it, initialised from `seed` (A Kaiming-uniform, B zero, both float32).

    The global random state is left as it was, so the order of the data does not depend on the adapters' shape.

    Raises:
        GRITError: no layer of the model has one of the target names.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    absent = sorted(set(settings.target_modules) - leaves)
    if absent:
        raise GRITError(f"the base model has no layer named {', '.join(absent)}: change the LoRA target modules")
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it; a float is as good
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        bias="none",
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
