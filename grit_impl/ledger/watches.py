"""What the ledger watches of a model: its LoRA tensors, hooks that others put on them, and tensors left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grit_impl.ledger.timeline import TENSOR_HOOK

MODULES, ORPHAN_STEP = 16, 3
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> (module, attribute) of the LoRA tensors, of any adapter; or of all trainable parameters."""
    found = {
        (f"{prefix}.{key}" if prefix else key): (module, key)
        for prefix, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None
    }
    lora = {n: o for n, o in found.items() if "lora_" in n}
    return lora or {n: (m, k) for n, (m, k) in found.items() if m.get_parameter(k).requires_grad}


def spread(indices: list[int], count: int) -> list[int]:
    """`count` of them, evenly spread; pairs stay together, so that both factors of a layer are seen."""
    if len(indices) <= count:
        return list(indices)
    pairs = [indices[i : i + 2] for i in range(0, len(indices), 2)]
    chosen = np.linspace(0, len(pairs) - 1, max(1, count // 2)).round().astype(int)
    return [i for j in sorted(set(chosen.tolist())) for i in pairs[j]]


class HookWatch:
    """Hooks of others: those on gradients are looked through, modules with hooks are counted when called.

    A module whose `forward` was replaced counts as one with hooks, whoever replaced it.

    Attributes:
        kind: The kind of gradient hook found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kind = model, TENSOR_HOOK
        self._calls: dict[str, int] = {}
        self._handles: dict[Any, Any] = {}

    def look(self, parameters: Sequence[nn.Parameter], store: Callable[[], dict[int, Tensor]]) -> None:
        """Find new ones. Gradients as autograd made them go to `store()`, by position."""
        for i, p in enumerate(parameters):
            if i not in self._handles and (kind := _gradient_hooks(p)):
                self.kind = kind
                self._handles[i] = _in_front(p, i, store)
        for name, module in self.model.named_modules():
            if "lora_" not in name or name in self._calls or len(self._calls) == MODULES:
                continue
            # A forward of the instance's own is a hook by another name.
            if any(getattr(module, kind) for kind in _MODULE_HOOKS) or "forward" in vars(module):
                self._calls[name] = 0
                self._handles[name] = module.register_forward_pre_hook(self._counter(name))

    def _counter(self, name: str) -> Any:
        def count(*_: Any) -> None:
            self._calls[name] += 1

        return count

    def reset(self) -> None:
        """Begin a step."""
        self._calls = dict.fromkeys(self._calls, 0)

    def facts(self) -> dict[str, int]:
        """For the step's row: how many modules have hooks, how often they were called."""
        if not self._calls:
            return {}
        return {"hooked_modules": len(self._calls), "module_calls": sum(self._calls.values())}

    def remove(self) -> None:
        """Take our hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


class OrphanWatch:
    """Parameters of a LoRA tensor's shape that neither the model nor the optimizer has, and that someone writes to.

    Attributes:
        written: How many, once known (after one more than `ORPHAN_STEP` steps).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.written = model, 0
        self._seen: list[tuple[Tensor, Tensor]] = []

    def look(self, steps: int, held: set[int], parameters: Sequence[nn.Parameter]) -> None:
        """At an optimizer's entry: find them once, and see one step later whose gradient has changed."""
        if steps + 1 == ORPHAN_STEP:
            known = held | {id(p) for p in self.model.parameters()}
            shapes = {p.shape for p in parameters}
            tensors = (o for o in gc.get_objects() if type(o) is nn.Parameter or type(o) is Tensor)
            lost = (o for o in tensors if o.is_leaf and o.requires_grad and id(o) not in known and o.shape in shapes)
            self._seen = [(o, o.grad.detach().clone()) for o in lost if o.grad is not None]
        elif steps == ORPHAN_STEP and self._seen:
            self.written = sum(o.grad is not None and not torch.equal(o.grad, g) for o, g in self._seen)
            self._seen = []


def _gradient_hooks(parameter: nn.Parameter) -> str | None:
    if parameter._backward_hooks:
        return TENSOR_HOOK
    return "post-accumulate hook" if getattr(parameter, "_post_accumulate_grad_hooks", None) else None


def _in_front(parameter: Any, index: int, store: Callable[[], dict[int, Tensor]]) -> Any:
    """A hook in front of all others that keeps the gradient as autograd accumulated it."""
    if _gradient_hooks(parameter) == TENSOR_HOOK:

        def keep(grad: Tensor) -> None:
            kept = store()
            kept[index] = kept[index] + grad if index in kept else grad.detach().clone()

        handle = parameter.register_hook(keep)
        _move_to_front(parameter._backward_hooks, handle.id)
        return handle

    def keep_accumulated(p: Tensor) -> None:
        assert p.grad is not None
        store()[index] = p.grad.detach().clone()

    handle = parameter.register_post_accumulate_grad_hook(keep_accumulated)
    _move_to_front(parameter._post_accumulate_grad_hooks, handle.id)
    return handle


def _move_to_front(hooks: dict[int, Any], key: int) -> None:
    # Not move_to_end: autograd iterates in the order of insertion.
    others = {k: hook for k, hook in hooks.items() if k != key}
    own = hooks[key]
    hooks.clear()
    hooks[key] = own
    hooks.update(others)
