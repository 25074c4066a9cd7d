"""Random weights in a Llama's shape as a model folder, so that every arm, Unsloth's too, loads the same base.

`python -m grit_impl.recipes.random_base random:llama-3-8b FOLDER` needs a GPU: the matrices are stored in NF4 with
double quantisation, as `unsloth/llama-3-8b-bnb-4bit` stores its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grit_impl.record import write_atomic


def save_random(spec: str, folder: Path) -> Path:
    """Write the folder if it is not there yet, and return it.

    Args:
        spec: `random:llama-1b`, `random:llama-3-8b`, `random:llama-3-8b-8-layers`.
        folder: Where; complete once it has a `config.json`.

    Raises:
        GRITError: an unknown shape, no bitsandbytes, a full disk.
    """
    if (folder / "config.json").is_file():
        return folder
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import BitsAndBytesConfig

    from grit_impl.recipes.bases import load_base, save_tokenizer

    model, tokenizer = load_base(spec, four_bit=True, dtype="bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_torch_state_dict(tensors, folder, max_shard_size="4GB")
    save_tokenizer(tokenizer, folder)
    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        # transformers 5 keeps it in rope_parameters only, where Unsloth does not look.
        "rope_theta": 500000.0,
        "quantization_config": quantization.to_dict() | {"quant_method": "bitsandbytes"},
    }
    # Last: its presence says that the rest is whole.
    write_atomic(folder / "config.json", json.dumps(config, indent=2, default=str))
    return folder


if __name__ == "__main__":
    print(save_random(sys.argv[1], Path(sys.argv[2])))
