"""Update rules: what becomes of a gradient once the Fisher factors are known (`GRITConfig.update_rule`).

Each module here may register some with `@rule("name")`; nothing else has to know of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grit_impl.config import UPDATE_RULES, GRITConfig

if TYPE_CHECKING:
    from grit_impl.method.factors import KroneckerFactors
    from grit_impl.method.layers import LoRAFactorPair
    from grit_impl.method.rules.base import UpdateRule

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def rule_class(name: str) -> type[UpdateRule]:
    """The rule of this name."""
    found: type[UpdateRule] = UPDATE_RULES[name]
    return found


def make_rule(config: GRITConfig, layers: Sequence[LoRAFactorPair], factors: KroneckerFactors) -> UpdateRule:
    """The rule of this configuration, for these layers and their factors."""
    return rule_class(config.update_rule)(config, layers, factors)
