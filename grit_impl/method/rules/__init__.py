"""Update rules: what becomes of a gradient once the Fisher factors are known (`GRITConfig.update_rule`).

* `precondition` multiplies the gradient by the damped inverses and leaves the step to the inner optimizer; it lives
  in `GRITManager` and needs no state.
* `eigenbasis` and `trust_region` compute the whole step. They write a direction into `.grad`, and plain SGD in the
  inner optimizer's place moves the parameters by -lr (direction + weight_decay * parameter), which is AdamW's decoupled
  decay. Learning rates, schedules, parameter groups and GradScaler therefore work as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grit_impl.config import GRITConfig
from grit_impl.method.factors import KroneckerFactors
from grit_impl.method.rules.base import UpdateRule
from grit_impl.method.rules.eigenbasis import Eigenbasis
from grit_impl.method.rules.trust_region import TrustRegion

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair

RULES: dict[str, type[UpdateRule]] = {"eigenbasis": Eigenbasis, "trust_region": TrustRegion}


def make_rule(config: GRITConfig, layers: Sequence[LoRAFactorPair], factors: KroneckerFactors) -> UpdateRule | None:
    """The rule that computes the step; None for `precondition`, which leaves it to the inner optimizer."""
    rule = RULES.get(config.update_rule)
    return None if rule is None else rule(config, layers, factors)
