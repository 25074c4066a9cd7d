"""How llama.cpp sees a Llama: names of tensors, order of rows in rotary layers, settings, frequency divisors.

Source: llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter


def write_architecture(writer: GGUFWriter, config: dict[str, Any], rows: int) -> None:
    """The metadata that llama.cpp builds the model from; `rows` is the number of tokens with an embedding."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(rows)
    writer.add_rope_dimension_count(head_dim)
    rope = rope_settings(config)
    writer.add_rope_freq_base(rope["theta"])
    if rope["type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4): theta, type, ...

    Raises:
        GRITError: a scaling that cannot be written to GGUF (yarn, dynamic, longrope).
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise GRITError(f"cannot export rope scaling {kind!r}: default, linear and llama3 are supported")
    return {**scaling, "theta": float(theta), "type": kind}


def rope_factors(config: dict[str, Any]) -> torch.Tensor | None:
    """Llama 3's frequency divisors (head_dim / 2), `modeling_rope_utils._compute_llama3_parameters` in float32."""
    rope = rope_settings(config)
    if rope["type"] != "llama3":
        return None
    import torch

    dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    frequencies = 1.0 / (rope["theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors, dtype=torch.float32)


def permute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key matrix (rows, ...) from Hugging Face's rotary layout to llama.cpp's."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def rotary_heads(name: str, config: dict[str, Any]) -> int | None:
    """By how many heads a parameter's rows are to be permuted; None for all but queries and keys."""
    if ".q_proj" in name:
        return int(config["num_attention_heads"])
    if ".k_proj" in name:
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


@functools.cache
def _name_map(layers: int) -> Any:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH.LLAMA, layers)


def gguf_name(name: str, config: dict[str, Any]) -> str:
    """A Hugging Face parameter's name in a GGUF Llama. Raises `GRITError` if it has none."""
    found = _name_map(int(config["num_hidden_layers"])).get_name(name, (".weight", ".bias"))
    if found is None:
        raise GRITError(f"cannot export tensor {name}: it has no place in a GGUF Llama")
    return str(found)
