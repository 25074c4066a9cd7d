"""A run's folder when training is asked for again: continued if it is the same run, never deleted if it is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from grit_impl.recipes.arms import NEUTRAL, TrainingSettings
from grit_impl.record import RunRecord
from grit_impl.settings import flags

REQUEST = "spec.json"
"""What a run was started with: `spec`, `fingerprint`, `depends`, and whether it keeps a `ledger`."""
_OPTIONS = {"arm": "--arm", "base_model": "--base-model", "dataset": "--dataset", "seed": "--seed", "grit": "--set"} | {
    each.name: flags(each)[0] for each in fields(TrainingSettings)
}
# What follows from something else that was asked for, and what changes nothing that is learned.
_DERIVED = ("tokens", *NEUTRAL)
_NAMED = 4


def request_of(path: Path) -> dict[str, Any] | None:
    """What the run in a folder was started with, as far as can be read; None: there is no run."""
    try:
        found = json.loads((path / REQUEST).read_text())
        if isinstance(found, dict) and isinstance(found.get("spec"), dict):
            return found
    except (OSError, ValueError):
        pass
    if not (path / "run.json").is_file() and not (path / REQUEST).is_file():
        return None
    try:
        return {"spec": dict(RunRecord(path).run["config"])}
    except (ValueError, KeyError, TypeError):  # GRITError is a ValueError: a record that was cut short
        return {"spec": {}}


def holds_work(path: Path) -> bool:
    """Whether something would be lost with this folder: steps that were made, a checkpoint, or an adapter."""
    steps = path / "steps.jsonl"
    return (
        (path / "COMPLETE").exists()
        or (steps.is_file() and steps.stat().st_size > 0)
        or any((path / name).is_dir() and any((path / name).iterdir()) for name in ("checkpoints", "adapter", "gguf"))
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How one request differs from another: by options where there are any, else by what they depend on.

    Args:
        before: What `request_of` gave.
        now: As in `REQUEST`.
    """
    if before.get("fingerprint") == now["fingerprint"]:
        return []
    found = [*_options(before["spec"], now["spec"])]
    if not found and "depends" in before:
        found = [*_changed(before["depends"], now["depends"])]
    return found or ["the code, the libraries or the files that it was made from"]


def _options(before: Mapping[str, Any], now: Mapping[str, Any], inner: str = "") -> Iterator[str]:
    for name in {**now, **before}:
        one, other = before.get(name), now.get(name)
        if one == other or name in _DERIVED or (name == "alpha" and before.get("rank") != now.get("rank")):
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _options(one, other, name)
        elif inner == "grit":
            yield f"--set {name}={one} there, {name}={other} asked"
        elif name in _OPTIONS:
            yield f"{_OPTIONS[name]} {_short(one)} there, {_short(other)} asked"
        else:
            yield f"{name} {_short(one)} there, {_short(other)} now"


def _short(value: Any) -> str:
    return "set" if isinstance(value, dict) else "none" if value is None else str(value)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    one, other = before.get("versions") or {}, now.get("versions") or {}
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"{name} {one.get(name)} there, {other.get(name)} now"
    one, other = before.get("contents") or {}, now.get("contents") or {}
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"other content of {name}"
    if before.get("source") != now.get("source"):
        yield "other code of this project"
    if before.get("processes", 1) != now.get("processes", 1):
        yield f"{before.get('processes', 1)} processes there, {now.get('processes', 1)} now"
    if before.get("gpu") != now.get("gpu"):
        yield f"{'a' if before.get('gpu') else 'no'} GPU there, {'one' if now.get('gpu') else 'none'} now"


def refusal(path: Path, now: Mapping[str, Any]) -> str | None:
    """Why this folder is not trained in, or None: it is empty, of the same run, or holds nothing that could be lost."""
    before = request_of(path)
    if before is None or not holds_work(path) or not (named := differences(before, now)):
        return None
    kind = "a finished run" if (path / "COMPLETE").exists() else "an unfinished run"
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return (
        f"{path} holds {kind} with other options ({'; '.join(named[:_NAMED])}{more}): "
        "ask for the same, choose another --out, or move it aside with --fresh"
    )


def set_aside(path: Path) -> Path | None:
    """Move a run out of the way, under a name that nothing else has; a folder without work is removed.

    Returns:
        Where it is now, or None.
    """
    if not holds_work(path):
        shutil.rmtree(path)
        return None
    mark = path / "COMPLETE"
    of = (
        mark.read_text(errors="replace").strip()
        if mark.exists()
        else str((request_of(path) or {}).get("fingerprint", ""))
    )
    name = f"{path.name}.{'' if mark.exists() else 'unfinished-'}{of[:8] or 'unknown'}"
    number, aside = 1, path.with_name(name)
    while aside.exists():
        number += 1
        aside = path.with_name(f"{name}.{number}")
    path.rename(aside)
    return aside
