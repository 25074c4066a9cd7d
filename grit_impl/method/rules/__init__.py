"""Update rules: what becomes of a gradient once the Fisher factors are known (`GRITConfig.update_rule`).

Each module here may register some with `@rule("name")`; nothing else has to know of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from grit_impl.config import UPDATE_RULES

if TYPE_CHECKING:
    from grit_impl.method.rules.base import UpdateRule

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def rule_class(name: str) -> type[UpdateRule]:
    """The rule of this name."""
    found: type[UpdateRule] = UPDATE_RULES[name]
    return found
