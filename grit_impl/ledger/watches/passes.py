"""Whether one piece of code goes over the gradients twice before a step, and writes to them each time."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from types import CodeType
from typing import Any

from torch import Tensor

from grit_impl.ledger.step import same_stamps, stamps

DEPTH = 8
"""Calls within each other that are told apart."""
Path = list[tuple[CodeType, int]]


class PassWatch:
    """Follows who reads which gradient, and finds it written to when it is read next."""

    def __init__(self) -> None:
        self._loop: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """After a backward pass; who called it is the training loop."""
        self._visit, self._at = 0, -1
        self._frames: list[int] = []
        self._loopers: set[CodeType] = set()
        self._read: dict[int, tuple[Path, int, Any]] = {}
        self._wrote: dict[int, list[tuple[Path, int]]] = {}
        frame: Any = sys._getframe(1)
        self._loop = set()
        while frame is not None:
            self._loop.add(id(frame))
            frame = frame.f_back

    def access(self, i: int, grad: Tensor) -> None:
        """Somebody reads the gradient at position i."""
        self._settle(i, grad)
        path, frames = self._path()
        if i != self._at:
            # The call that has read the tensor before, too, goes over them.
            over = (code for (code, _), frame in zip(path, frames, strict=True) if frame in self._frames)
            self._loopers.update(itertools.islice(over, 1))
            self._visit, self._at = self._visit + 1, i
        self._read[i], self._frames = (path, self._visit, stamps([grad])), frames

    def again(self, grads: Sequence[Tensor | None]) -> list[int]:
        """Positions to which the same code has written in two passes, with others in between.

        Args:
            grads: As they are now.
        """
        for i in self._read:
            self._settle(i, grads[i])
        pairs = {i: itertools.combinations(wrote, 2) for i, wrote in self._wrote.items()}
        return [i for i, found in pairs.items() if any(a[1] != b[1] and self._same(a[0], b[0]) for a, b in found)]

    def _same(self, a: Path, b: Path) -> bool:
        """Whether one place in the code, wherever it was called from, went over the tensors."""
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
        return any(code in self._loopers for (code, _), _ in common)

    def _settle(self, i: int, grad: Tensor | None) -> None:
        path, visit, seen = self._read.get(i, ([], 0, None))
        if seen is not None and not same_stamps(seen, stamps([grad])):
            self._wrote.setdefault(i, []).append((path, visit))

    def _path(self) -> tuple[Path, list[int]]:
        """Who runs, innermost first, up to the training loop; and their frames."""
        frame: Any = sys._getframe(2)
        path: Path = []
        frames: list[int] = []
        while frame is not None and len(path) < DEPTH:
            if not str(frame.f_globals.get("__name__")).startswith(("grit_impl.ledger", "torch.", "transformers.")):
                path.append((frame.f_code, frame.f_lineno))
                frames.append(id(frame))
                if frames[-1] in self._loop:
                    break
            frame = frame.f_back
        return path, frames
