"""Library versions: what does not go together is refused at import, in one line, before anything heavy is loaded."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from grit_impl.compatibility import OLDEST, check_versions, installed
from grit_impl.errors import GRITError

ROOT = Path(__file__).parents[1]
SOUND = {"torch": "2.13", "transformers": "5.24", "peft": "0.21.2", "trl": "1.16", "accelerate": "1.15"}


def versions(**changes: str) -> dict[str, Version]:
    return {name: Version(text) for name, text in {**SOUND, **changes}.items()}


@pytest.mark.parametrize(
    "changes", [{}, {"transformers": "4.57.6", "peft": "0.17.1", "trl": "0.23.1"}, {"peft": "0.18.0"}]
)
def test_supported(changes):
    """Oracle: the corners of the tox matrix."""
    check_versions(versions(**changes))
    check_versions(installed())
    check_versions({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft": "0.17.1"},
            "transformers 5.24 with peft 0.17.1 is not supported (peft imports HybridCache, which transformers 5 "
            "removed): pip install 'peft>=0.18'",
        ),
        ({"transformers": "4.55.4"}, "transformers 4.55.4 is not supported: pip install 'transformers>=4.56'"),
        ({"trl": "0.22.9"}, "trl 0.22.9 is not supported: pip install 'trl>=0.23'"),
    ],
)
def test_refused(changes, message):
    """Oracle: the versions, and the command that mends it, in one line."""
    with pytest.raises(GRITError) as error:
        check_versions(versions(**changes))
    assert str(error.value) == message


def test_bounds_are_those_of_the_package():
    """Oracle: the dependencies in pyproject.toml, and those of its extra for training."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + project["optional-dependencies"]["train"]
    bounds = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", d).groups() for d in named if ">=" in d and "," not in d)
    assert {name: bounds[name] for name in OLDEST} == OLDEST


@pytest.mark.parametrize("module", ["grit_impl.recipes.train", "grit_impl.recipes.lora", "grit_impl.trainer"])
def test_import_fails_first(module, tmp_path):
    """Oracle: a peft 0.17 that says so in its metadata: training refuses; the plugin and the help still work."""
    (tmp_path / "peft-0.17.1.dist-info").mkdir()
    (tmp_path / "peft-0.17.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.17.1\n")
    (tmp_path / "transformers-5.0.dist-info").mkdir()
    (tmp_path / "transformers-5.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 5.0\n"
    )

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    failed = python("-c", f"import {module}")
    assert (
        failed.stderr.strip()
        .splitlines()[-1]
        .startswith("grit_impl.errors.GRITError: transformers 5.0 with peft 0.17.1 is not supported")
    )
    assert python("-c", "import grit_impl.verify.plugin, grit_impl.ledger.recorder").returncode == 0
    if module == "grit_impl.recipes.train":
        assert python("-m", "grit_impl.cli", "--help").returncode == 0
        trained = python("-m", "grit_impl.cli", "train", "--steps", "1")
        assert (trained.returncode, trained.stderr.count("\n")) == (2, 1)
        assert trained.stderr.startswith("error: transformers 5.0 with peft 0.17.1")
