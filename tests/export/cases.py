"""Forty right exports and forty wrong ones, written down before the verifier that has to tell them apart was finished.

A right export must be called verified (a false alarm otherwise), a wrong one must not (or the export must refuse it).
`smollm2` is SmolLM2-135M-Instruct, which is fetched; all other bases are small and random, from `tiny.make_base`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BASES: dict[str, dict[str, Any]] = {
    "llama-1-layer": {"num_hidden_layers": 1, "seed": 11},
    "llama": {"seed": 12},
    "llama-tied-llama3": {
        "tied": True, "llama3_rope": True, "num_hidden_layers": 8, "pad_rows": 13, "split": "gpt2", "seed": 13,
    },
    "llama-30-layers": {"num_hidden_layers": 30, "hidden_size": 64, "llama3_rope": True, "seed": 14},
    "llama-spare-rows": {"pad_rows": 64, "seed": 15},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "seed": 16},
    "qwen2": {"model": "Qwen2", "split": "qwen2", "seed": 17},
    "qwen2-tied": {"model": "Qwen2", "split": "qwen2", "tied": True, "num_hidden_layers": 5, "seed": 18},
    "qwen2-30-layers": {"model": "Qwen2", "split": "qwen2", "num_hidden_layers": 30, "hidden_size": 64, "seed": 19},
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "lora": {},
    "dora": {"use_dora": True},
    "patterns": {"use_rslora": True, "alpha_pattern": {"k_proj": 40}, "rank_pattern": {"k_proj": 5, "down_proj": 16}},
    "pissa": {"init_lora_weights": "pissa"},
    "embedding-dora": {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 5, 300]},
    "biases": {"bias": "all"},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "chatml": {},
}


@dataclass(frozen=True)
class Right:
    """An export that is right: a base, an adapter, a number type, and whether the adapter stays a file of its own."""

    base: str
    adapter: str
    dtype: str
    apart: bool = False

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"{self.base}-{self.adapter}-{self.dtype}{'-apart' if self.apart else ''}"


FIVE = ("f32", "f16", "bf16", "q8_0", "q4_1")
RIGHT = [
    *(Right("smollm2", "lora", dtype) for dtype in FIVE),
    Right("smollm2", "none", "f32"),
    Right("smollm2", "none", "q8_0"),
    Right("smollm2", "lora", "f32", apart=True),
    Right("smollm2", "lora", "q8_0", apart=True),
    Right("smollm2", "dora", "q8_0"),
    *(Right("qwen2", "lora", dtype) for dtype in FIVE),
    Right("qwen2-tied", "none", "f32"),
    Right("qwen2-tied", "lora", "q8_0"),
    Right("qwen2", "lora", "q8_0", apart=True),
    Right("qwen2", "lora-bias", "f16"),
    Right("qwen2-30-layers", "biases", "q8_0"),
    *(Right("llama-1-layer", "lora", dtype) for dtype in FIVE),
    *(Right("llama-tied-llama3", "lora", dtype) for dtype in FIVE),
    Right("llama-30-layers", "none", "f32"),
    Right("llama-30-layers", "lora", "bf16"),
    Right("llama-30-layers", "dora", "q8_0"),
    Right("llama", "patterns", "f32", apart=True),
    Right("llama", "pissa", "f32"),
    Right("llama", "saved", "q8_0"),
    Right("llama-tied-llama3", "embedding-dora", "f32"),
    Right("llama-tied-llama3", "tokens", "f16"),
    Right("llama-biases", "lora", "q8_0"),
    Right("llama-spare-rows", "chatml", "f16"),
]


@dataclass(frozen=True)
class Wrong:
    """A right export with one thing changed; `plant` changes a copy of the file (or of what lies beside it)."""

    right: Right
    what: str
    file: dict[str, Any] | None = None
    folder: Callable[[Path, Path], None] | None = None

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"{self.right.name}: {self.what}"


def tensor(part: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """A change of the tensors whose name contains `part`; all other bytes stay."""
    return {"change": lambda name, array: change(array) if part in name else array}


def keys(**values: Any) -> dict[str, Any]:
    """Other metadata; two underscores stand for a dot."""
    return {"keys": {name.replace("__", "."): value for name, value in values.items()}}


def rows_swapped(array: Any) -> Any:
    """Two rows change places."""
    array = array.copy()
    array[[3, 9]] = array[[9, 3]]
    return array


def columns_swapped(array: Any) -> Any:
    """Two columns change places."""
    array = array.copy()
    array[:, [3, 40]] = array[:, [40, 3]]
    return array


def unrotated(heads: int) -> Callable[[Any], Any]:
    """Hugging Face's row order in place of llama.cpp's."""
    return lambda a: a.reshape(heads, a.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(a.shape)


def one_row_zero(array: Any) -> Any:
    """One row is lost."""
    array = array.copy()
    array[7] = 0
    return array


def stale_adapter(base: Path, adapter: Path) -> None:
    """The adapter was trained on after the export."""
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    key = next(k for k in weights if "lora_B" in k)
    weights[key] = weights[key] * 1.05
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def other_key(name: str, value: Any) -> Callable[[Path, Path], None]:
    """The adapter's configuration says something else than the export was made with."""
    return lambda _, adapter: tiny.edit_json(adapter / "adapter_config.json", **{name: value})


def other_base_config(**fields: Any) -> Callable[[Path, Path], None]:
    """The base's configuration says something else than the export was made with."""
    return lambda base, _: tiny.edit_json(base / "config.json", **fields)


def stale_shard(base: Path, _: Path) -> None:
    """A shard of an older save is left beside the base."""
    shutil.copy(base / "model.safetensors", base / "model-00001-of-00009.safetensors")


def other_base_weight(base: Path, _: Path) -> None:
    """One norm of the base is not what it was at the export."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def training_tokenizer(**fields: Any) -> Callable[[Path, Path], None]:
    """Training saved another tokenizer beside its adapter."""

    def plant(base: Path, adapter: Path) -> None:
        for file in base.glob("*token*"):
            shutil.copy(file, adapter)
        for file in base.glob("*.jinja"):
            shutil.copy(file, adapter)
        path = adapter / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return plant


def training_template(base: Path, adapter: Path) -> None:
    """Training saved ChatML beside its adapter."""
    training_tokenizer()(base, adapter)
    (adapter / "chat_template.jinja").write_text(CHATML)


def another_seed(base: Path, adapter: Path) -> None:
    """The adapter is another run's."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tiny.make_adapter(base, adapter, seed=99, target_modules=settings["target_modules"])


SMOL, SMOL32 = Right("smollm2", "lora", "q8_0"), Right("smollm2", "lora", "f32")
QWEN, LLAMA3 = Right("qwen2", "lora", "q8_0"), Right("llama-tied-llama3", "lora", "q8_0")
ONE, ONE32 = Right("llama-1-layer", "lora", "q8_0"), Right("llama-1-layer", "lora", "f32")
WRONG = [
    Wrong(SMOL, "two rows of one matrix swapped", tensor("blk.17.ffn_up.weight", rows_swapped)),
    Wrong(SMOL, "one scale off by 1%", tensor("blk.29.attn_v.weight", lambda a: a * 1.01)),
    Wrong(SMOL, "queries not permuted", tensor("blk.3.attn_q.weight", unrotated(9))),
    Wrong(SMOL, "rope base of Llama 2", keys(llama__rope__freq_base=10000.0)),
    Wrong(SMOL, "the base in place of the merged model", {"base": True}),
    Wrong(SMOL, "another end token", keys(tokenizer__ggml__eos_token_id=0)),
    Wrong(SMOL, "no chat template", {"drop_keys": ("tokenizer.chat_template",)}),
    Wrong(SMOL, "one norm off by 1%", tensor("output_norm.weight", lambda a: a * 1.01)),
    Wrong(SMOL, "adapter trained on", None, stale_adapter),
    Wrong(SMOL32, "one layer's adapter missing", {"layer": 12}),
    Wrong(SMOL32, "a row of the embedding lost", tensor("token_embd.weight", one_row_zero)),
    Wrong(Right("smollm2", "lora", "q8_0", apart=True), "adapter's alpha halved", {"alpha": 0.5}),
    Wrong(QWEN, "a bias missing", {"change": lambda n, a: a * 0 if n == "blk.0.attn_q.bias" else a}),
    Wrong(QWEN, "keys permuted as a Llama's", tensor("blk.1.attn_k.weight", lambda a: unrotated(2)(a))),
    Wrong(QWEN, "rope base", keys(qwen2__rope__freq_base=10000.0)),
    Wrong(QWEN, "pre-tokenizer of GPT-2", keys(tokenizer__ggml__pre="gpt-2")),
    Wrong(QWEN, "a bias off by 1%", tensor("blk.1.attn_v.bias", lambda a: a * 1.01)),
    Wrong(QWEN, "norm's epsilon", keys(qwen2__attention__layer_norm_rms_epsilon=1e-3)),
    Wrong(LLAMA3, "divisors missing", {"change": lambda n, a: None if n == "rope_freqs.weight" else a}),
    Wrong(LLAMA3, "one divisor off by 1%", tensor("rope_freqs.weight", lambda a: a * 1.01)),
    Wrong(LLAMA3, "two columns swapped", tensor("blk.7.ffn_down.weight", columns_swapped)),
    Wrong(LLAMA3, "last layer's twin in its place", {"twin": ("blk.6.", "blk.7.")}),
    Wrong(LLAMA3, "no beginning of text", keys(tokenizer__ggml__add_bos_token=False)),
    Wrong(LLAMA3, "two merges swapped", {"merges": True}),
    Wrong(ONE, "one scale off by 1%", tensor("blk.0.attn_output.weight", lambda a: a * 0.99)),
    Wrong(ONE, "a matrix negated", tensor("blk.0.ffn_gate.weight", lambda a: -a)),
    Wrong(ONE, "head dropped", {"change": lambda n, a: None if n == "output.weight" else a}),
    Wrong(ONE, "two tokens swapped", {"tokens": True}),
    Wrong(ONE, "made in q4_1, said to be q8_0", {"coarse": True}),
    Wrong(ONE, "the base's context length halved", keys(llama__context_length=64)),
    Wrong(ONE32, "rounded to bf16 on the way", {"change": lambda n, a: bf16(a) if a.ndim > 1 else a}),
    Wrong(ONE32, "rsLoRA forgotten", None, other_key("use_rslora", True)),
    Wrong(ONE32, "another alpha", None, other_key("lora_alpha", 17)),
    Wrong(ONE32, "a stale shard", None, stale_shard),
    Wrong(ONE32, "another base", None, other_base_weight),
    Wrong(ONE32, "the base's rope", None, other_base_config(rope_parameters={"rope_theta": 4e5})),
    Wrong(ONE32, "training had another end token", None, training_tokenizer(eos_token="<|eot_id|>")),
    Wrong(ONE32, "training had another template", None, training_template),
    Wrong(ONE32, "another run's adapter", None, another_seed),
    Wrong(Right("qwen2", "lora", "q8_0", apart=True), "one factor missing", {"missing": "blk.1.ffn_up.weight"}),
]  # fmt: skip


def bf16(array: Any) -> Any:
    """Numbers rounded to bfloat16, as float32."""
    import torch

    return torch.from_numpy(array.copy()).bfloat16().float().numpy()


def apart(right: Right) -> Right:
    """The same, with the adapter in a file of its own."""
    return dataclasses.replace(right, apart=True)


assert len(RIGHT) == len({right.name for right in RIGHT}) == 40
assert len(WRONG) == len({wrong.name for wrong in WRONG}) == 40
