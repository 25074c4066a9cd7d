"""Between a training and its observer: what goes wrong in the observer ends the observation, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Observer(Protocol):
    """Who may fail."""

    problem: str | None

    def fail(self, where: str, error: Exception) -> None: ...


class Guarded:
    """An observer whose methods never raise: after the first exception each call answers None.

    Args:
        observer: Its `fail` is told of that exception; from then on its `problem` is not None.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __getattr__(self, name: str) -> Any:
        # Looked up at each call, so that a method replaced on the observer counts.
        return self.wrap(lambda *args: getattr(self._observer, name)(*args), name)

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

        return guarded
