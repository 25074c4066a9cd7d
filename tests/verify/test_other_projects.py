"""The package as a wheel, in another project: five lines gate its own trainer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINER = """
import torch
from torch import nn

class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(4, 8))
        self.lora_B = nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        return x + x @ self.lora_A.T @ self.lora_B.T

class Trainer:
    def __init__(self, late):
        torch.manual_seed(0)
        self.late, self.model = late, nn.Sequential(Lora(), nn.Linear(8, 3))
        self.model[1].requires_grad_(False)

    def precondition(self):
        for p in (self.model[0].lora_A, self.model[0].lora_B):
            u, s, v = torch.linalg.svd(p.grad, full_matrices=False)
            p.grad.copy_(u @ v)

    def train(self):
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(12):
            x = torch.randn(32, 8)
            nn.functional.cross_entropy(self.model(x), (x[:, :3]).argmax(1)).backward()
            if not self.late:
                self.precondition()
            optimizer.step()
            if self.late:
                self.precondition()
            optimizer.zero_grad()
"""
GATE = """
from my_trainer import Trainer

def test_my_trainer_uses_my_gradients(gradient_ledger, judge):
    trainer = Trainer(late={late})
    with gradient_ledger(trainer.model) as ledger:
        trainer.train()
    judge("gradients.trainer-effective", ledger)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with nothing but the wheel in it, unpacked by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    pytest.importorskip("hatchling", reason="needs hatchling to build a wheel offline, found none")
    source = folder / "source"  # a build leaves traces in its folder, and finds those of earlier ones
    for name in ("grit_impl", "fixtures"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), str(source)]
    made = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    return folder / "site"


def python(site: Path, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in another project, with the wheel and without this checkout."""
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(where), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300)


def test_wheel_holds_all_that_the_source_holds(site):
    """Oracle: the files under version control's folders: modules, templates, the tiny base, the test sets, types."""
    for source, target in ((ROOT / "grit_impl", "grit_impl"), (ROOT / "fixtures", "grit_impl/fixtures")):
        expected = {p.relative_to(source) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert {p for p in expected if not (site / target / p).is_file()} == set()
    assert (site / "grit_impl" / "py.typed").is_file()


def test_wheel_finds_its_own_files(site, tmp_path):
    """Oracle: the folder in which the wheel was unpacked; not a checkout that happens to be near."""
    found = python(site, tmp_path, "-c", "from grit_impl.files import FIXTURES as f; print(f)").stdout.strip()
    assert found == str(site / "grit_impl" / "fixtures")


def test_what_a_wheel_cannot_do_is_one_line(site, tmp_path):
    """Oracle: `grit verify` needs the suites, which are the repository's: one line, status 2."""
    result = python(site, tmp_path, "-m", "grit_impl.cli", "verify")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no folder suites/ here")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_wheel_trains_on_its_own_base(site, tmp_path):
    """Oracle: a run record of the tiny base, in an empty folder."""
    result = python(site, tmp_path, "-m", "grit_impl.cli", "train", "--arm", "pure", "--steps", "2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "reports" / "runs" / "pure-seed3407" / "COMPLETE").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("late", "status"), [(False, 0), (True, 1)], ids=["effective", "too-late"])
def test_readme_gates_a_trainer(site, tmp_path, late, status):
    """Oracle: the five lines of the README, word for word, on a trainer that is right and one that is not."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (shown,) = [block for block in blocks if "def test_my_trainer" in block]
    body = shown.partition("def test_my_trainer")[2].strip().splitlines()
    assert len(body) <= 5
    (tmp_path / "my_trainer.py").write_text(TRAINER)
    own = f"from my_trainer import Trainer\n\ntrainer = Trainer(late={late})\nmodel = trainer.model\n"
    (tmp_path / "test_gate.py").write_text(own + shown)
    result = python(site, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path))
    assert result.returncode == status, result.stdout + result.stderr
    assert ("modified-too-late" in result.stdout) == late


@pytest.mark.slow
@pytest.mark.parametrize(("late", "status"), [(False, 0), (True, 1)], ids=["effective", "too-late"])
def test_five_lines_gate_a_trainer(site, tmp_path, late, status):
    """Oracle: a preconditioner before the step passes, the same one after it fails, by its cause; the wheel is used."""
    (tmp_path / "my_trainer.py").write_text(TRAINER)
    (tmp_path / "test_gate.py").write_text(GATE.format(late=late))
    used = python(site, tmp_path, "-c", "import grit_impl; print(grit_impl.__file__)").stdout
    assert used.startswith(str(site))
    arguments = ["-m", "pytest", "--rootdir", str(tmp_path), "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = python(site, tmp_path, *arguments)
    assert result.returncode == status, result.stdout + result.stderr
    assert "gradients.trainer-effective" in result.stdout
    assert ("modified-too-late" in result.stdout) == late
    assert (tmp_path / "reports" / "index.html").is_file()
