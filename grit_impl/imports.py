"""Which modules of this package a module stands on, read off the source: for fingerprints and the test of layers."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent
PACKAGE = ROOT.name


@cache
def modules() -> dict[str, Path]:
    """All modules of the package by dotted name, with their files."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of the package that a module imports, anywhere in it: inside functions and for type checkers, too.

    One that goes through its `__path__` imports whatever stands in its folder.
    """
    known, names = modules(), set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else str(node.module))
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.Name) and node.id == "__path__":
            names.update(name for name in known if name.rpartition(".")[0] == module)
    return frozenset(names - {module})


def closure(*roots: str) -> dict[str, Path]:
    """The modules `roots` and everything of the package that they import, directly or not, with their files.

    Raises:
        KeyError: there is no such module: a moved file must not silently stop counting.
    """
    known, found, waiting = modules(), set[str](), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imported(name)
    return {name: known[name] for name in sorted(found)}
