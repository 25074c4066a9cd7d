"""Planted mistakes: what the experiment that started this project did wrong, kept so that it can be reproduced.

A gradient that is preconditioned after the step is never used, and statistics from hooks on modules that fused kernels
do not call never come. Both look like GRIT from outside and leave the plain optimizer's run.
"""

from __future__ import annotations

from typing import Any

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.capture.fused import FusedTap
from grit_impl.method.capture.modules import LossTap
from grit_impl.method.manager import GRITManager
from grit_impl.method.rules import rule_class
from grit_impl.trainer import GRITCallback


class LateCallback(GRITCallback):
    """Preconditions when the optimizer has stepped; the loop clips the raw gradients.

    Args:
        config: As GRITCallback's.
        moment: `on_optimizer_step`, or `on_step_end`, when there are no gradients any more.
    """

    def __init__(self, config: GRITConfig | None = None, moment: str = "on_optimizer_step") -> None:
        if moment not in ("on_optimizer_step", "on_step_end"):
            raise GRITError(f"moment = {moment!r}: choose on_optimizer_step or on_step_end")
        super().__init__(config)
        self.moment = moment

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """As GRITCallback, without its clipping, and without a check that needs the weights before the step."""
        if rule_class(self.config.update_rule).whole_step:
            rule = f"update_rule = {self.config.update_rule!r}"
            raise GRITError(f"{rule} cannot be written at {self.moment}: choose on_pre_optimizer_step")
        super().on_train_begin(args, state, control, **kw)
        assert self.manager is not None
        self.manager.checks_completeness = False
        self._give_clipping_back(args)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Nothing: this would be in time."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Too late."""
        self._at("on_optimizer_step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Later still."""
        self._at("on_step_end")

    def _at(self, moment: str) -> None:
        if self.manager is not None and self.moment == moment:
            self.manager.precondition()


class ModulesOnly(GRITManager):
    """Hooks the modules even where fused kernels bypass them, and does not check what comes of it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.checks_completeness = False

    def _fused_taps(self, loss: LossTap) -> list[FusedTap]:
        return []


class StarvedCallback(GRITCallback):
    """Gets no statistics from fused kernels."""

    manager_class = ModulesOnly
