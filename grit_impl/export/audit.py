"""Is the file right: every key and every tensor of a GGUF file against what training left.

The tensors are held against PEFT's own merge of the whole model (`Reference.merge`), rounded to the number type that
each has in the file. What is equal to the bit is right. Files from elsewhere may have been merged in 16 bits or rounded
by another rule: they are right where they are as near as rounding is, in every row, and along the adapter's change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.checkpoint import EMBEDDING, HEAD, Checkpoint
from grit_impl.export.findings import Finding
from grit_impl.export.floor import Branch
from grit_impl.export.vocabulary import UNUSED, Vocabulary
from grit_impl.gguf.architecture import gguf_name, permute, rope_factors, rotary_heads, unpermute, write_architecture
from grit_impl.gguf.encoding import FINGERPRINT_KEY, encode
from grit_impl.gguf.tensors import Weights

if TYPE_CHECKING:
    import torch

# llama.cpp's numbers of a file's type, for its name in reports; anything else is named by its tensors.
_TYPES = {0: "f32", 1: "f16", 32: "bf16", 7: "q8_0"}
# Relative error that a merge in bfloat16 leaves before the file's own rounding; a float32 file has none of it.
MERGED_IN_HALF = 1.5e-3
# The last bits of float32: sums in another order.
SUMS = 1e-6
# Bits of a number in the types whose rounding `gguf.quants` does not know, and the error of such a step.
_BITS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def file_dtype(weights: Weights) -> str:
    """The number type of a file's matrices: that of most numbers."""
    known = _TYPES.get(int(weights.metadata.get("general.file_type", -1)))
    count: dict[str, int] = {}
    for name, entry in weights.entries.items():
        if len(entry.shape) > 1:
            kind = weights.type(name).lower()
            count[kind] = count.get(kind, 0) + math.prod(entry.shape)
    most = max(count, key=lambda kind: count[kind]) if count else "f32"
    return known if known == most else most


def audit_metadata(
    base: Checkpoint, vocabulary: Vocabulary, rows: int, weights: Weights, adapter_sha256: str | None
) -> list[Finding]:
    """Compare a model file's keys with those that the base's configuration and training's tokenizer imply."""
    from gguf import GGUFWriter

    writer = GGUFWriter(None, base.architecture.name)
    write_architecture(writer, base.config, rows)
    vocabulary.write(writer)
    given, found = weights.metadata, []
    if given.get("general.architecture") != base.architecture.name:
        return [
            Finding("settings", f"the file is a {given.get('general.architecture')}, not a {base.architecture.name}")
        ]
    for key, value in writer.kv_data[0].items():
        if key != "general.architecture" and (finding := _audit_key(key, value.value, given, base, vocabulary)):
            found.append(finding)
    ours = given.get(FINGERPRINT_KEY)
    if ours is not None and ours != base.fingerprint():
        name = weights.path.name
        found.append(Finding("wrong-base", f"{name} was made from base {str(ours)[:12]}, not from {base.folder}"))
    made = given.get("grit.adapter_sha256")
    if made is not None and made != adapter_sha256:
        now = f"now has {adapter_sha256[:12]}" if adapter_sha256 else "is not asked about"
        found.append(Finding("wrong-adapter", f"the file holds adapter {str(made)[:12]}, the folder {now}"))
    return found


def _audit_key(
    key: str, wanted: Any, given: dict[str, Any], base: Checkpoint, vocabulary: Vocabulary
) -> Finding | None:
    short = key.split(".", 1)[1]
    has = given.get(key, _default(short, given, base, vocabulary))
    if short == "ggml.token_type":
        # Other converters class added tokens otherwise; whether texts become the same ids is asked of llama.cpp.
        return None
    if short == "ggml.merges" and not has:
        return Finding("missing-merges", f"{key} is missing or empty")
    if short == "ggml.tokens":
        if len(has or []) != len(wanted):
            return Finding("vocabulary-size", f"{len(has or [])} tokens, {len(wanted)} rows")
        pairs = enumerate(zip(has, wanted, vocabulary.types, strict=True))
        other = [i for i, (a, b, kind) in pairs if a != b and kind != UNUSED]
        return (
            Finding("vocabulary", f"token {other[0]} is {has[other[0]]!r}, not {wanted[other[0]]!r}") if other else None
        )
    if short in ("ggml.eos_token_id", "ggml.eot_token_id", "ggml.eom_token_id"):
        ends = {given.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
        if wanted in ends:
            return None
        return Finding("stop-token", f"token {wanted} ({vocabulary.tokens[wanted]}) is no end token in the file")
    if short == "chat_template" or short.startswith("chat_template"):
        if has == wanted:
            return None
        return Finding("chat-template", f"{key} {'differs' if has else 'is missing'}")
    same = math.isclose(has, wanted, rel_tol=1e-6) if isinstance(wanted, float) and has is not None else has == wanted
    if same or (has is None and short in ("ggml.padding_token_id", "ggml.bos_token_id")):
        return None
    mode = {
        "rope.freq_base": "rope-parameters", "rope.scaling.type": "rope-parameters",
        "rope.scaling.factor": "rope-parameters", "rope.dimension_count": "rope-parameters",
        "ggml.pre": "pre-tokenizer", "ggml.add_bos_token": "bos", "ggml.bos_token_id": "bos",
        "ggml.merges": "vocabulary", "vocab_size": "vocabulary-size",
    }.get(short, "settings")  # fmt: skip
    shown = (has, wanted) if not isinstance(wanted, list) else ("another list", "training's")
    return Finding(mode, f"{key} is {shown[0]}, not {shown[1]}")


def _default(short: str, given: dict[str, Any], base: Checkpoint, vocabulary: Vocabulary) -> Any:
    """What llama.cpp takes where a file has no such key."""
    name = base.architecture.name
    heads, width = given.get(f"{name}.attention.head_count"), given.get(f"{name}.embedding_length")
    size = width // heads if isinstance(heads, int) and isinstance(width, int) and heads else None
    return {
        "attention.head_count_kv": heads, "attention.key_length": size, "attention.value_length": size,
        "rope.dimension_count": given.get(f"{name}.attention.key_length", size), "rope.freq_base": 10000.0,
        "vocab_size": len(given.get("tokenizer.ggml.tokens") or []),
        "ggml.add_bos_token": vocabulary.pre == "llama-bpe",
    }.get(short)  # fmt: skip


@dataclass
class Tensors:
    """How a file's tensors compare: how many were looked at, how many are equal to the bit, and what is wrong."""

    compared: int
    exact: int
    findings: list[Finding]


def audit_tensors(
    weights: Weights,
    expected: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    start: Callable[[str], torch.Tensor | None],
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Tensors:
    """Compare every tensor of a model file.

    Args:
        weights: The file.
        expected: The trained model's parameters in float32, by name, head and embedding apart.
        config: The model's configuration.
        start: The base's parameter of a name, where an adapter changed it.
        step: Called with (tensors done, tensors in all).
    """
    result = Tensors(0, 0, [])
    modes: dict[str, Finding] = {}

    def add(finding: Finding) -> None:
        modes.setdefault(finding.mode, finding)

    places = {gguf_name(name, config): name for name in expected}
    for place in weights.entries:
        if place not in places and place != "rope_freqs.weight":
            add(Finding("weights", f"the file holds {place}, which the trained model does not have"))
    if finding := _audit_divisors(weights, config):
        add(finding)
    for done, (place, name) in enumerate(places.items()):
        step(done, len(places))
        value = expected[name].detach().float().cpu()
        if place not in weights:
            if name != HEAD:
                add(Finding("weights", f"{place} is missing from {weights.path.name}"))
            elif not value.equal(expected[EMBEDDING].detach().float().cpu()):
                add(Finding("output-head", "output.weight is missing; llama.cpp would use the embedding instead"))
            continue
        result.compared += 1
        if weights.entries[place].shape != tuple(value.shape):
            shapes = f"shape {weights.entries[place].shape}, training's has {tuple(value.shape)}"
            add(Finding("vocabulary-size" if name in (EMBEDDING, HEAD) else "weights", f"{place} has {shapes}"))
            continue
        heads = rotary_heads(name, config)
        if finding := _compare(weights, place, value, heads, start(name)):
            add(finding)
        elif _exact(weights, place, permute(value, heads) if heads else value):
            result.exact += 1
    result.findings = list(modes.values())
    return result


def _audit_divisors(weights: Weights, config: dict[str, Any]) -> Finding | None:
    factors = rope_factors(config)
    given = weights("rope_freqs.weight") if "rope_freqs.weight" in weights else None
    if (factors is None) != (given is None):
        state = "is missing" if given is None else "should not be there"
        return Finding("rope-parameters", f"rope_freqs.weight {state}")
    if factors is not None and given is not None and not factors.allclose(given, rtol=1e-5):
        return Finding("rope-parameters", "rope_freqs.weight has other values")
    return None


def _exact(weights: Weights, place: str, value: torch.Tensor) -> bool:
    import torch

    kind, rows = weights.type(place), value.reshape(-1, value.shape[-1])
    if kind == "Q8_0" and value.shape[-1] % 32:
        return False
    if kind not in ("F32", "F16", "BF16", "Q8_0"):
        rounded = _rounded(rows.contiguous(), kind)
        return rounded is not None and rounded.equal(weights(place).reshape(rows.shape))
    return bool((encode(rows, kind).flatten().view(torch.uint8).numpy() == weights.raw(place).reshape(-1)).all())


def _rounded(value: torch.Tensor, kind: str) -> torch.Tensor | None:
    """A tensor rounded to a number type and back; None where `gguf.quants` cannot."""
    import torch
    from gguf import GGMLQuantizationType, quants

    try:
        number = GGMLQuantizationType[kind]
        return torch.from_numpy(quants.dequantize(quants.quantize(value.numpy(), number), number).copy())
    except NotImplementedError:
        return None


def _compare(
    weights: Weights, place: str, value: torch.Tensor, heads: int | None, start: torch.Tensor | None
) -> Finding | None:
    wanted = permute(value, heads) if heads else value
    if _exact(weights, place, wanted):
        return None
    kind, given = weights.type(place), weights(place)
    rows, theirs = (t.reshape(-1, t.shape[-1]) for t in (wanted.contiguous(), given))
    rounded = _rounded(rows, kind)
    own = _norms(rounded - rows) if rounded is not None else _norms(rows) * 2.0 ** -_BITS.get(kind, 2)
    # A vector stays float32 in files that others merged in 16 bits, too.
    slack = SUMS if kind == "F32" and value.ndim > 1 else MERGED_IN_HALF if kind != "F32" else 2.0**-8
    if value.ndim == 1 and kind == "F32":
        own = own * 0
        slack = SUMS
    error, size = _norms(theirs - rows), _norms(rows)
    whole = float((error.square().sum()).sqrt())
    allowed = max(1.25 * float(own.square().sum().sqrt()), slack * float(size.square().sum().sqrt()))
    relative = whole / max(float(size.square().sum().sqrt()), 1e-30)
    if math.isfinite(whole) and whole <= allowed:
        if bad := int((error > (2.5 * own).maximum(3 * slack * size) + 1e-30).sum()):
            return Finding("weights", f"{place}: {bad} of {len(rows)} rows differ beyond rounding")
        # Rounding with a smallest and a largest number per block is not without a bias of its own.
        noise = 6 * relative / math.sqrt(rows.numel()) + (2e-4 if kind != "F32" else SUMS)
        noise += abs(_share(rounded, rows) - 1) if rounded is not None else 5e-3
        share = _share(theirs, rows)
        if abs(share - 1) > noise:
            return Finding("weights", f"{place} is {share:.4f} times the trained one")
        return _adapter_share(place, value, given, heads, start, relative)
    return _cause(place, value, given, heads, start, relative)


def _share(given: torch.Tensor, rows: torch.Tensor) -> float:
    return float((given.double() * rows.double()).sum() / rows.double().square().sum().clamp_min(1e-30))


def _norms(rows: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = rows.double().norm(dim=1)
    return norms


def _adapter_share(
    place: str, value: torch.Tensor, given: torch.Tensor, heads: int | None, start: torch.Tensor | None, error: float
) -> Finding | None:
    """How much of the adapter's change is there: a projection, which sees through the rounding of single weights."""
    if start is None or start.shape != value.shape:
        return None
    change = (value - start).double()
    size = float(change.square().sum())
    if size == 0:
        return None
    back = (unpermute(given, heads) if heads else given).double()
    share = float(((back - start.double()) * change).sum()) / size
    blur = 6 * error * float(value.norm()) / math.sqrt(size) / math.sqrt(value.numel())
    if abs(share - 1) <= max(0.01, blur):
        return None
    mode = "no-op-merge" if abs(share) < 0.05 else "adapter-scaling"
    return Finding(mode, f"{place} holds {share:.2f} times the adapter")


def _cause(
    place: str, value: torch.Tensor, given: torch.Tensor, heads: int | None, start: torch.Tensor | None, error: float
) -> Finding:
    """Name what is wrong with a matrix that is not the trained one."""
    back = unpermute(given, heads) if heads else given

    def off(candidate: torch.Tensor) -> float:
        return float((back - candidate).norm() / candidate.norm().clamp_min(1e-30))

    if heads and float((given - value).norm() / value.norm().clamp_min(1e-30)) < error / 4:
        return Finding("rope-permutation", f"{place} is not permuted")
    if start is not None and start.shape == value.shape and not start.equal(value):
        if off(start) < error / 4:
            return Finding("no-op-merge", f"{place} is the base's, without the adapter")
        change = value - start
        share = float(((back - start) * change).sum() / change.square().sum())
        if abs(share - 1) > 0.1 and off(start + share * change) < error / 2:
            return Finding("adapter-scaling", f"{place} holds {share:.2f} times the adapter")
        simulated = _simulated(place, start)
        if simulated is not None and off(simulated + change) < error / 2:
            return Finding("qlora-merge-base", f"{place} holds NF4 weights, the adapter was trained on the stored ones")
        if simulated is not None and off(start + (value - simulated)) < error / 2:
            return Finding("qlora-merge-base", f"{place} holds the stored weights, the adapter was trained on NF4 ones")
    return Finding("weights", f"{place} differs by {error:.2g} (relative)")


def _simulated(place: str, weight: torch.Tensor) -> Any:
    try:
        from grit_impl.export.four_bit import round_trip

        return round_trip(weight) if weight.ndim == 2 and place.startswith("blk.") else None
    except GRITError:
        # Without bitsandbytes there is no NF4 hypothesis to test.
        return None


Factors = tuple["torch.Tensor", "torch.Tensor", float]


def audit_adapter(
    factors: Mapping[str, Factors], config: dict[str, Any], path: Path, sha256: str
) -> tuple[Tensors, dict[str, Branch]]:
    """Compare an adapter file's product of factors with PEFT's, module by module, in the number type it is written in.

    Returns:
        The comparison, and the file's own factors by module, in transformers' order of rows.
    """
    weights = Weights(path)
    alpha = float(weights.metadata.get("adapter.lora.alpha", 0.0))
    result, own = Tensors(0, 0, []), {}
    if (made := weights.metadata.get("grit.adapter_sha256")) not in (None, sha256):
        result.findings.append(Finding("wrong-adapter", f"the file holds adapter {str(made)[:12]}, not {sha256[:12]}"))
    left = set(weights.entries)
    for module, (a, b, scaling) in factors.items():
        place, heads = gguf_name(f"{module}.weight", config), rotary_heads(f"{module}.", config)
        if not {f"{place}.lora_a", f"{place}.lora_b"} <= left:
            result.findings.append(Finding("no-op-merge", f"{module} is not in {path.name}"))
            continue
        left -= {f"{place}.lora_a", f"{place}.lora_b"}
        ours, theirs = weights(f"{place}.lora_a"), weights(f"{place}.lora_b")
        rank = ours.shape[0]
        theirs = theirs * ((alpha or rank) / rank)
        change = theirs @ ours
        trained = scaling * (b @ a)
        wanted = permute(trained, heads) if heads else trained
        result.compared += 1
        result.exact += int(rank == a.shape[0] and change.shape == wanted.shape)
        if finding := _compare_product(weights, place, module, (a, b, scaling), change, wanted, trained):
            result.findings.append(finding)
        if change.shape == trained.shape:
            kinds = (weights.type(f"{place}.lora_a"), weights.type(f"{place}.lora_b"))
            own[module] = Branch(ours, unpermute(theirs, heads) if heads else theirs, kinds)
    if left:
        result.findings.append(Finding("weights", f"{path.name} changes {sorted(left)[0]}, which the adapter does not"))
    unique = {finding.mode: finding for finding in reversed(result.findings)}
    result.findings = list(unique.values())
    return result, own


def _compare_product(
    weights: Weights,
    place: str,
    module: str,
    factors: Factors,
    change: torch.Tensor,
    wanted: torch.Tensor,
    trained: torch.Tensor,
) -> Finding | None:
    a, b, scaling = factors
    if change.shape != wanted.shape:
        return Finding("wrong-base", f"{module} is {tuple(change.shape)} in {weights.path.name}")
    kinds = [weights.type(f"{place}.lora_{part}") for part in "ab"]
    rounded = [_rounded(t.contiguous(), kind) for t, kind in zip((a, b), kinds, strict=True)]
    size = float(wanted.norm().clamp_min(1e-30))
    error = float((change - wanted).norm()) / size
    own = 0.0
    if rounded[0] is not None and rounded[1] is not None:
        own = float((scaling * (rounded[1] @ rounded[0]) - trained).norm()) / size
    limit = 1.5 * own + 3 * SUMS + (1e-4 if "F16" in kinds else 0.0)
    share = float((change * wanted).sum() / wanted.square().sum().clamp_min(1e-30))
    if error <= limit and abs(share - 1) <= max(own, 10 * SUMS):
        return None
    if float((change - trained).norm()) / size <= limit:
        return Finding("rope-permutation", f"{module} is not permuted")
    if abs(share - 1) > 1e-3 and float((change - share * wanted).norm()) / size < max(limit, error / 5):
        return Finding("adapter-scaling", f"{module} has {share:.3f} times PEFT's effect")
    return Finding("weights", f"{module} differs by {error:.2g} (relative), {limit:.2g} is rounding")
