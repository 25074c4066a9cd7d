"""What `grit train` is told: options from a YAML file, as trl and axolotl take them, and packages that it needs."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from grit_impl.errors import GRITError


def read_options(path: Path, parameters: Sequence[click.Parameter]) -> dict[str, Any]:
    """What a file says, by the names that click has for the options.

    Args:
        path: A mapping of options to values; an option has any of its names on the command line, with or without
            underscores. `grit` holds a mapping of GRIT's own options.
        parameters: The command's.

    Raises:
        GRITError: the file is no such mapping, or names an option that there is not.
    """
    import yaml  # type: ignore[import-untyped]  # transformers and peft bring it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GRITError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise GRITError(f"{path} holds no options: write one a line, e.g. learning_rate: 1e-3")
    names = {
        spelling.removeprefix("--"): str(each.name)
        for each in parameters
        if isinstance(each, click.Option) and not each.is_eager and each.name not in ("explain", "overrides")
        for spelling in (*each.opts, *(f"--{each.name}",))
    }
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name == "grit":
            if not isinstance(value, dict):
                raise GRITError(f"{path}: grit holds GRIT's options, e.g. kfac_update_freq: 5")
            found["overrides"] = [f"{option}={each}" for option, each in value.items()]
        elif name not in names:
            near = difflib.get_close_matches(name, [*names, "grit"], 1)
            raise GRITError(f"{path} has no option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        elif isinstance(value, dict):
            raise GRITError(f"{path}: {key} takes one value, not a mapping")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            found[names[name]] = text if isinstance(text, bool) else str(text)
    return found


LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"} | {
    "comet_ml": "comet_ml",
    "clearml": "clearml",
    "swanlab": "swanlab",
}
"""What `--report-to` takes, and the package that each needs."""


def require_loggers(names: str) -> None:
    """Refuse a logger that transformers does not know, or whose package is missing, before anything is trained.

    Raises:
        GRITError: which one, and what to install.
    """
    for name in names.split(",") if names not in ("", "none") else ():
        if name not in LOGGERS:
            raise GRITError(f"--report-to {name}: choose {', '.join(LOGGERS)}")
        if importlib.util.find_spec(LOGGERS[name]) is None:
            raise GRITError(f"--report-to {name} needs the package {LOGGERS[name]}: pip install {LOGGERS[name]}")


def require_package(name: str, extra: str) -> None:
    """Refuse to begin what a process of its own would fail at.

    Raises:
        ModuleNotFoundError: the package is missing; the command line says which extra brings it.
    """
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}: pip install 'grit-verify[{extra}]'", name=name)
