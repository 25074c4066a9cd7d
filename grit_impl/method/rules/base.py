"""What update rules have in common.

`UpdateRule` changes the gradients and leaves the step to the inner optimizer. `WholeStep` computes the step itself: it
writes a direction into `.grad`, and plain SGD in the inner optimizer's place moves the parameters by
-lr (direction + weight_decay * parameter), which is AdamW's decoupled decay. Learning rates, schedules, parameter
groups and GradScaler therefore work as before.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from grit_impl.config import UPDATE_RULES, GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.factors import KroneckerFactors
from grit_impl.method.stacks import Stack, layer_stacks, make_stacks

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair

# A whole step needs fewer temporaries than a product: stacks of 32 MiB in float32.
STACK_ELEMENTS = 1 << 23
_log = logging.getLogger(__name__)
BETAS = (0.9, 0.999)  # for groups without betas, i.e. plain SGD's
Rule = TypeVar("Rule", bound="type[UpdateRule]")


def rule(name: str) -> Callable[[Rule], Rule]:
    """Register a class as the update rule of this name."""

    def register(made: Rule) -> Rule:
        UPDATE_RULES[name] = made
        return made

    return register


class UpdateRule:
    """Changes the gradients before the inner optimizer uses them; `update` is all that one must have.

    Args:
        config: The hyperparameters.
        layers: The adapters' layers.
        factors: Their Kronecker factors.

    Attributes:
        stacks: What the rule changes.
        sides: Which factor (0: S_a, 1: S_g) the gradient of A meets, and which that of B.
        whole_step: Computes the step itself, from gradients that are clipped; otherwise clipping follows.
        captures: Needs the factors; without, no statistics are taken, and options that read them are refused.
    """

    whole_step: ClassVar[bool] = False
    captures: ClassVar[bool] = True
    _STATE: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: GRITConfig, layers: Sequence[LoRAFactorPair], factors: KroneckerFactors) -> None:
        self.config, self.layers, self.factors = config, layers, factors
        self.stacks = [] if self.whole_step else layer_stacks(layers)
        names = ("lambda_kfac", "lambda_reproj", "reprojection_freq")
        if not self.captures and (asked := [name for name in names if getattr(config, name)]):
            raise GRITError(
                f"update_rule = {config.update_rule!r} takes no statistics, which {asked[0]} needs: set it to 0"
            )
        self.sides = (1, 0) if config.pairing == "fisher" else (0, 1)
        self._optimizer: Optimizer | None = None
        self._restored: dict[str, Any] | None = None

    def update(self, *, warm: bool, refresh: bool) -> None:
        """Replace the gradients (regularised; clipped for a whole step), once per optimizer step.

        Args:
            warm: The factors were inverted and `ng_warmup_steps` are over.
            refresh: They are warm and were inverted just now: follow them.
        """
        raise NotImplementedError

    def project(self) -> None:
        """Keep what a reprojection dropped out of the moments."""

    def take_place_of(self, inner: Optimizer) -> Optimizer:
        """The optimizer that steps where `inner` was meant to."""
        return inner

    def check_ready(self) -> None:
        """Raise a GRITError where a whole step has no optimizer that takes it."""
        if self.whole_step and self._optimizer is None:
            raise GRITError(f"update_rule = {self.config.update_rule!r} has no optimizer yet: use GRITOptimizer")

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
            if name not in state:
                raise GRITError(f"the GRIT checkpoint does not fit: it has no {name!r}, so another version wrote it")
            mine, saved = getattr(self, name), state[name]
            if isinstance(mine, list):
                if [t.shape for t in mine] != [t.shape for t in saved]:
                    raise GRITError("the GRIT checkpoint does not fit: the optimizer has other parameters or groups")
                for tensor, value in zip(mine, saved, strict=True):
                    tensor.copy_(value)
            else:
                setattr(self, name, saved.to(mine.device).clone() if isinstance(mine, Tensor) else saved)

    def memory_bytes(self) -> int:
        """Bytes of the rule's state, on the parameters' device; GRIT's factors not counted, 0 without an optimizer."""
        values = [v if isinstance(v, list) else [v] for v in self.state_dict().values()]
        return sum(t.numel() * t.element_size() for v in values for t in v if isinstance(t, Tensor))


class WholeStep(UpdateRule):
    """Computes the step: what `update` writes moves the parameters by -lr times it.

    A rule with moments names its attributes in `_STATE` and makes them in `init`. Moments are a parameter's own, as in
    torch's optimizers: without a gradient they stay, and the bias correction counts the steps that had one.

    Attributes:
        steps: Of each stack (n,): steps in which the parameter had a gradient.
        lora_only: Has no step for trained parameters that are not LoRA's, and refuses them.
        paired: Wants stacks of layers whose other factors have one shape, too.
    """

    whole_step = True
    lora_only: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    steps: list[Tensor]

    def init(self) -> None:
        """Make the state for `stacks`."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        assert self._optimizer is not None
        return self._optimizer.param_groups

    def count(self, stack: Stack, steps: Tensor) -> Tensor | None:
        """Count a step of the parameters that have a gradient; returns `stack.there()`."""
        there = stack.there()
        steps += 1 if there is None else there
        return there

    @staticmethod
    def share(stack: Stack, beta: float, there: Tensor | None) -> float | Tensor:
        """What a new value weighs in an average with this decay: 1 - beta, and 0 for parameters without a gradient."""
        return 1 - beta if there is None else stack.each(there * (1 - beta))

    @staticmethod
    def correction(stack: Stack, beta: float, steps: Tensor) -> Tensor:
        """1 - beta^steps, exact to the last bits also where beta is near 1; shaped like `stack.each`."""
        return stack.each(-torch.expm1(steps.clamp_min(1) * (math.log(beta) if beta else -math.inf)))

    def take_place_of(self, inner: Optimizer) -> Optimizer:
        """Plain SGD over the same parameter groups (the same objects, so that schedulers still reach them).

        Moments of 8 bits become float32 ones, and a warning says how much that is.

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
        if (bits := re.search(r"(\d+)bit", name)) and int(bits[1]) < 32:
            _log.warning(
                "update_rule = %r takes the place of %s and keeps its own state in float32: %.1f MiB",
                *(self.config.update_rule, name, self.memory_bytes() / 2**20),
            )
        return sgd

    def bind(self, optimizer: Optimizer) -> None:
        """Learn which parameters are trained, in which groups, and make the state for them.

        Raises:
            GRITError: the optimizer misses some of the layers', or trains others that the rule has no step for.
        """
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in trained for layer in self.layers for p in (layer.a, layer.b)):
            raise GRITError(f"update_rule = {self.config.update_rule!r}: the optimizer misses LoRA parameters")
        self._optimizer = optimizer
        self.stacks = make_stacks(self.layers, optimizer.param_groups, STACK_ELEMENTS, self.paired)
        if self.lora_only and any(stack.side is None for stack in self.stacks):
            raise GRITError(
                f"update_rule = {self.config.update_rule!r} knows LoRA factors only, and other parameters are trained "
                "too: freeze them, or use update_rule = 'eigenbasis'"
            )
        self.steps = [
            torch.zeros(stack.shape[0], dtype=stack.dtype, device=stack.layers.device) for stack in self.stacks
        ]
        self.init()
        if self._restored is not None:
            self.load_state_dict(self._restored)
