"""The LoRA layers of a model: which there are, and their two trained matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from grit_impl.errors import GRITError


@dataclass(frozen=True)
class LoRAFactorPair:
    """One LoRA layer and adapter.

    Attributes:
        path: The module's name in the base model, e.g. `model.layers.0.self_attn.q_proj`.
        module: peft's LoRA layer.
        adapter: Name of the adapter.
    """

    path: str
    module: Any
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """lora_A's weight, (r, d_in), looked up each time: peft may re-create it."""
        return _weight(self.module, "lora_A", self.adapter)

    @property
    def b(self) -> nn.Parameter:
        """lora_B's weight, (d_out, r)."""
        return _weight(self.module, "lora_B", self.adapter)

    @property
    def rank(self) -> int:
        """r of this layer."""
        return int(self.module.r[self.adapter])


def _weight(layer: Any, factor: str, adapter: str) -> nn.Parameter:
    # Called several times per step and layer: attributes of nn.Module take ten times as long as its dictionaries.
    linear = layer._modules[factor]._modules[adapter]
    weight: nn.Parameter | None = linear._parameters.get("weight")
    return linear.weight if weight is None else weight


def find_layers(model: nn.Module) -> list[LoRAFactorPair]:
    """All LoRA layers of a PEFT model that are active and trained, in the model's order.

    Raises:
        GRITError: there are none, or one is of a kind whose statistics GRIT cannot take (embeddings, convolutions,
            expert weights, several devices).
    """
    from peft.tuners.lora import LoraLayer

    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        path = name.removeprefix("base_model.model.")
        base = module.get_base_layer()
        for adapter in module.active_adapters:
            lora_a = dict(module.lora_A).get(adapter)
            if lora_a is None and adapter not in module.lora_embedding_A:
                continue
            # Linear layers, quantised ones among them, have in_features; transformers' Conv1D is linear and has nf.
            if not isinstance(lora_a, nn.Linear) or not (hasattr(base, "in_features") or hasattr(base, "nf")):
                raise GRITError(
                    f"GRIT supports LoRA on linear layers; {path} is {type(base).__name__}: leave it out of "
                    "target_modules (or target_parameters)"
                )
            pair = LoRAFactorPair(path, module, adapter)
            if lora_a.weight.requires_grad:
                layers.append(pair)
            elif pair.b.requires_grad:
                raise GRITError(f"{path}: GRIT needs lora_A to be trained where lora_B is")
    if not layers:
        raise GRITError("GRIT found no trainable LoRA layer: add an adapter with peft.get_peft_model first")
    devices = {str(layer.a.device) for layer in layers}
    if len(devices) > 1:
        raise GRITError(f"GRIT needs all adapters on one device; found {', '.join(sorted(devices))}")
    return layers
