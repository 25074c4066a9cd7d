"""GRITOptimizer: precondition, clip, step, in that order, around any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from grit_impl.method.manager import GRITManager


class GRITOptimizer(Optimizer):
    """A torch optimizer that preconditions the gradients before its inner optimizer consumes them.

    Parameter groups, state and defaults are the inner optimizer's own, so that schedulers, accelerate and GradScaler
    treat it like any other. With a GradScaler, gradients are unscaled before `step` is called; a step that the scaler
    skips is no step for GRIT either.

    Args:
        inner: Any optimizer (AdamW, 8-bit AdamW, SGD, ...) over the adapters' parameters. An `update_rule` that
            computes the whole step puts plain SGD with the same parameter groups in AdamW's place (an 8-bit AdamW's
            float32 state is announced).
        manager: The model's manager; attach it before training.
        max_grad_norm: Clip the total norm of the preconditioned gradients, or of what an update rule starts from; None
            or 0: no clipping.
    """

    inner: Optimizer
    manager: GRITManager
    max_grad_norm: float

    def __init__(self, inner: Optimizer, manager: GRITManager, max_grad_norm: float | None = None) -> None:
        # Optimizer.__init__ would build groups of its own; __setstate__ only installs the hooks and the profiler.
        inner = manager.rule.take_place_of(inner)
        super().__setstate__({"inner": inner, "manager": manager, "max_grad_norm": max_grad_norm or 0.0})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.inner.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics that belong to them (a step that a GradScaler skipped)."""
        self.manager.begin_window()
        self.inner.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Precondition, clip, step the inner optimizer, then reproject when due.

        Args:
            closure: Re-evaluates the loss; it is called once, before preconditioning.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.manager.before_step([p for group in self.param_groups for p in group["params"]], self.max_grad_norm)
        self.inner.step()
        self.manager.after_step(self.inner)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, with GRIT's under the key `grit`."""
        return {**self.inner.state_dict(), "grit": self.manager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both; a checkpoint of the inner optimizer alone starts GRIT afresh."""
        state_dict = dict(state_dict)
        grit = state_dict.pop("grit", None)
        self.inner.load_state_dict(state_dict)
        if grit is not None:
            self.manager.load_state_dict(grit)

    def __repr__(self) -> str:
        return f"GRITOptimizer({self.inner!r})"
