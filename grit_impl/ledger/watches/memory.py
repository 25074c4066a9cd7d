"""What is alive in this process besides the model: tensors left behind, optimizers that never step, statistics."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grit_impl.ledger.watches.hooks import foreign_hooks, hooked

MEMORY_STEP = 3
MOST_OBJECTS = 100_000
"""Objects that are gone through in search of who a hook belongs to."""


class MemoryWatch:
    """Looks through the process's objects once, and sees one step later which of them are in use.

    Args:
        model: The watched one.
        ranks: Of its LoRA layers.

    Attributes:
        orphans: Parameters of a LoRA tensor's shape that neither the model nor the optimizer has, and that someone
            writes to.
        matrices: Square matrices of the rank's size, as a preconditioner's statistics are, that someone writes to or
            makes anew: of one kept for all layers, each layer's counts.
        read: By id, parameters that are not watched and whose gradients somebody has read, up to then.
        kept: Those of a LoRA tensor's shape that no module and no optimizer has.
        dead_hooks: Modules that are part of no other, and have a LoRA tensor's shape and hooks of somebody who knows
            the model, or reads the gradients of what it had.
        idle: Positions of tensors that an optimizer holds which has not stepped.
    """

    def __init__(self, model: nn.Module, ranks: Collection[int] = ()) -> None:
        self._ranks, self.model = ranks, model
        self.orphans = self.matrices = self.dead_hooks = self.kept = 0
        self.idle: list[int] = []
        self.read: dict[int, Tensor] = {}
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._versions: dict[int, tuple[Tensor, int]] = {}

    def look(self, steps: int, held: set[int], parameters: Sequence[nn.Parameter], ledger: Any = None) -> None:
        """At an optimizer's entry, in the third and the fourth step.

        Args:
            steps: Steps before this one.
            held: ids of what the optimizer holds.
            parameters: The watched tensors.
            ledger: Whose tensors are nobody else's.
        """
        if steps + 1 == MEMORY_STEP:
            alive = _Alive(parameters)
            if alive.dead():
                del alive
                gc.collect()  # what nobody refers to, ourselves among others
                alive = _Alive(parameters)
            ours = {id(self.model), *map(id, self.model.parameters()), *self.read}
            self.dead_hooks = sum(_reaches(foreign_hooks(module), ours) for module in alive.dead())
            self.kept, self.read = sum(id(o) in self.read for o in alive.lost()), {}
            known = held | alive.held | {id(p) for p in self.model.parameters()}
            self._seen = [
                (o, o.grad.detach().clone()) for o in alive.shaped if id(o) not in known and o.grad is not None
            ]
            self.idle = [i for i, p in enumerate(parameters) if id(p) in alive.held]
            self._versions = {id(m): (m, m._version) for m in self._matrices(alive, ledger)}
        elif steps == MEMORY_STEP and (self._seen or self._versions):
            self.orphans = sum(_differs(o.grad, g) for o, g in self._seen)
            if self._versions:
                alive = _Alive(parameters)
                found = self._matrices(alive, ledger)
                used = [m for m in found if self._versions.get(id(m), (m, -1))[1] != m._version]
                own = (alive.tensors, found, used, *self._versions.values())
                self.matrices = sum(_count(m) for m in _kept_by_others(used, own))
            self._seen, self._versions = [], {}

    def _matrices(self, alive: _Alive, ledger: Any) -> list[Tensor]:
        known = {id(t) for t in (*self.model.parameters(), *self.model.buffers(), *_tensors_of(ledger))}
        known |= {id(p.grad) for p in self.model.parameters()}
        states = (state for o in alive.optimizers for state in o.state.values() if isinstance(state, dict))
        values = (value for state in states for value in state.values())
        known |= {id(t) for value in values for t in (value if isinstance(value, list | tuple) else (value,))}
        square = (t for t in alive.tensors if t.ndim in (2, 3) and t.shape[-1] == t.shape[-2])
        return [t for t in square if t.shape[-1] in self._ranks and not t.requires_grad and id(t) not in known]


def optimized() -> set[int]:
    """ids of what the process's optimizers hold."""
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and "param_groups" in vars(o)]
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}


class _Alive:
    """The process's tensors, optimizers and modules.

    Attributes:
        shaped: Trainable leaves of the shape of one of `parameters`.
        held: ids of what optimizers hold.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.tensors: list[Tensor] = []
        self.optimizers: list[Optimizer] = []
        self._modules: list[nn.Module] = []
        for o in gc.get_objects():
            kind = type(o)
            if kind is Tensor or kind is nn.Parameter:
                self.tensors.append(o)
            elif issubclass(kind, nn.Module) and "_modules" in vars(o):
                self._modules.append(o)
            elif issubclass(kind, Optimizer) and "param_groups" in vars(o):
                self.optimizers.append(o)
        self._shapes = {p.shape for p in parameters}
        self.shaped = [o for o in self.tensors if o.is_leaf and o.requires_grad and o.shape in self._shapes]
        self.held = optimized()

    def dead(self) -> list[nn.Module]:
        """Hooked modules that are part of no other and have a watched tensor's shape."""
        parts = {id(part) for module in self._modules for part in module._modules.values()}
        alone = ((m, m._parameters.get("weight")) for m in self._modules if id(m) not in parts and hooked(m))
        return [m for m, weight in alone if weight is not None and weight.shape in self._shapes]

    def lost(self) -> list[Tensor]:
        """Parameters that no module and no optimizer has."""
        owned = self.held | {id(p) for module in self._modules for p in module._parameters.values()}
        return [o for o in self.shaped if type(o) is nn.Parameter and o.ndim > 1 and id(o) not in owned]


def _reaches(roots: Sequence[Any], wanted: set[int]) -> bool:
    """Whether one of these objects is found from somewhere, through what holds it but for the globals of modules.

    Another model of the process leaves hooks behind that know nothing of this one, and that nobody asks in its steps.
    """
    seen, left = {id(vars(module)) for module in list(sys.modules.values())}, list(roots)
    while left and len(seen) < MOST_OBJECTS:
        o = left.pop()
        if id(o) in wanted:
            return True
        if id(o) in seen or isinstance(o, type | ModuleType):
            continue
        seen.add(id(o))
        left += gc.get_referents(o)
    return False


def _tensors_of(ledger: Any) -> list[Tensor]:
    """All that is reached from it through containers and objects of its own kind."""
    found, seen, left = [], set(), [ledger]
    while left:
        o = left.pop()
        if id(o) in seen:
            continue
        seen.add(id(o))
        if isinstance(o, Tensor):
            found.append(o)
        elif isinstance(o, dict | list | tuple) or type(o).__module__.startswith("grit_impl.ledger"):
            left += gc.get_referents(o)
    return found


def _kept_by_others(tensors: Sequence[Tensor], ours: Sequence[Any]) -> list[Tensor]:
    """Those that somebody keeps in Python, other than in these containers: what autograd saves, nobody does."""
    known = set(map(id, ours))
    holders = [o for o in gc.get_referrers(*tensors) if id(o) not in known] if tensors else []
    kept = {id(t) for holder in holders for t in gc.get_referents(holder)}
    return [t for t in tensors if id(t) in kept]


def _count(matrix: Tensor) -> int:
    return 1 if matrix.ndim == 2 else len(matrix)


def _differs(now: Tensor | None, before: Tensor) -> bool:
    """Whether bits differ: NaN is no change."""
    return now is not None and not torch.equal(now.nan_to_num(), before.nan_to_num())
