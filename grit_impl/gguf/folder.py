"""A GGUF file as a Hugging Face folder: what llama.cpp computes with, for training and for comparison.

transformers has a loader of its own; it loses Llama 3's frequency divisors, and one version of it took the beginning of
a text for its end. Here everything comes from the file's own fields, and what they do not say is refused.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.gguf.architecture import (
    ARCHITECTURES,
    Architecture,
    gguf_name,
    head_size,
    parameter_names,
    rope_factors,
    rotary_heads,
    unpermute,
)
from grit_impl.gguf.splits import pre_tokenizer
from grit_impl.gguf.tensors import Weights
from grit_impl.tables import brief

if TYPE_CHECKING:
    import torch

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
ENDS = ("eos", "eot", "eom")
# Bytes of weights in one file of the folder.
SHARD = 4 << 30


def to_folder(gguf: Path, out: Path) -> Path:
    """Write a GGUF file as a model folder: config.json, weights in the fewest bits that hold them exactly, tokenizer.

    Weights that are no 16-bit numbers become float32, so that a file made from the folder gives the same logits.

    Args:
        gguf: A whole model of an architecture that the export knows.
        out: The folder; it appears when it is complete.

    Returns:
        `out`.

    Raises:
        GRITError: the file is damaged, is an adapter, has an architecture, a tensor, a scaling or a tokenizer that
            cannot be turned into a folder; or `out` holds something already, or the disk is full.
    """
    source = Weights(gguf, arrays=True)
    if out.is_dir() and any(out.iterdir()):
        raise GRITError(f"{out} is not empty: give another folder, or remove it first")
    config = read_config(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tokenizer = build_tokenizer(source)
        tokenizer.save_pretrained(partial)
        # transformers 5 writes a class name that 4 does not know.
        settings = partial / "tokenizer_config.json"
        settings.write_bytes(settings.read_bytes().replace(b"TokenizersBackend", b"PreTrainedTokenizerFast"))
        _write_config(partial, config, source, tokenizer)
        _write_weights(partial, config, source)
        partial.chmod(0o755)
        partial.replace(out)
    except OSError as error:
        raise GRITError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def read_config(source: Weights) -> dict[str, Any]:
    """The configuration that a GGUF file's keys and tensors describe, with the names of transformers.

    Raises:
        GRITError: something in the file has no place in it.
    """
    found, path = source.metadata, source.path
    if found.get("general.type", "model") != "model":
        raise GRITError(f"{path} is no model but has general.type {found['general.type']!r}")
    ours = _known(found.get("general.architecture"), path)
    if "token_embd.weight" not in source:
        raise GRITError(f"{path} lacks tensor token_embd.weight")

    def get(key: str, default: Any = None) -> Any:
        value = found.get(f"{ours.name}.{key}", default)
        if value is None:
            raise GRITError(f"{path} lacks {ours.name}.{key}")
        return value

    def whole(key: str, default: int | None = None) -> int:
        return _whole(get(key, default), f"{path} has {ours.name}.{key}", least=1)

    def real(key: str, default: float | None = None) -> float:
        return _real(get(key, default), f"{path} has {ours.name}.{key}")

    heads = whole("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [ours.model],
        "vocab_size": source.entries["token_embd.weight"].shape[0],
        "hidden_size": whole("embedding_length"),
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "max_position_embeddings": whole("context_length"),
        # Stored in float32; the shortest decimal that gives the same number is what was meant.
        "rms_norm_eps": _short(real("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(real("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in source,
        "attention_bias": "blk.0.attn_q.bias" in source,
        "mlp_bias": "blk.0.ffn_up.bias" in source,
    }
    config["head_dim"] = whole("attention.key_length", config["hidden_size"] // heads)
    for key in ("expert_count", "attention.sliding_window"):
        if found.get(f"{ours.name}.{key}"):
            raise GRITError(f"{path} has {ours.name}.{key}={found[f'{ours.name}.{key}']}, which is not supported")
    rotated = whole("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"] or whole("attention.value_length", rotated) != rotated:
        raise GRITError(f"{path} rotates {rotated} of {config['head_dim']} numbers per head, which is not supported")
    config["rope_scaling"] = _rope_scaling(source, ours, config)
    _check_tensors(source, config)
    return config


def _known(name: Any, path: Path) -> Architecture:
    for known in ARCHITECTURES.values():
        if known.name == name:
            return known
    names = ", ".join(known.name for known in ARCHITECTURES.values())
    raise GRITError(f"{path} has architecture {name!r}: only {names} can be turned into a model folder")


def _whole(value: Any, what: str, least: int = 0) -> int:
    """A count or a token's number, which a file may hold as anything."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise GRITError(f"{what} = {brief(value)}, which is no whole number of at least {least}")


def _real(value: Any, what: str) -> float:
    """A finite number above zero."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise GRITError(f"{what} = {brief(value)}, which is no number above zero")


def _short(number: float) -> float:
    import numpy as np

    return float(str(np.float32(number)))


def _rope_scaling(source: Weights, ours: Architecture, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = source.metadata.get(f"{ours.name}.rope.scaling.type", "none")
    if "rope_freqs.weight" in source:
        return _llama3(source("rope_freqs.weight"), config, source.path)
    if kind == "none":
        return None
    if kind != "linear":
        raise GRITError(f"{source.path} has rope scaling {kind!r}: only linear and Llama 3's are supported")
    key = f"{ours.name}.rope.scaling.factor"
    return {"rope_type": "linear", "factor": _real(source.metadata.get(key), f"{source.path} has {key}")}


def _llama3(divisors: torch.Tensor, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Llama 3's four settings, found from the divisors that they gave. Only high / low and context / low matter."""
    for high in (4.0, 2.0, 8.0):
        for power in range(4, 21):
            settings = {
                "rope_type": "llama3",
                "factor": float(divisors.max()),
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": 2**power,
            }
            given = rope_factors({**config, "rope_scaling": settings})
            if given is not None and given.shape == divisors.shape and given.allclose(divisors, rtol=1e-5):
                return settings
    raise GRITError(f"{path}: rope_freqs.weight holds divisors that no setting of Llama 3's scaling gives")


def _check_tensors(source: Weights, config: dict[str, Any]) -> None:
    """Everything that is needed is there, in its shape, and nothing is left over."""
    places = {gguf_name(name, config): name for name in parameter_names(config["num_hidden_layers"])}
    if unknown := sorted(set(source.entries) - set(places) - {"rope_freqs.weight"}):
        raise GRITError(f"{source.path} holds tensor {unknown[0]}, which has no place in {config['architectures'][0]}")
    for place, name in places.items():
        if place not in source and name != "lm_head.weight" and (name.endswith(".weight") or _biased(name, config)):
            raise GRITError(f"{source.path} lacks tensor {place}")
        if place in source and name.endswith(".bias") and not _biased(name, config):
            raise GRITError(f"{source.path} holds {place}, but not all of its kind")
        if place in source and source.entries[place].shape != _shape(name, config):
            raise GRITError(f"{source.path}: {place} is {source.entries[place].shape}, not {_shape(name, config)}")


def _biased(name: str, config: dict[str, Any]) -> bool:
    ours = ARCHITECTURES[config["architectures"][0]]
    if ours.biases:
        return name.split(".")[-2] in ours.biases
    return bool(config["mlp_bias"] if ".mlp." in name else config["attention_bias"])


def _shape(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], head_size(config)
    heads, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    module = name.split(".")[-2]
    shape = {
        "embed_tokens": (config["vocab_size"], hidden), "lm_head": (config["vocab_size"], hidden),
        "q_proj": (heads, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }.get(module, (hidden,))  # fmt: skip
    return shape[:1] if name.endswith(".bias") else shape


def build_tokenizer(source: Weights) -> Any:
    """The tokenizer that a GGUF file describes, as transformers' `PreTrainedTokenizerFast`.

    Raises:
        GRITError: it is no byte-level BPE, or cuts text in a way that is not known, or names no end of text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    path = source.path

    def get(key: str, default: Any = None) -> Any:
        return source.metadata.get(f"tokenizer.ggml.{key}", default)

    if get("model") != "gpt2":
        raise GRITError(f"{path} has a {get('model')!r} tokenizer: only byte-level BPE (gpt2) is supported")
    texts, merges, pre = get("tokens") or [], get("merges") or [], str(get("pre"))
    kinds = get("token_type") or [NORMAL] * len(texts)
    split = pre_tokenizer(pre)
    if split is None or not texts or not merges or len(kinds) != len(texts):
        reason = f"splits text as {pre!r}, which is not known" if split is None else "has no tokens or no merges"
        raise GRITError(f"the tokenizer of {path} {reason}")
    # Names that padding gave to rows without a token are no tokens.
    vocabulary = {text: i for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind != UNUSED}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # tokenizers raises the base class
        raise GRITError(f"the tokenizer of {path} is damaged: {error}") from error
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    added = [
        AddedToken(text, special=kind == CONTROL, normalized=False)
        for text, kind in zip(texts, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)

    def text(name: str) -> str | None:
        if (value := get(key := f"{name}_token_id")) is None:
            return None
        i = _whole(value, f"{path} has tokenizer.ggml.{key}")
        if i >= len(texts):
            raise GRITError(f"{path} names token {i} as its {name}, of {len(texts)} tokens")
        return str(texts[i])

    names = {"bos_token": text("bos"), "eos_token": text("eos"), "pad_token": text("padding") or text("eos"),
             "unk_token": text("unknown")}  # fmt: skip
    if names["eos_token"] is None:
        raise GRITError(f"{path} names no eos token, so generation would never end")
    # What llama.cpp does where the file does not say.
    bos = names["bos_token"] if get("add_bos_token", pre == "llama-bpe") else None
    eos = names["eos_token"] if get("add_eos_token", False) else None
    around = [token for token in (bos, eos) if token is not None]
    if around:
        one, two = (" ".join([*filter(None, [bos]), part, *filter(None, [eos])]) for part in ("$A", "$B"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=one, pair=f"{one} {two}", special_tokens=[(token, vocabulary[token]) for token in around]
        )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
        **{name: value for name, value in names.items() if value is not None},
    )  # fmt: skip
    fast.chat_template = source.metadata.get("tokenizer.chat_template")
    return fast


def _write_config(folder: Path, config: dict[str, Any], source: Weights, tokenizer: Any) -> None:
    from transformers import LlamaConfig, Qwen2Config

    kinds: dict[str, Any] = {"LlamaForCausalLM": LlamaConfig, "Qwen2ForCausalLM": Qwen2Config}
    found = {key: source.metadata.get(key) for key in (f"tokenizer.ggml.{name}_token_id" for name in ENDS)}
    stops = {_whole(i, f"{source.path} has {key}"): None for key, i in found.items() if i is not None}
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(str(_only_type(source)), "float32")
    given = kinds[config["architectures"][0]](**config, **tokens)
    given.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    # Under the names that both of transformers' generations read.
    for name in ("dtype", "rope_parameters"):
        saved.pop(name, None)
    rope = {name: config[name] for name in ("rope_theta", "rope_scaling")}
    path.write_text(json.dumps({**saved, **rope, "torch_dtype": dtype}, indent=2))
    generation = {**tokens, "eos_token_id": list(stops) if len(stops) > 1 else next(iter(stops))}
    (folder / "generation_config.json").write_text(json.dumps({k: v for k, v in generation.items() if v is not None}))


def _only_type(source: Weights) -> str | None:
    """The number type that all matrices share, if vectors fit into it without a change."""
    kinds = {source.type(name) for name, entry in source.entries.items() if len(entry.shape) > 1}
    if len(kinds) != 1 or not kinds <= {"F16", "BF16"}:
        return None
    import torch

    kind = kinds.pop()
    narrow = torch.float16 if kind == "F16" else torch.bfloat16
    vectors = [source(name) for name, entry in source.entries.items() if len(entry.shape) == 1]
    return kind if all(bool((vector.to(narrow).float() == vector).all()) for vector in vectors) else None


def _write_weights(folder: Path, config: dict[str, Any], source: Weights) -> None:
    import torch
    from safetensors.torch import save_file

    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(str(_only_type(source)), torch.float32)
    names = [n for n in parameter_names(config["num_hidden_layers"]) if gguf_name(n, config) in source]
    shards: list[list[str]] = [[]]
    room = SHARD
    for name in names:
        size = dtype.itemsize * math.prod(_shape(name, config))
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, inside in zip(files, shards, strict=True):
        tensors = {}
        for name in inside:
            value, heads = source(gguf_name(name, config)), rotary_heads(name, config)
            tensors[name] = (unpermute(value, heads) if heads else value).to(dtype).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {name: file for file, inside in zip(files, shards, strict=True) for name in inside}
        total = sum(dtype.itemsize * math.prod(_shape(name, config)) for name in names)
        body = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(body, indent=2))
