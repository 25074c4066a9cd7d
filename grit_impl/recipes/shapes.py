"""Random weights in the shape of a Llama.

They are built one layer at a time on the device, and quantised on the way where asked, so that 8B parameters never
need more than one layer in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama block, which get adapters."""
# Shapes as published in the models' config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    # A quarter of the layers and hardly a vocabulary: a step takes a quarter of the time.
    "llama-3-8b-8-layers": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
}
INITIAL_STD, RANDOM_SEED = 0.02, 3407


def random_llama(shape: dict[str, Any], dtype: torch.dtype, device: torch.device, four_bit: bool) -> PreTrainedModel:
    """A Llama with normal weights, materialised module by module from the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # A dictionary: transformers 4 declares rope_theta, 5 takes it for compatibility only.
    rest: dict[str, Any] = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    config = LlamaConfig(**shape, **rest, bos_token_id=0, eos_token_id=1)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.config.dtype = dtype
    generator = torch.Generator(device).manual_seed(RANDOM_SEED)

    def normal(size: torch.Size) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, INITIAL_STD, generator=generator)

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Embedding):
            module.weight = torch.nn.Parameter(normal(module.weight.shape))
        elif isinstance(module, torch.nn.Linear):
            # The head stays in full precision, as in quantised checkpoints.
            if four_bit and name != "lm_head":
                model.set_submodule(name, _linear4bit(module, normal, dtype, device))
            elif not (name == "lm_head" and config.tie_word_embeddings):
                module.weight = torch.nn.Parameter(normal(module.weight.shape))
        elif getattr(module, "weight", None) is not None:
            module.weight = torch.nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device))
    # Its frequencies are computed, not loaded: the meta device kept nothing of them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    if four_bit:
        setattr(model, "is_loaded_in_4bit", True)  # noqa: B010  peft looks at it to pick its 4-bit layers
    model.train(False)
    return model


def _linear4bit(
    module: torch.nn.Linear, normal: Callable[[Any], torch.Tensor], dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    layer = Linear4bit(
        module.in_features,
        module.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = Params4bit(
        normal(module.weight.shape),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to(device)
    return cast("torch.nn.Module", layer)
