"""Whether LoRA layers are used: what each says of itself when it is called."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from grit_impl.ledger.watches.tensors import ModuleHook


class LayerWatch:
    """Whether tensors take part in the forward pass, as far as their layers say.

    A layer is asked when it is called: an adapter that is switched off for the forward pass alone is on again when
    backward is over. Where layers are not called (fused kernels) or may not be hooked (compiled), it is asked then.

    Args:
        model: It.
        owners: As `owners` gives them.
    """

    def __init__(self, model: nn.Module, owners: dict[str, tuple[nn.Module, str]]) -> None:
        self.model = model
        self._layers: dict[str, tuple[nn.Module | None, list[tuple[int, str]]]] = {}
        for i, name in enumerate(owners):
            prefix, dot, rest = name.partition(".lora_")
            layer = _submodule(model, prefix) if dot else None
            adapter = rest.split(".")[1] if rest.count(".") else ""
            self._layers.setdefault(prefix if dot else name, (layer, []))[1].append((i, adapter))
        self._called: dict[str, dict[bool, dict[str, str]]] = {}
        self._handles: list[Any] = []

    def open(self, protect: Callable[..., Any]) -> None:
        """Ask at every call from now on.

        Args:
            protect: Makes a function that does not raise of one that may.
        """
        # A hook would become part of a compiled graph.
        compiled = any(hasattr(m, "_orig_mod") or m.__dict__.get("_compiled_call_impl") for m in self.model.modules())
        if compiled or "unsloth" in sys.modules:
            return
        for prefix, (layer, _) in self._layers.items():
            if layer is not None:
                hook = ModuleHook(functools.partial(protect(self._ask, "layer"), prefix))
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _ask(self, prefix: str, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep which adapters were in use; those of calls with gradients count first."""
        seen = self._called.setdefault(prefix, {}).setdefault(torch.is_grad_enabled(), {})
        if why := _out_of_use(layer):
            seen.setdefault("", why)
        else:
            seen.update(dict.fromkeys(kwargs.get("adapter_names") or getattr(layer, "active_adapters", None) or (), ""))

    def reset(self) -> None:
        """After a step: what is called from now on belongs to the next one."""
        self._called = {}

    def absent(self) -> dict[int, str]:
        """Position -> why it takes no part."""
        found: dict[int, str] = {}
        for prefix, (layer, tensors) in self._layers.items():
            if layer is None:
                continue
            calls = self._called.get(prefix)
            seen = (calls.get(True) or calls.get(False)) if calls else None
            if seen is None:
                gone = _submodule(self.model, prefix) is not layer
                why = "its layer is no longer in the model" if gone else _out_of_use(layer)
                active = getattr(layer, "active_adapters", None)
            else:
                active = [adapter for adapter in seen if adapter]
                why = "" if active else seen.get("", "")
            for i, adapter in tensors:
                if why or (isinstance(active, list | tuple) and adapter and adapter not in active):
                    found[i] = why or f"the active adapter is {', '.join(map(str, active or ())) or 'none'}"
        return found

    def remove(self) -> None:
        """Take our hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _out_of_use(layer: nn.Module) -> str:
    if getattr(layer, "merged", False):
        return "merged into the base weight"
    return "adapters are switched off" if getattr(layer, "disable_adapters", False) else ""


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    module: Any = model
    for part in name.split("."):
        module = getattr(module, "_modules", {}).get(part)
    return module if isinstance(module, nn.Module) else None
