"""What the ledger watches of a model: LoRA tensors and their use, others' hooks, and tensors left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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


def sharded(model: nn.Module) -> str | None:
    """What a model's parameters are sharded by, if they are: a process then holds parts of gradients only."""
    for p in model.parameters():
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


class LayerWatch:
    """Whether tensors take part in the forward pass, as far as their layers say.

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

    def absent(self) -> dict[int, str]:
        """Position -> why it takes no part."""
        found: dict[int, str] = {}
        for prefix, (layer, tensors) in self._layers.items():
            if layer is None:
                continue
            why = ""
            if _submodule(self.model, prefix) is not layer:
                why = "its layer is no longer in the model"
            elif getattr(layer, "merged", False):
                why = "merged into the base weight"
            elif getattr(layer, "disable_adapters", False):
                why = "adapters are switched off"
            active = getattr(layer, "active_adapters", None)
            for i, adapter in tensors:
                if why or (isinstance(active, list | tuple) and adapter and adapter not in active):
                    found[i] = why or f"the active adapter is {', '.join(map(str, active or ())) or 'none'}"
        return found


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    module: Any = model
    for part in name.split("."):
        module = getattr(module, "_modules", {}).get(part)
    return module if isinstance(module, nn.Module) else None


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
    """

    def __init__(self, model: nn.Module, protect: Callable[..., Any] = lambda call, name: call) -> None:
        self.model, self.kind, self._protect = model, TENSOR_HOOK, protect
        self._calls: dict[str, int] = {}
        self._handles: dict[Any, Any] = {}

    def look(self, parameters: Sequence[nn.Parameter], store: Callable[[], dict[int, Tensor]]) -> None:
        """Find new ones. Gradients as autograd made them go to `store()`, by position."""
        for i, p in enumerate(parameters):
            if i not in self._handles and (kind := _gradient_hooks(p)):
                self.kind = kind
                self._handles[i] = _in_front(p, i, store, self._protect)
        modules = dict(self.model.named_modules())
        layers = {name.partition(".lora_")[0] for name in modules if ".lora_" in name}
        others = [m for name, m in modules.items() if "lora_" not in name and name not in layers]
        everywhere = sum(map(_hooked, others)) * 2 > len(others)
        for name, module in modules.items():
            own = "lora_" in name
            if not (own or (name in layers and not everywhere)) or name in self._calls or len(self._calls) == MODULES:
                continue
            # A forward of the instance's own is a hook by another name.
            if _hooked(module) or (own and "forward" in vars(module)):
                self._calls[name] = 0
                self._handles[name] = module.register_forward_pre_hook(self._counter(name))

    def _counter(self, name: str) -> Any:
        def count(*_: Any) -> None:
            self._calls[name] += 1

        return self._protect(count, "module hook")

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


def masters(optimizer: Any, parameters: Sequence[nn.Parameter], missing: Sequence[int]) -> dict[int, Tensor]:
    """Position -> the tensor that an optimizer holds in a parameter's place: of its shape and, once rounded, its equal.

    Only where the parameter has a coarser type: a tensor of the same type is a copy that was left behind.

    Args:
        optimizer: Any of torch's kind.
        parameters: The model's.
        missing: Positions of those that it does not hold.
    """
    found: dict[int, Tensor] = {}
    candidates = [q for group in optimizer.param_groups for q in group["params"]]
    for i in missing:
        p = parameters[i]
        for q in candidates:
            alike = q.shape == p.shape and q.device == p.device and q.element_size() > p.element_size()
            if alike and torch.equal(q.detach().to(p.dtype), p.detach()):
                found[i] = q
                candidates = [c for c in candidates if c is not q]
                break
    return found


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


def _hooked(module: nn.Module) -> bool:
    hooks = (hook for kind in _MODULE_HOOKS for hook in getattr(module, kind).values())
    return any(not hasattr(hook, "of_the_ledger") for hook in hooks)


def _gradient_hooks(parameter: nn.Parameter) -> str | None:
    if parameter._backward_hooks:
        return TENSOR_HOOK
    return "post-accumulate hook" if getattr(parameter, "_post_accumulate_grad_hooks", None) else None


def _in_front(parameter: Any, index: int, store: Callable[[], dict[int, Tensor]], protect: Callable[..., Any]) -> Any:
    """A hook in front of all others that keeps the gradient as autograd accumulated it."""
    if _gradient_hooks(parameter) == TENSOR_HOOK:

        def keep(grad: Tensor) -> None:
            kept = store()
            kept[index] = kept[index] + grad if index in kept else grad.detach().clone()

        handle = parameter.register_hook(protect(keep, "gradient hook"))
        _move_to_front(parameter._backward_hooks, handle.id)
        return handle

    def keep_accumulated(p: Tensor) -> None:
        if p.grad is not None:
            store()[index] = p.grad.detach().clone()

    handle = parameter.register_post_accumulate_grad_hook(protect(keep_accumulated, "gradient hook"))
    _move_to_front(parameter._post_accumulate_grad_hooks, handle.id)
    return handle


def _move_to_front(hooks: dict[int, Any], key: int) -> None:
    # Not move_to_end: autograd iterates in the order of insertion.
    others = {k: hook for k, hook in hooks.items() if k != key}
    own = hooks[key]
    hooks.clear()
    hooks[key] = own
    hooks.update(others)
