"""How llama.cpp sees a Llama or a Qwen2: names of tensors, order of rows in rotary layers, settings, divisors.

Source: llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Architecture:
    """A model that can be written: its class in transformers, llama.cpp's name, and what the two do differently.

    `permuted`: llama.cpp rotates neighbouring rows of queries and keys where transformers rotates the two halves.
    `biases`: the projections that always have a bias; where the name is empty, the configuration says.
    """

    model: str
    name: str
    permuted: bool
    biases: tuple[str, ...] = ()


ARCHITECTURES = {
    known.model: known
    for known in (
        Architecture("LlamaForCausalLM", "llama", permuted=True),
        Architecture("Qwen2ForCausalLM", "qwen2", permuted=False, biases=("q_proj", "k_proj", "v_proj")),
    )
}
_IN_LAYER = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def architecture(config: dict[str, Any], where: Path | None = None) -> Architecture:
    """The architecture that a model's configuration names. Raises `GRITError` if it cannot be written."""
    named = (config.get("architectures") or ["?"])[0]
    if named not in ARCHITECTURES:
        place = f" from {where}" if where is not None else ""
        raise GRITError(f"cannot export {named}{place}: the exporter writes {', '.join(ARCHITECTURES)} only")
    return ARCHITECTURES[named]


def parameter_names(layers: int) -> list[str]:
    """All names that a parameter can have in transformers, biases and a head of its own included, layer after layer."""
    inside = [f"model.layers.{i}.{part}.{kind}" for i in range(layers) for part in _IN_LAYER for kind in _kinds(part)]
    return ["lm_head.weight", "model.embed_tokens.weight", *inside, "model.norm.weight"]


def _kinds(part: str) -> tuple[str, ...]:
    return ("weight",) if part.endswith("norm") else ("bias", "weight")


def head_size(config: dict[str, Any]) -> int:
    """Numbers per attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def write_architecture(writer: GGUFWriter, config: dict[str, Any], rows: int) -> None:
    """The metadata that llama.cpp builds the model from; `rows` is the number of tokens with an embedding."""
    heads, head_dim = int(config["num_attention_heads"]), head_size(config)
    if config.get("use_sliding_window"):
        raise GRITError("cannot export use_sliding_window=true: llama.cpp would attend to the whole text")
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

    dim = head_size(config)
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


def unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back from `permute`."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def rotary_heads(name: str, config: dict[str, Any]) -> int | None:
    """By how many heads a parameter's rows are to be permuted; None for all but a permuted model's queries and keys."""
    if not architecture(config).permuted:
        return None
    if ".q_proj" in name:
        return int(config["num_attention_heads"])
    if ".k_proj" in name:
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


@functools.cache
def _name_map(name: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {text: arch for arch, text in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(known[name], layers)


def gguf_name(name: str, config: dict[str, Any]) -> str:
    """A Hugging Face parameter's name in a GGUF file. Raises `GRITError` if it has none."""
    ours = architecture(config)
    found = _name_map(ours.name, int(config["num_hidden_layers"])).get_name(name, (".weight", ".bias"))
    if found is None:
        raise GRITError(f"cannot export tensor {name}: it has no place in a GGUF {ours.name}")
    return str(found)
