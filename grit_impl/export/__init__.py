"""Export: GGUF files and Modelfiles from a base model and a PEFT adapter, and the proof that they are the same model.

Importing this package imports no torch: the functions below load their modules when they are called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_impl.export.writer import Export, export_adapter, export_merged
    from grit_impl.gguf.encoding import check_same_base
    from grit_impl.gguf.metadata import read_metadata
    from grit_impl.gguf.modelfile import read_modelfile, write_modelfile

__all__ = [
    "Export",
    "check_same_base",
    "export_adapter",
    "export_merged",
    "read_metadata",
    "read_modelfile",
    "write_modelfile",
]
_HOMES = {
    "check_same_base": "gguf.encoding",
    "read_metadata": "gguf.metadata",
    "read_modelfile": "gguf.modelfile",
    "write_modelfile": "gguf.modelfile",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"grit_impl.{_HOMES.get(name, 'export.writer')}"), name)
