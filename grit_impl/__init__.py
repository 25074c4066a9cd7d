"""GRIT for LoRA fine-tuning, and the evidence that it works. The public names, each imported when it is first used:

* `GRITConfig`, `training_arguments`, `GRITTrainer`, `GRITCallback`, `with_grit`: train with GRIT.
* `gradient_ledger`, `judge`, `assert_effective`: record what happens to the gradients of any training, and judge it.
* `export`: GGUF files and Modelfiles, and the proof that they are the trained model (a package of functions).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_impl import export
    from grit_impl.config import GRITConfig, training_arguments
    from grit_impl.ledger.recorder import gradient_ledger
    from grit_impl.ledger.verdict import assert_effective
    from grit_impl.ledger.verdict import judge_ledger as judge
    from grit_impl.trainer import GRITCallback, GRITTrainer, with_grit

__all__ = [
    "GRITCallback",
    "GRITConfig",
    "GRITTrainer",
    "assert_effective",
    "export",
    "gradient_ledger",
    "judge",
    "training_arguments",
    "with_grit",
]

_HOMES = {
    "GRITCallback": "trainer",
    "GRITConfig": "config",
    "GRITTrainer": "trainer",
    "assert_effective": "ledger.verdict",
    "gradient_ledger": "ledger.recorder",
    "judge": "ledger.verdict",
    "training_arguments": "config",
    "with_grit": "trainer",
}


def __getattr__(name: str) -> Any:
    if name == "export":
        return importlib.import_module("grit_impl.export")
    if name not in _HOMES:
        raise AttributeError(f"module 'grit_impl' has no attribute {name!r}; public are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), "judge_ledger" if name == "judge" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
