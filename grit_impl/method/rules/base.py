"""What update rules have in common: the stacks they work on, and the optimizer whose place they take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.factors import KroneckerFactors

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair

# Tensors of one shape are stacked up to this many elements: few kernels, and temporaries of 32 MiB at most.
STACK_ELEMENTS = 2**23
A, B = 0, 1
BETAS = (0.9, 0.999)  # for groups without betas, i.e. plain SGD's


class Stack:
    """Parameters of one kind and shape, handled as one tensor.

    Args:
        side: A (0), B (1), or None for trained parameters that are no LoRA factors.
        members: (index of the layer, look-up of the parameter) each; peft may re-create parameters.
        group: Index of their parameter group.

    Attributes:
        layers: (n,) indices of the layers, on the device.
    """

    def __init__(self, side: int | None, members: Sequence[tuple[int, Callable[[], nn.Parameter]]], group: int) -> None:
        self.side, self.group = side, group
        self._members = [look_up for _, look_up in members]
        first = self._members[0]()
        self.shape = (len(members), *first.shape)
        self.rank = 0 if side is None else first.shape[side]
        self.layers = torch.tensor([i for i, _ in members], device=first.device)
        self.dtype = torch.promote_types(torch.float32, first.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in order."""
        return [look_up() for look_up in self._members]

    def zeros(self) -> Tensor:
        """(n, *shape) in float32 or better."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.layers.device)

    def gradients(self) -> Tensor | None:
        """(n, *shape) copies; a missing one counts as zero. None: all are missing."""
        grads = [p.grad for p in self.parameters()]
        if all(g is None for g in grads):
            return None
        filled = [torch.zeros(self.shape[1:], device=self.layers.device) if g is None else g for g in grads]
        return torch.stack([g.to(self.dtype) for g in filled])

    def write(self, directions: Tensor) -> None:
        """Put the directions where the gradients were."""
        pairs = [(p.grad, d) for p, d in zip(self.parameters(), directions.unbind(), strict=True) if p.grad is not None]
        torch._foreach_copy_([g for g, _ in pairs], [d for _, d in pairs])

    def scale(self, factors: Tensor) -> None:
        """Multiply what was written by (n,) factors."""
        pairs = [(p.grad, f) for p, f in zip(self.parameters(), factors.unbind(), strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [f.to(g.dtype) for g, f in pairs])

    def turn(self, x: Tensor, matrix: Tensor) -> Tensor:
        """matrix' x for A, x matrix for B: the r-side of (n, *shape) in the coordinates of the columns of (n, r, r)."""
        return matrix.mT @ x if self.side == A else x @ matrix


class UpdateRule(ABC):
    """Computes the whole step from gradients and factors.

    Args:
        config: The hyperparameters.
        layers: The adapters' layers.
        factors: Their Kronecker factors.

    Attributes:
        stacks: What is trained, once the optimizer is known.
    """

    _STATE: tuple[str, ...] = ()

    def __init__(self, config: GRITConfig, layers: Sequence[LoRAFactorPair], factors: KroneckerFactors) -> None:
        self.config, self.layers, self.factors = config, layers, factors
        self.stacks: list[Stack] = []
        self._optimizer: Optimizer | None = None
        self._restored: dict[str, Any] | None = None

    @abstractmethod
    def write(self, refresh: bool) -> None:
        """Replace the gradients (clipped, regularised) by directions: the parameters move by -lr times them.

        Args:
            refresh: The factors were just inverted: follow them.
        """

    @abstractmethod
    def project(self) -> None:
        """Keep what a reprojection dropped out of the moments."""

    @abstractmethod
    def _allocate(self) -> None:
        """Make the state for `stacks`."""

    def memory_bytes(self) -> int:
        """Bytes of the rule's state, on the parameters' device; GRIT's factors not counted, 0 without an optimizer."""
        values = [v if isinstance(v, list) else [v] for v in self.state_dict().values()]
        return sum(t.numel() * t.element_size() for v in values for t in v if isinstance(t, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, lists of tensors (stacks, in the optimizer's order) and numbers; empty without an optimizer."""
        return {name: getattr(self, name) for name in self._STATE} if self.stacks else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; kept until the optimizer is known, where it is not yet.

        Raises:
            GRITError: the optimizer's parameters are grouped differently.
        """
        if not (self.stacks and state):
            self._restored = state
            return
        self._restored = None
        for name in self._STATE:
            mine, saved = getattr(self, name), state[name]
            if isinstance(mine, list):
                if [t.shape for t in mine] != [t.shape for t in saved]:
                    raise GRITError("the GRIT checkpoint does not fit: the optimizer has other parameters or groups")
                for tensor, value in zip(mine, saved, strict=True):
                    tensor.copy_(value)
            else:
                setattr(self, name, saved.to(mine.device).clone() if isinstance(mine, Tensor) else saved)

    def require_optimizer(self) -> Optimizer:
        """The optimizer that takes the directions.

        Raises:
            GRITError: there is none.
        """
        if self._optimizer is None:
            raise GRITError(f"update_rule = {self.config.update_rule!r} has no optimizer yet: use GRITOptimizer")
        return self._optimizer

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.require_optimizer().param_groups

    def take_place_of(self, inner: Optimizer) -> SGD:
        """Plain SGD over the same parameter groups (the same objects, so that schedulers still reach them).

        Raises:
            GRITError: the inner optimizer is neither AdamW nor plain SGD, so that something of it would be lost.
        """
        name, groups = type(inner).__name__, inner.param_groups
        adamw = name.startswith(("AdamW", "PagedAdamW"))
        odd = [key for key in ("amsgrad", "maximize", "momentum") if any(g.get(key) for g in groups)]
        if odd or not (adamw or isinstance(inner, SGD)):
            what = f"{name} with {odd[0]}" if odd else name
            raise GRITError(
                f"update_rule = {self.config.update_rule!r} computes the step itself, in place of AdamW or plain SGD; "
                f"{what} would be lost: choose optim='adamw_torch', or update_rule='precondition'"
            )
        sgd = SGD([{"params": group["params"]} for group in groups], lr=0.0)
        for group, default in zip(groups, sgd.param_groups, strict=True):
            for key in ("fused", "foreach", "capturable", "differentiable"):
                group.pop(key, None)
            for key, value in default.items():
                group.setdefault(key, value)
        sgd.param_groups = groups
        self.bind(sgd)
        return sgd

    def bind(self, optimizer: Optimizer) -> None:
        """Learn which parameters are trained, in which groups, and make the state for them."""
        self._optimizer = optimizer
        sides: dict[int, tuple[int, int]] = {}
        for i, layer in enumerate(self.layers):
            sides[id(layer.a)], sides[id(layer.b)] = (A, i), (B, i)
        members: dict[Any, list[tuple[int, Callable[[], nn.Parameter]]]] = defaultdict(list)
        for g, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                side, i = sides.pop(id(p), (None, -1))
                key = (g, side, p.shape, p.dtype) if side is not None else (g, None, id(p))
                members[key].append((i, _look_up(self.layers, side, i, p)))
        if sides:
            raise GRITError(f"update_rule = {self.config.update_rule!r}: the optimizer misses LoRA parameters")
        self.stacks = []
        for (g, side, *_), all_of_them in members.items():
            count = max(1, STACK_ELEMENTS // all_of_them[0][1]().numel())
            for start in range(0, len(all_of_them), count):
                self.stacks.append(Stack(side, all_of_them[start : start + count], g))
        self._allocate()
        if self._restored is not None:
            self.load_state_dict(self._restored)


def _look_up(
    layers: Sequence[LoRAFactorPair], side: int | None, i: int, parameter: nn.Parameter
) -> Callable[[], nn.Parameter]:
    if side is None:
        return lambda: parameter
    return (lambda: layers[i].a) if side == A else (lambda: layers[i].b)
