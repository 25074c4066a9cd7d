"""The structure of `grit_impl`: who may import whom, and how full a room may be. Oracle: the imports in the source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from grit_impl.imports import ROOT, closure, imported, modules

# From the ground up. A module imports only from its own room and from those that stand below it.
LAYERS = (
    ("errors", "notebook"),
    (
        "aqi",
        "compatibility",
        "config",
        "files",
        "imports",
        "machine",
        "processes",
        "record",
        "settings",
        "statistics",
        "tables",
    ),
    ("method",),
    ("trainer",),
    ("gguf",),
    ("recipes", "ledger"),
    ("curves", "probe", "cost", "zoo", "serve"),
    ("export",),
    ("evaluate", "runs"),
    ("sweep",),
    ("tryout", "verify"),
    ("cli", "__init__"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room(module: str) -> str:
    """The top-level part below the package: a folder's name, or a file's."""
    return [*module.split("."), "__init__"][1]


def upward() -> Iterator[str]:
    for module in modules():
        for other in imported(module):
            here, there = room(module), room(other)
            if here != there and LEVEL[there] >= LEVEL[here]:
                yield f"{module} -> {other}"


def test_every_room_has_a_level() -> None:
    assert {room(module) for module in modules()} == set(LEVEL)


def test_no_arrow_upward() -> None:
    assert sorted(upward()) == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_circle(module: str) -> None:
    """No module stands on itself, however long the way round, for type checkers either."""
    assert module not in closure(*imported(module))


def test_no_room_is_too_full() -> None:
    """At most 15 modules side by side, and at most a fifth of the lines in one room."""
    files = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in files.items() if n > 15} == {}
    lines = Counter[str]()
    for module, path in modules().items():
        if path.parent != ROOT:
            lines[room(module)] += len(path.read_text().splitlines())
    total = sum(len(path.read_text().splitlines()) for path in modules().values())
    assert {name: n for name, n in lines.items() if n > 0.2 * total} == {}


def test_a_class_has_a_name_of_its_own() -> None:
    """Who searches for a class finds one. Oracle: the lines that begin with `class`."""
    found = Counter(name for path in modules().values() for name in re.findall(r"^class (\w+)", path.read_text(), re.M))
    assert [name for name, n in found.items() if n > 1 and not name.startswith("_")] == []


def test_tests_mirror_the_package() -> None:
    """Who changes a room finds its tests under the same name."""
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    tests = Path(__file__).parent
    assert folders == {path.name for path in tests.iterdir() if path.is_dir() and path.name != "__pycache__"}
