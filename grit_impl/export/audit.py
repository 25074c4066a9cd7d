"""Where an export went wrong: the file's keys and matrices against those that the base and the adapter imply.

The logits of `check.py` are the proof; this names the cause. It shares the exporter's formulas and so would share an
error in them, which is why it is not the proof.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.checkpoint import Checkpoint, TensorReader
from grit_impl.export.findings import Finding
from grit_impl.export.lora import Adapter
from grit_impl.export.vocabulary import Vocabulary, read_vocabulary
from grit_impl.export.writer import EMBEDDING
from grit_impl.gguf.architecture import gguf_name, permute, rope_factors, rope_settings, rotary_heads
from grit_impl.gguf.encoding import FINGERPRINT_KEY
from grit_impl.gguf.metadata import read_metadata

if TYPE_CHECKING:
    import torch

# Relative Frobenius error that rounding to a type leaves, with a factor of two in hand.
ROUNDING = {"f32": 1e-6, "f16": 1e-3, "bf16": 5e-3, "q8_0": 2e-2}
_TYPES = {0: "f32", 1: "f16", 32: "bf16", 7: "q8_0"}


def file_dtype(metadata: dict[str, Any]) -> str:
    """The number type that a GGUF file says it has; "q8_0" limits apply to anything coarser."""
    return _TYPES.get(int(metadata.get("general.file_type", 0)), "q8_0")


def audit_metadata(base: Checkpoint, gguf: Path) -> list[Finding]:
    """Compare a model file's keys with its base."""
    found: list[Finding] = []
    metadata = read_metadata(gguf, arrays=True)
    vocabulary = read_vocabulary(base, base.shape(EMBEDDING)[0])
    rope = rope_settings(base.config)
    theta = float(metadata.get(f"{base.architecture.name}.rope.freq_base", 10000.0))
    if abs(theta - rope["theta"]) > 1e-3 * rope["theta"]:
        found.append(Finding("rope-parameters", f"rope.freq_base is {theta:g}, the base has {rope['theta']:g}"))
    ours = metadata.get(FINGERPRINT_KEY)
    if ours is not None and ours != base.fingerprint():
        found.append(Finding("wrong-base", f"{gguf.name} was made from base {str(ours)[:12]}, not from {base.folder}"))
    return found + _audit_tokenizer(metadata, vocabulary)


def _audit_tokenizer(metadata: dict[str, Any], vocabulary: Vocabulary) -> list[Finding]:
    found = []

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.{key}", default)

    if not get("ggml.merges"):
        found.append(Finding("missing-merges", "tokenizer.ggml.merges is missing or empty"))
    if get("ggml.pre") != vocabulary.pre:
        found.append(Finding("pre-tokenizer", f"tokenizer.ggml.pre is {get('ggml.pre')!r}, not {vocabulary.pre!r}"))
    if bool(get("ggml.add_bos_token", False)) != vocabulary.add_bos:
        found.append(
            Finding("bos", f"add_bos_token is {get('ggml.add_bos_token')}, the tokenizer's is {vocabulary.add_bos}")
        )
    if len(get("ggml.tokens") or []) != len(vocabulary.tokens):
        found.append(
            Finding("vocabulary-size", f"{len(get('ggml.tokens') or [])} tokens, {len(vocabulary.tokens)} rows")
        )
    ends = {get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    if missing := [i for i in vocabulary.eos[:2] if i not in ends]:
        found.append(
            Finding("stop-token", f"token {missing[0]} ({vocabulary.tokens[missing[0]]}) is no end token in the file")
        )
    if vocabulary.chat_template and get("chat_template") != vocabulary.chat_template:
        state = "differs" if get("chat_template") else "is missing"
        found.append(Finding("chat-template", f"tokenizer.chat_template {state}"))
    return found


def audit_weights(
    base: Checkpoint, lora: Adapter | None, gguf: Path, *, four_bit: bool, sixteen_bit_base: bool = False
) -> list[Finding]:
    """Compare a model file's matrices (first, middle and last layer) with base plus adapter; one finding per mode."""
    import torch
    from gguf import GGUFReader, quants

    tensors = {t.name: t for t in GGUFReader(gguf).tensors}
    tolerance = ROUNDING[file_dtype(read_metadata(gguf))]

    def stored(name: str) -> torch.Tensor | None:
        tensor = tensors.get(name)
        return (
            torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy()) if tensor is not None else None
        )

    found: dict[str, Finding] = {}
    for finding in _audit_shape(base, lora, set(tensors), stored):
        found.setdefault(finding.mode, finding)
    with base.reader() as reader:
        for name in _sampled(base):
            value = stored(gguf_name(name, base.config))
            if value is None:
                found.setdefault("weights", Finding("weights", f"{name} is missing from {gguf.name}"))
            elif finding_or_none := _compare(
                name, value, base, lora, reader, tolerance, four_bit and not sixteen_bit_base
            ):
                found.setdefault(finding_or_none.mode, finding_or_none)
    return list(found.values())


def _audit_shape(
    base: Checkpoint, lora: Adapter | None, names: set[str], stored: Callable[[str], torch.Tensor | None]
) -> list[Finding]:
    found = []
    trained_head = lora is not None and any(key.startswith("lm_head") for key in [*lora.pairs, *lora.replaced])
    if "output.weight" not in names and (not base.tied or trained_head):
        found.append(Finding("output-head", "output.weight is missing; llama.cpp would use the embedding instead"))
    factors, given = rope_factors(base.config), stored("rope_freqs.weight")
    if (factors is None) != (given is None):
        state = "is missing" if given is None else "should not be there"
        found.append(Finding("rope-parameters", f"rope_freqs.weight {state}"))
    elif factors is not None and given is not None and not factors.allclose(given, rtol=1e-4):
        found.append(Finding("rope-parameters", "rope_freqs.weight has other values"))
    return found


def _sampled(base: Checkpoint) -> list[str]:
    last = int(base.config["num_hidden_layers"]) - 1
    layers = {f"model.layers.{i}." for i in (0, last // 2, last)}
    return [n for n in base.names() if not n.startswith("model.layers.") or any(n.startswith(p) for p in layers)]


def _compare(
    name: str,
    value: torch.Tensor,
    base: Checkpoint,
    lora: Adapter | None,
    reader: TensorReader,
    tolerance: float,
    simulate: bool,
) -> Finding | None:
    heads = rotary_heads(name, base.config)
    module = name.removesuffix(".weight")
    pair = lora.pairs.get(module) if lora is not None else None
    original = lora.replaced[name] if lora is not None and name in lora.replaced else reader(name)
    if value.shape != original.shape:
        return Finding("vocabulary-size", f"{name} has shape {tuple(value.shape)}, the base {tuple(original.shape)}")
    start = _simulated(name, original, lora) if simulate else original
    expected = pair.merged(start) if pair is not None else start

    def off(candidate: torch.Tensor) -> float:
        wanted = permute(candidate, heads) if heads else candidate
        return float((value - wanted).norm() / wanted.norm().clamp_min(1e-30))

    error = off(expected)
    effect = float((expected - start).norm() / start.norm()) if pair is not None else 0.0
    # An adapter's share is judged by projection, which sees through the rounding of single weights.
    share = _share(value, start, expected, heads) if effect > tolerance / 20 else 1.0
    if error <= tolerance and abs(share - 1) < 0.1:
        return None
    if heads and float((value - expected).norm() / expected.norm()) <= max(tolerance, 1e-5):
        return Finding("rope-permutation", f"{name} is not permuted")
    if (
        pair is not None
        and not simulate
        and base.four_bit is False
        and off(pair.merged(_simulated(name, original, lora))) < error / 2
    ):
        return Finding(
            "qlora-merge-base", f"{name} holds dequantised NF4 weights, the adapter was trained on the stored ones"
        )
    if simulate and off(pair.merged(original) if pair is not None else original) < error / 2:
        return Finding("qlora-merge-base", f"{name} holds the 16-bit weights; the adapter was trained on NF4 weights")
    if pair is not None and abs(share) < 0.05:
        return Finding("no-op-merge", f"{name} is the base's, without the adapter")
    if (
        pair is not None
        and abs(share - 1) >= 0.1
        and off(start + share * (expected - start)) < max(tolerance, error / 2)
    ):
        return Finding("adapter-scaling", f"{name} holds {share:.2f} times the adapter")
    return Finding("weights", f"{name} differs by {error:.2g} (relative), {tolerance:g} is rounding")


def _simulated(name: str, weight: torch.Tensor, lora: Adapter | None) -> torch.Tensor:
    if weight.ndim != 2 or name in (EMBEDDING, "lm_head.weight") or (lora is not None and name in lora.replaced):
        return weight
    try:
        from grit_impl.export.four_bit import round_trip

        return round_trip(weight)
    except GRITError:
        # Without bitsandbytes there is no NF4 hypothesis to test.
        return weight


def _share(value: torch.Tensor, start: torch.Tensor, expected: torch.Tensor, heads: int | None) -> float:
    delta, change = expected - start, value - (permute(start, heads) if heads else start)
    if heads:
        delta = permute(delta, heads)
    return float((change * delta).sum() / (delta * delta).sum().clamp_min(1e-30))


def audit_adapter(base: Checkpoint, lora: Adapter, gguf: Path) -> list[Finding]:
    """Compare an adapter file with the PEFT adapter: llama.cpp's `alpha / rank * B A` against PEFT's."""
    import torch
    from gguf import GGUFReader, quants

    metadata = read_metadata(gguf)
    tensors = {
        t.name: torch.from_numpy(quants.dequantize(t.data, t.tensor_type).copy()) for t in GGUFReader(gguf).tensors
    }
    alpha = float(metadata.get("adapter.lora.alpha", 0.0))
    found: dict[str, Finding] = {}
    ours = metadata.get(FINGERPRINT_KEY)
    if ours is not None and ours != base.fingerprint():
        found["wrong-base"] = Finding(
            "wrong-base", f"{gguf.name} was trained on base {str(ours)[:12]}, not on {base.folder}"
        )
    for module, pair in lora.pairs.items():
        name = gguf_name(f"{module}.weight", base.config)
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            found.setdefault("no-op-merge", Finding("no-op-merge", f"{module} is missing from {gguf.name}"))
            continue
        heads = rotary_heads(f"{module}.", base.config)
        wanted = pair.scaling * (pair.b @ pair.a)
        given = (alpha / a.shape[0] if alpha else 1.0) * (b @ a)
        target = permute(wanted, heads) if heads else wanted
        ratio = float((given * target).sum() / (target * target).sum().clamp_min(1e-30))
        rest = float((given - ratio * target).norm() / target.norm().clamp_min(1e-30))
        if heads and rest > 0.05 and float((given - wanted).norm() / wanted.norm().clamp_min(1e-30)) < 0.05:
            found.setdefault("rope-permutation", Finding("rope-permutation", f"{module}'s B is not permuted"))
        elif rest > 0.05:
            found.setdefault(
                "weights", Finding("weights", f"{module} differs from the PEFT adapter by {rest:.2g} (relative)")
            )
        elif abs(ratio - 1) > 0.01:
            found.setdefault("adapter-scaling", Finding("adapter-scaling", f"{module} is applied {ratio:.2f} times"))
    return list(found.values())
