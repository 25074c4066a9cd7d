"""Statistics from Unsloth's own fused functions and its own compiled decoder layers, on a CPU.

    python tests/method/capture/unsloth_on_cpu.py

Needs Unsloth (`requirements/gpu.txt`) and a C++ compiler, no GPU: plain torch takes the place of its Triton kernel for
SwiGLU and of attention. Four Llama layers in float32, three batches of two lengths with padding; peft's modules are the
oracle of the statistics and the gradients, dA A' = B' dB of what was noted. Once q, k and v are left to peft's modules,
as Unsloth does where they have biases (Qwen) or not all of them adapters. At last, whether a second model of another
size still compiles in the process. Ends with status 1 where something differs.
"""

from __future__ import annotations

import math
import os
import sys
import types
from typing import Any

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
os.environ["UNSLOTH_BLOCK_COMPILE"] = "1"
import unsloth  # before the libraries that it patches

# isort: split
import torch
import torch._dynamo
import unsloth.kernels.fast_lora as fast_lora
import unsloth.kernels.utils as utils
import unsloth.models._block_compile as block_compile
from fused_functions import _swiglu, _swiglu_backward
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from grit_impl.config import GRITConfig
from grit_impl.method.manager import GRITManager
from grit_impl.recipes.unsloth import compiled_layers

LAYERS = 4
# Sums of float32 roundings through four layers.
SAME = 1e-5


def attention(self: Any, hidden_states: Any, position_embeddings: Any = None, **_: Any) -> Any:
    """Causal attention around Unsloth's functions, or around peft's modules."""
    batch, length, _ = hidden_states.shape
    q, k, v = (
        fast_lora.apply_lora_qkv(self, hidden_states)
        if self.fused_qkv
        else (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
    )
    q, k, v = (x.view(batch, length, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    k, v = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (k, v))
    future = torch.full((length, length), -1e9, dtype=q.dtype).triu(1)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + future).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, length, -1).contiguous()
    return (fast_lora.apply_lora_o(self, out) if self.fused_o else self.o_proj(out)), None


fast_lora.swiglu_fg_kernel, fast_lora.swiglu_DWf_DW_dfg_kernel = _swiglu, _swiglu_backward
modeling_llama.LlamaAttention.forward = attention
STOCK = modeling_llama.LlamaDecoderLayer.forward


def make(fused: bool, compiled: bool, reentrant: bool | None, *, qkv: bool = True, width: int = 32) -> Any:
    """A Llama with LoRA; `reentrant` None: without checkpointing; `qkv` False: those three are peft's modules."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 3 * width // 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, use_cache=False, **sizes))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for layer in model.base_model.model.model.layers:
        layer.self_attn.fused_qkv, layer.self_attn.fused_o = fused and qkv, fused
        if fused:
            layer.mlp.forward = types.MethodType(fast_lora.apply_lora_mlp_swiglu, layer.mlp)
    modeling_llama.LlamaDecoderLayer.forward = STOCK
    if compiled:
        options = {name: on for name, on in block_compile._COMPILE_OPTIONS.items() if name != "triton.cudagraphs"}
        block_compile._wrap(modeling_llama.LlamaDecoderLayer, options, 1)
    return model.train()


def backward(model: Any) -> None:
    """One step's gradients."""
    generator = torch.Generator().manual_seed(1)
    for length in (16, 16, 12):
        ids = torch.randint(3, 60, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 3 :] = 0
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()


def measure(
    fused: bool, compiled: bool, reentrant: bool | None, *, qkv: bool = True
) -> tuple[list[Any], float, int, int, int]:
    """Tokens, sums and gradients; completeness error; layers that ran compiled; graphs; graphs that came later."""
    torch._dynamo.reset()
    counters.clear()
    model = make(fused, compiled, reentrant, qkv=qkv)
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    for _ in range(2):  # a function's first call outside compiled layers is counted by products of its own
        model.zero_grad()
        manager.begin_window()
        backward(model)
        found = [manager.statistics.tokens.clone(), *manager.statistics.sums.clone()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        manager.precondition()
    assert manager.completeness is not None
    graphs = []
    for attached in (False, True, False, True):  # what a plain step in between, and its return, compile
        manager.attach() if attached else manager.detach()
        backward(model)
        graphs.append(counters["stats"]["unique_graphs"])
    manager.detach()
    assert not counters["graph_break"], counters["graph_break"]
    return found, float(manager.completeness.max()), compiled_layers(model), graphs[1], graphs[3] - graphs[1]


@torch.library.custom_op("unsloth_on_cpu::dequantize", mutates_args=())
def dequantize(weight: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """A weight in its shape."""
    return weight.reshape(shape).clone()


dequantize.register_fake(lambda weight, shape: weight.new_empty(shape))


def fast_dequantize(weight: Any, state: Any = None, **_: Any) -> Any:
    """In place of Unsloth's: what matters is that a state says the shape."""
    if state is None:
        return weight
    found = dequantize(weight, list(state.shape))
    return found.t() if weight.shape[0] == 1 else found  # the packed column was given transposed


def second_model(reset: bool) -> int:
    """Layers that run compiled in a model that another one of half its width came before; weights as NF4 keeps them."""
    torch._dynamo.reset()
    first: Any = None
    for width in (16, 32):
        model = make(True, True, True, width=width)
        for module in [m for m in model.modules() if hasattr(m, "base_layer")]:
            weight = module.base_layer.weight
            module.base_layer.weight = torch.nn.Parameter(weight.detach().reshape(-1, 1), requires_grad=False)
            module.base_layer.weight.quant_state = types.SimpleNamespace(shape=weight.shape)
        # Unsloth wraps the class once.
        first = first or modeling_llama.LlamaDecoderLayer.forward
        modeling_llama.LlamaDecoderLayer.forward = first
        backward(model)
        if reset:
            torch.compiler.reset()
    return compiled_layers(model)


def main() -> int:
    """Print a line per case."""
    wrong = 0
    print(f"unsloth {unsloth.__version__}, torch {torch.__version__}; relative to peft's modules")
    cases = [(None, True, "no checkpointing"), (True, True, "reentrant"), (False, True, "not reentrant")]
    for reentrant, qkv, name in [*cases, (True, False, "reentrant, q, k and v peft's modules")]:
        truth, *_ = measure(False, False, reentrant)
        for compiled in (False, True):
            found, error, layers, graphs, later = measure(True, compiled, reentrant, qkv=qkv)
            apart = [float((ours - t).norm() / t.norm()) for ours, t in zip(found, truth, strict=True)]
            good = apart[0] == 0 and max(apart) < SAME and error < SAME and later == 0
            good = good and layers == (LAYERS if compiled else 0)
            wrong += not good
            print(
                f"{name}, {layers} of {LAYERS} layers compiled, {graphs} graphs, {later} later: "
                f"S_a {apart[1]:.1e}, S_g {apart[2]:.1e}, gradients {max(apart[3:]):.1e}, completeness {error:.1e}"
                f"{'' if good else '  WRONG'}"
            )
    fast_lora.fast_dequantize = utils.fast_dequantize = fast_dequantize
    for reset in (False, True):
        layers = second_model(reset)
        wrong += reset and layers < LAYERS
        print(f"after a smaller model{', forgotten' if reset else ''}: {layers} of {LAYERS} layers compiled")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
