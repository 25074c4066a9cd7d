"""Unsloth: imported first, loaded with the settings of every other arm, its silent defaults set explicitly."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.recipes.lora import LoRASettings

if TYPE_CHECKING:
    from grit_impl.recipes.arms import TrainingSettings

PATCHED = ("trl", "transformers", "peft")


def import_unsloth() -> Any:
    """Import Unsloth, before the libraries that it patches.

    Raises:
        GRITError: it is not installed, or one of those libraries was imported before it.
    """
    early = [name for name in PATCHED if name in sys.modules] if "unsloth" not in sys.modules else []
    if early:
        raise GRITError(f"unsloth must be imported before {', '.join(early)}: run this arm in a process of its own")
    try:
        import unsloth  # type: ignore[import-not-found]
    except ImportError as error:
        raise GRITError(f"unsloth cannot be imported ({error}): pip install 'grit-verify[gpu]'") from error
    return unsloth


def load_unsloth(spec: str, lora: LoRASettings, settings: TrainingSettings, seed: int) -> tuple[Any, Any]:
    """Base model with Unsloth's kernels and an adapter, and the tokenizer.

    Args:
        spec: What `find_base` takes; Unsloth gets its folder, so that it cannot choose other weights.
        lora: The adapters.
        settings: Length and checkpointing.
        seed: Seed of the adapters.
    """
    unsloth = import_unsloth()
    import torch

    from grit_impl.recipes.bases import resolve_base

    folder = resolve_base(spec)

    checkpointing = "unsloth" if settings.gradient_checkpointing else False
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=settings.max_length,
        dtype=torch.bfloat16 if settings.precision == "bf16" else None,
        # As plain peft loads it: what is stored in four bits stays so, and nothing else becomes so.
        load_in_4bit="quantization_config" in json.loads((folder / "config.json").read_text()),
        device_map={"": 0},
    )
    torch.manual_seed(seed)
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
        max_seq_length=settings.max_length,
        use_rslora=lora.rslora,
    )
    return model, tokenizer


def compiled_layers(model: Any) -> int:
    """Decoder layers that Unsloth has run as one compiled region; it keeps the stock forward where compiling fails."""
    # As Unsloth 2026.10 notes it on each layer: the passes that went well, and 0 for a layer that was given up.
    states = [vars(module) for module in model.modules()]
    return sum(bool(s.get("_unsloth_block_checked")) and s.get("_unsloth_block_mode") != 0 for s in states)
