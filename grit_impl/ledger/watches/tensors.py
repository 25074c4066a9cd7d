"""Which tensors of a model are watched, and who holds them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

FROZEN = 16
"""How many tensors of a model without LoRA are watched if none is trained."""


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> (module, attribute) of the LoRA tensors, of any adapter; or of all trainable parameters, or of a few."""
    found = {
        (f"{prefix}.{key}" if prefix else key): (module, key)
        for prefix, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None
    }
    lora = {n: o for n, o in found.items() if "lora_" in n}
    trained = {n: (m, k) for n, (m, k) in found.items() if m.get_parameter(k).requires_grad}
    return lora or trained or dict(itertools.islice(found.items(), FROZEN))


def sharded(model: nn.Module) -> str | None:
    """What a model's watched tensors are sharded by, if they are: a process then holds parts of gradients only."""
    for p in (module.get_parameter(key) for module, key in owners(model).values()):
        if type(p.data).__name__ == "DTensor" or type(p).__name__ in ("FlatParameter", "DTensor"):
            return type(p).__name__ if type(p).__name__ == "FlatParameter" else "DTensor"
        if hasattr(p, "ds_id"):
            return "DeepSpeed ZeRO-3"
    return None


def spread(indices: list[int], count: int) -> list[int]:
    """`count` of them, evenly spread; pairs stay together, so that both factors of a layer are seen."""
    if len(indices) <= count:
        return list(indices)
    pairs = [indices[i : i + 2] for i in range(0, len(indices), 2)]
    chosen = np.linspace(0, len(pairs) - 1, max(1, count // 2)).round().astype(int)
    return [i for j in sorted(set(chosen.tolist())) for i in pairs[j]]


def hook_bases(kind: type) -> list[tuple[Any, Any, Any]]:
    """Let torch's hooks run at the steps of an optimizer's base classes, as they do once one has been made of them.

    Returns:
        (class, its step before, its step now) of those that were changed.
    """
    changed = []
    for base in kind.__mro__:
        step = vars(base).get("step")
        if step is not None and base is not Optimizer and not hasattr(step, "hooked"):
            hooked: Any = Optimizer.profile_hook_step(step)
            hooked.hooked = True
            base.step = hooked  # type: ignore[attr-defined]
            changed.append((base, step, hooked))
    return changed


class ModuleHook:
    """A hook of the ledger's on a module: a copy of the module, or its pickle, has one that does nothing.

    Args:
        call: What it does; must not raise.
    """

    of_the_ledger = True

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call(*args)

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> Any:
    return _ignore


def _ignore(*_: Any) -> None:
    return None
