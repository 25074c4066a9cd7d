"""Who reads or assigns a parameter's `.grad`, from Python: a moment at which to look what was done before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Listener = Callable[[nn.Parameter, Tensor | None, bool], None]
_plain: Any = Tensor.grad
_listeners: list[Listener] = []


def compiled() -> bool:
    """Whether something was compiled in this process: its guards may not like an attribute that is ours."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
    return bool(counters.get("frames"))


def listen(listener: Listener) -> None:
    """From now on `listener(parameter, gradient, assigned)` is called before each access; it must not raise.

    Autograd, fused kernels and lists of gradients made before do not come by here.
    """
    if listener not in _listeners:
        _listeners.append(listener)
        nn.Parameter.grad = property(_read, _assign, _plain.__delete__)  # type: ignore[assignment]


def ignore(listener: Listener) -> None:
    """No longer; with the last listener the attribute is torch's own again."""
    if listener in _listeners:
        _listeners.remove(listener)
        if not _listeners:
            del nn.Parameter.grad


def _read(parameter: nn.Parameter) -> Tensor | None:
    grad: Tensor | None = _plain.__get__(parameter)
    for listener in tuple(_listeners):
        listener(parameter, grad, False)
    return grad


def _assign(parameter: nn.Parameter, value: Tensor | None) -> None:
    for listener in tuple(_listeners):
        listener(parameter, _plain.__get__(parameter), True)
    _plain.__set__(parameter, value)
