"""Export: GGUF files and Modelfiles from a base model and a PEFT adapter, and the proof that they are the same model.

Importing this package imports no torch: the functions below load their modules when they are called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_impl.export.metadata import read_metadata
    from grit_impl.export.modelfile import read_modelfile, write_modelfile
    from grit_impl.export.writer import Export, check_same_base, export_adapter, export_merged

__all__ = [
    "Export",
    "check_same_base",
    "export_adapter",
    "export_merged",
    "read_metadata",
    "read_modelfile",
    "write_modelfile",
]
_HOMES = {"read_metadata": "metadata", "read_modelfile": "modelfile", "write_modelfile": "modelfile"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'writer')}"), name)
