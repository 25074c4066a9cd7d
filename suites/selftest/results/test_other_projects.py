"""The package as a wheel, in another project: five lines gate its own trainer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
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
    source = folder / "source"  # a build leaves traces in its folder, and finds those of earlier ones
    shutil.copytree(ROOT / "grit_impl", source / "grit_impl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), str(source)]
    made = subprocess.run(build, capture_output=True, text=True, timeout=300)
    if made.returncode and "setuptools" in made.stderr:
        pytest.skip("needs setuptools >= 77 to build a wheel, found an older one")
    assert made.returncode == 0, made.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize(("late", "status"), [(False, 0), (True, 1)], ids=["effective", "too-late"])
def test_five_lines_gate_a_trainer(site, tmp_path, late, status):
    """Oracle: a preconditioner before the step passes, the same one after it fails, by its cause; the wheel is used."""
    (tmp_path / "my_trainer.py").write_text(TRAINER)
    (tmp_path / "test_gate.py").write_text(GATE.format(late=late))
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "--rootdir", str(tmp_path), "-q", "-p", "no:cacheprovider"]
    where = [sys.executable, "-P", "-c", "import grit_impl; print(grit_impl.__file__)"]
    used = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert used.startswith(str(site))
    result = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert "gradients.trainer-effective" in result.stdout
    assert ("modified-too-late" in result.stdout) == late
    assert (tmp_path / "reports" / "index.html").is_file()
