"""A PEFT adapter's folder, and the change it makes to each weight of its base.

PEFT's scaling is `alpha / r`, or `alpha / sqrt(r)` with rsLoRA, where both may differ per module (`alpha_pattern`,
`rank_pattern`). llama.cpp knows one alpha and divides it by each tensor's rank, which is why the exporter folds the
true scaling into B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.export.checkpoint import Checkpoint, read_json, safetensors_entries
from grit_impl.record import sha256_file

if TYPE_CHECKING:
    import torch

# PEFT options that change the forward pass and that a merge does not reproduce, with their neutral values.
UNSUPPORTED = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "fan_in_fan_out": False,
}
PREFIX = "base_model.model."


@dataclass
class LoraPair:
    """One module's factors: `a` (r, in), `b` (out, r), and PEFT's true scaling; DoRA adds a magnitude (out,)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The factors' inner dimension."""
        return int(self.a.shape[0])

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The base's weight (out, in) with the adapter in it, in float32."""
        return next(self.merged_pieces([weight]))

    def merged_pieces(self, weight: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The same for a weight that comes a few rows at a time."""
        # One product for the whole matrix, as PEFT takes it: the bits depend on how it is cut. The sum is taken in it.
        change, done = self.b @ self.a, 0
        change *= self.scaling
        for piece in weight:
            rows = slice(done, done + piece.shape[0])
            merged = change[rows].add_(piece.float())
            if self.magnitude is not None:
                # DoRA, eq. 5 of arXiv 2402.09353: columns of unit norm times a learned magnitude.
                merged *= (self.magnitude[rows] / merged.norm(dim=1)).unsqueeze(1)
            done = rows.stop
            yield merged


class Adapter:
    """A LoRA adapter in PEFT's format.

    Args:
        folder: The folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        GRITError: the folder is no adapter, or uses an option whose effect cannot be exported (named).
    """

    def __init__(self, folder: Path | str) -> None:
        from safetensors.torch import load_file

        self.folder = Path(folder)
        self.config = read_json(self.folder / "adapter_config.json")
        if self.config.get("peft_type") != "LORA":
            raise GRITError(f"{self.folder} is a {self.config.get('peft_type')} adapter: only LoRA can be exported")
        for option, neutral in UNSUPPORTED.items():
            value = self.config.get(option, neutral)
            if value != neutral and value not in (None, False, [], {}):
                raise GRITError(
                    f"cannot export {self.folder}: {option}={value!r} is not merged; train with {option}={neutral!r}"
                )
        weights = self.folder / "adapter_model.safetensors"
        safetensors_entries(weights)
        self.sha256 = sha256_file(weights)
        self.pairs: dict[str, LoraPair] = {}
        self.replaced: dict[str, torch.Tensor] = {}
        self._collect({name: tensor.float() for name, tensor in load_file(weights).items()})

    @property
    def uses_dora(self) -> bool:
        """Whether a module carries DoRA's magnitude vector."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def scaling(self, module: str, rank: int) -> float:
        """PEFT's scaling of a module (`peft.tuners.lora`). Raises `GRITError` if its rank is not the declared one."""
        declared = _pattern(self.config.get("rank_pattern"), module, self.config["r"])
        if rank != declared:
            raise GRITError(
                f"{self.folder}: {module} has rank {rank}, adapter_config.json says {declared}; "
                "write adapted ranks into rank_pattern"
            )
        alpha = float(_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def check_fits(self, base: Checkpoint) -> None:
        """Raise `GRITError` unless every tensor of the adapter belongs to a weight of `base` and has its shape."""
        known = {*base.names(), *(["lm_head.weight"] if base.tied else [])}
        for module, pair in self.pairs.items():
            name = f"{module}.weight"
            if name not in known:
                raise GRITError(f"wrong-base: {self.folder} changes {module}, which {base.folder} does not have")
            shape = base.shape(name if name in base.entries else "model.embed_tokens.weight")
            if (pair.b.shape[0], pair.a.shape[1]) != shape:
                got = (pair.b.shape[0], pair.a.shape[1])
                raise GRITError(f"wrong-base: {module} is {got} in {self.folder} and {shape} in {base.folder}")
        with base.reader() as reader:
            for name, tensor in list(self.replaced.items()):
                if name not in known:
                    raise GRITError(f"cannot export {self.folder}: it stores {name}, which {base.folder} does not have")
                original = reader(name if name in base.entries else "model.embed_tokens.weight")
                # PEFT saves the weight under an adapted embedding or head, changed or not.
                if tensor.shape != original.shape:
                    raise GRITError(
                        f"wrong-base: {name} is {tuple(tensor.shape)} in {self.folder} and {tuple(original.shape)} in "
                        f"{base.folder}"
                    )
                if bool((tensor == original).all()):
                    del self.replaced[name]

    def _collect(self, tensors: dict[str, torch.Tensor]) -> None:
        for key in sorted(tensors):
            name = key.removeprefix(PREFIX)
            if match := re.fullmatch(r"(.+)\.lora_A\.weight", name):
                module = match[1]
                try:
                    a, b = tensors[key], tensors[f"{PREFIX}{module}.lora_B.weight"]
                except KeyError:
                    raise GRITError(f"{self.folder}: {module} has a lora_A but no lora_B") from None
                self._add(module, a, b, tensors.get(f"{PREFIX}{module}.lora_magnitude_vector"))
            elif match := re.fullmatch(r"(.+)\.lora_embedding_A", name):
                module = match[1]
                # PEFT stores the embedding's factors transposed: A (r, vocabulary), B (dimension, r).
                a, b = tensors[f"{PREFIX}{module}.lora_embedding_B"].T, tensors[key].T
                self._add(module, a.contiguous(), b.contiguous(), None)
            elif re.search(r"\.lora_(B\.weight|embedding_B|magnitude_vector)$", name):
                continue
            elif name.endswith(".weight") and "lora_" not in name:
                self.replaced[name.replace(".modules_to_save.default", "").replace(".base_layer", "")] = tensors[key]
            else:
                raise GRITError(f"cannot export {self.folder}: tensor {name} is no LoRA factor and no saved weight")
        if not self.pairs and not self.replaced:
            raise GRITError(f"{self.folder} holds no adapter tensor")
        for module, pair in self.pairs.items():
            if not bool(pair.a.isfinite().all()) or not bool(pair.b.isfinite().all()):
                raise GRITError(f"{self.folder}: {module} has NaN or infinite weights; this training diverged")

    def _add(self, module: str, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None) -> None:
        self.pairs[module] = LoraPair(a, b, self.scaling(module, int(a.shape[0])), magnitude)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's lookup (`peft.utils.other.get_pattern_key`): the first key that matches the end of the module's name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
