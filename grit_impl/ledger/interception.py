"""Standing in front of the functions that every training loop passes through, and stepping aside again."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grit_impl.ledger.timeline import CLIP, CLIP_VALUE, SCALER, ZERO_GRAD
from grit_impl.ledger.watches import access

GRADIENT_EVENTS = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_step_begin")
LIBRARIES = ("transformers.", "trl.", "accelerate.")


class Listener(Protocol):
    """Who is told; `GradientLedger` is the one, behind a guard: none of these raises."""

    def active(self) -> bool: ...
    def replaying(self) -> bool: ...
    def stepped(self) -> bool: ...
    def backward_begins(self) -> None: ...
    def backward_ended(self) -> None: ...
    def grad_returned(self, inputs: Any, grads: Any) -> None: ...
    def clips(self, maximum: Any, norm_type: Any, value: Any) -> None: ...
    def unscales(self, scaler: Any) -> None: ...
    def clears(self) -> None: ...
    def passed(self, who: str) -> None: ...
    def event_begins(self, event: str, who: str) -> None: ...
    def event_ends(self, reads: int) -> None: ...
    def scaler_stepped(self, stepped_before: bool) -> None: ...


class MayFail(Protocol):
    """Who may fail."""

    problem: str | None

    def fail(self, where: str, error: Exception) -> None: ...


class Guarded:
    """An observer whose methods never raise: after the first exception each call answers None.

    Args:
        observer: Its `fail` is told of that exception; from then on its `problem` is not None.
    """

    def __init__(self, observer: MayFail) -> None:
        self._observer = observer

    def __getattr__(self, name: str) -> Any:
        # Looked up at each call, so that a method replaced on the observer counts.
        found = self.__dict__[name] = self.wrap(lambda *args: getattr(self._observer, name)(*args), name)
        return found

    def wrap(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function under the same protection."""

        def guarded(*args: Any) -> Any:
            if self._observer.problem is not None:
                return None
            try:
                return call(*args)
            except Exception as error:
                self._observer.fail(name, error)
            return None

        dynamo: Any = sys.modules.get("torch._dynamo")
        return guarded if dynamo is None else dynamo.disable(guarded)  # a compiled step calls it, and has no part of it


class Interception:
    """Wraps the functions while a ledger is open; `remove` restores what it replaced.

    Functions that were imported by name before are found in the modules that hold them. A name in a closure or on an
    object cannot be found: what such a function does is seen by its effect.
    """

    def __init__(self, ledger: Listener) -> None:
        self._ledger = ledger
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self._depth = self._zeroing = 0
        functions = (
            (torch.autograd, "backward", self._backward),
            (torch.autograd, "grad", self._grad),
            (torch.nn.utils.clip_grad, "clip_grad_norm_", self._clip_norm),
            (torch.nn.utils.clip_grad, "clip_grad_value_", self._clip_value),
        )
        wrapped = {id(getattr(owner, name)): self._wrap(owner, name, inner) for owner, name, inner in functions}
        self._follow(wrapped)
        self._wrap(torch.amp.GradScaler, "unscale_", self._unscale)
        self._wrap(torch.amp.GradScaler, "step", self._scaler_step)
        self._wrap(torch.optim.Optimizer, "zero_grad", self._zero_grad)
        self._wrap(nn.Module, "zero_grad", self._zero_grad)
        if "transformers" in sys.modules:
            from transformers.trainer_callback import CallbackHandler

            self._wrap(CallbackHandler, "call_event", self._call_event)

    def remove(self) -> None:
        """Restore the originals, unless someone else has wrapped ours since."""
        for owner, name, original, wrapper in reversed(self._undo):
            if getattr(owner, name, None) is wrapper:
                setattr(owner, name, original)
        self._undo = []

    def _wrap(self, owner: Any, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # A wrapper that someone kept beyond our context is a plain call.
            if not self._undo:
                return original(*args, **kwargs)
            if self._ledger.replaying():  # a step that calls a closure of its own: its replay must touch nothing
                raise RuntimeError("its step does more than move the parameters")
            return inner(original, *args, **kwargs)

        setattr(owner, name, wrapper)
        self._undo.append((owner, name, original, wrapper))
        return wrapper

    def _follow(self, wrapped: dict[int, Callable[..., Any]]) -> None:
        """Replace the functions under the names that other modules have for them."""
        for module in list(sys.modules.values()):
            # Not torch's own, which use them inside what is wrapped already.
            inside = str(getattr(module, "__name__", "")).startswith("torch.") and module is not torch.nn.utils
            if inside or not isinstance(module, ModuleType):
                continue
            for name, value in list(vars(module).items()):
                if id(value) in wrapped:
                    vars(module)[name] = wrapped[id(value)]
                    self._undo.append((module, name, value, wrapped[id(value)]))

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Reentrant checkpointing runs backward passes inside a backward pass.
        if self._depth == 0:
            self._ledger.backward_begins()
        self._depth += 1
        try:
            result = original(*args, **kwargs)
        finally:
            self._depth -= 1
        if self._depth == 0:
            self._ledger.backward_ended()
        return result

    def _grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self._depth == 0:
            self._ledger.grad_returned(kwargs.get("inputs", args[1] if len(args) > 1 else None), result)
        return result

    def _clip_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._ledger.active():
            return original(*args, **kwargs)
        maximum = kwargs.get("max_norm", args[1] if len(args) > 1 else None)
        self._ledger.clips(maximum, kwargs.get("norm_type", args[2] if len(args) > 2 else 2.0), None)
        result = original(*args, **kwargs)
        self._ledger.passed(CLIP)
        return result

    def _clip_value(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._ledger.active():
            return original(*args, **kwargs)
        self._ledger.clips(None, None, kwargs.get("clip_value", args[1] if len(args) > 1 else None))
        result = original(*args, **kwargs)
        self._ledger.passed(CLIP_VALUE)
        return result

    def _unscale(self, original: Callable[..., Any], scaler: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._ledger.active():
            return original(scaler, *args, **kwargs)
        self._ledger.unscales(scaler)
        result = original(scaler, *args, **kwargs)
        self._ledger.passed(SCALER)
        return result

    def _scaler_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self._ledger.stepped()
        result = original(*args, **kwargs)
        self._ledger.scaler_stepped(before)
        return result

    def _zero_grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._zeroing or not self._ledger.active():
            return original(*args, **kwargs)
        self._zeroing += 1
        try:
            self._ledger.clears()
            result = original(*args, **kwargs)
            self._ledger.passed(ZERO_GRAD)
        finally:
            self._zeroing -= 1
        return result

    def _call_event(self, original: Callable[..., Any], handler: Any, event: str, *args: Any, **kwargs: Any) -> Any:
        if event not in GRADIENT_EVENTS or not self._ledger.active():
            return original(handler, event, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            for callback in foreign_listeners(handler, event):
                stack.enter_context(self._segment(callback, event))
            return original(handler, event, *args, **kwargs)

    @contextlib.contextmanager
    def _segment(self, callback: Any, event: str) -> Iterator[None]:
        """While open, what this callback does at this event is seen by itself."""
        method, name = getattr(callback, event), type(callback).__name__

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._ledger.event_begins(event, name)
            with _MissingReads() as reads:
                result = method(*args, **kwargs)
            self._ledger.event_ends(reads.missing)
            return result

        own = vars(callback).get(event) if hasattr(callback, "__dict__") else None
        with contextlib.suppress(AttributeError):  # a callback that takes no attributes is seen with its neighbours
            setattr(callback, event, watched)
        try:
            yield
        finally:
            with contextlib.suppress(AttributeError):
                setattr(callback, event, own) if own is not None else delattr(callback, event)


def foreign_listeners(handler: Any, event: str) -> list[Any]:
    """Callbacks, other than the libraries' own, that implement an event."""
    from transformers import TrainerCallback

    default = getattr(TrainerCallback, event, None)
    return [
        c
        for c in getattr(handler, "callbacks", ())
        if not type(c).__module__.startswith(LIBRARIES)
        and getattr(getattr(c, event, None), "__func__", None) is not default
    ]


class _MissingReads:
    """Counts reads of missing gradients: a modifier that comes after zero_grad finds nothing, and says nothing."""

    missing = 0

    def _count(self, parameter: nn.Parameter, grad: Tensor | None, assigned: bool) -> None:
        self.missing += grad is None and parameter.requires_grad and not assigned

    def __enter__(self) -> _MissingReads:
        access.listen(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        access.ignore(self._count)
