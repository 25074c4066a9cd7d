"""Others' hooks: those on gradients are looked through, those on modules are counted when they are called."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from grit_impl.ledger.timeline import ACCUMULATED_HOOK, TENSOR_HOOK
from grit_impl.ledger.watches.tensors import ModuleHook

MODULES, BETWEEN = 16, 3
"""Modules whose hooks are counted, and hooks of one tensor that are seen apart from the next one."""
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Store = Callable[[int], dict[int, Tensor]]


class HookWatch:
    """Hooks of others: those on gradients are looked through, modules with hooks are counted when called.

    Modules are LoRA's own and the layers that hold them; hooks on layers do not count where all of the model's modules
    have them, as a profiler's. A module of LoRA's whose `forward` was replaced counts as one with hooks, whoever
    replaced it.

    Args:
        model: It.
        protect: Makes a function that does not raise of one that may.

    Attributes:
        kind: The kind of gradient hook found.
        repeated: Positions of tensors that have the same hook several times.
    """

    def __init__(self, model: nn.Module, protect: Callable[..., Any] = lambda call, name: call) -> None:
        self.model, self.kind, self._protect = model, TENSOR_HOOK, protect
        self.repeated: set[int] = set()
        self._calls: dict[str, int] = {}
        self._handles: dict[str, Any] = {}
        self._keepers: dict[int, list[Any]] = {}

    def look(self, parameters: Sequence[nn.Parameter], store: Store) -> None:
        """Find new ones. Gradients as autograd made them go to `store(0)`, by position; after hook j, to `store(j)`."""
        for i, p in enumerate(parameters):
            if kind := _gradient_hooks(p):
                self.kind = kind
                self._look_through(p, i, store)
        modules = dict(self.model.named_modules())
        layers = {name.partition(".lora_")[0] for name in modules if ".lora_" in name}
        others = [m for name, m in modules.items() if "lora_" not in name and name not in layers]
        everywhere = sum(map(hooked, others)) * 2 > len(others)
        for name, module in modules.items():
            own = "lora_" in name
            if not (own or (name in layers and not everywhere)) or name in self._calls or len(self._calls) == MODULES:
                continue
            # A forward of the instance's own is a hook by another name.
            if hooked(module) or (own and "forward" in vars(module)):
                self._calls[name] = 0
                self._handles[name] = module.register_forward_pre_hook(self._counter(name))

    def _look_through(self, parameter: Any, i: int, store: Store) -> None:
        """A hook of ours in front of all others, and one between each two of them."""
        tensor_hook = self.kind == TENSOR_HOOK
        hooks = parameter._backward_hooks if tensor_hook else parameter._post_accumulate_grad_hooks
        own = self._keepers.setdefault(i, [])
        foreign = [hook for key, hook in hooks.items() if key not in {h.id for h in own}]
        if max(Counter(map(_identity, foreign)).values(), default=0) > 1:
            self.repeated.add(i)
        while len(own) < min(len(foreign), 1 + BETWEEN):
            keep = self._protect(_keeper(i, len(own), store, tensor_hook), "gradient hook")
            register = parameter.register_hook if tensor_hook else parameter.register_post_accumulate_grad_hook
            own.append(register(keep))
        # Not move_to_end: autograd iterates in the order of insertion.
        ours = [h.id for h in own if h.id in hooks]
        pairs = itertools.zip_longest(ours, [key for key in hooks if key not in ours])
        ordered = {key: hooks[key] for pair in pairs for key in pair if key is not None}
        hooks.clear()
        hooks.update(ordered)

    def _counter(self, name: str) -> Any:
        def count(*_: Any) -> None:
            self._calls[name] += 1

        return ModuleHook(self._protect(count, "module hook"))

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
        for handle in (*self._handles.values(), *itertools.chain(*self._keepers.values())):
            handle.remove()
        self._handles, self._keepers = {}, {}


def _keeper(i: int, j: int, store: Store, tensor_hook: bool) -> Callable[[Tensor], None]:
    def keep(grad: Tensor) -> None:
        kept = store(j)
        kept[i] = kept[i] + grad if i in kept else grad.detach().clone()

    def keep_accumulated(p: Tensor) -> None:
        if p.grad is not None:
            store(j)[i] = p.grad.detach().clone()

    return keep if tensor_hook else keep_accumulated


def _identity(hook: Any) -> Any:
    """Equal for two that do the same: one function, with the same arguments and variables."""
    if isinstance(hook, functools.partial):
        return (_identity(hook.func), *map(id, hook.args), *sorted((k, id(v)) for k, v in hook.keywords.items()))
    function = getattr(hook, "__func__", hook)
    owner = id(getattr(hook, "__self__", None))
    code = getattr(function, "__code__", None)
    if code is None:
        return id(hook)
    given = [*(getattr(function, "__defaults__", None) or ()), *map(_content, function.__closure__ or ())]
    return (owner, id(code), *(value if isinstance(value, str | int) else id(value) for value in given))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of others."""
    return bool(foreign_hooks(module))


def foreign_hooks(module: nn.Module) -> list[Any]:
    """A module's hooks, but for the ledger's."""
    hooks = (hook for kind in _MODULE_HOOKS for hook in getattr(module, kind).values())
    return [hook for hook in hooks if not hasattr(hook, "of_the_ledger")]


def _gradient_hooks(parameter: nn.Parameter) -> str | None:
    if parameter._backward_hooks:
        return TENSOR_HOOK
    return ACCUMULATED_HOOK if getattr(parameter, "_post_accumulate_grad_hooks", None) else None
