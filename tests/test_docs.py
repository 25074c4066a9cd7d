"""The guides: the site builds without a warning, and what they say to type works, as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What a reader has when a guide's Python begins: an adapter of a base model, arguments, rows.
GIVEN = """
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from grit_impl import GRITConfig, GRITTrainer
from grit_impl.method.layers import find_layers

torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
peft_model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
rows = torch.randint(0, 64, (64, 12)).tolist()
dataset = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * 12] * 64})
args = TrainingArguments(output_dir="out", max_steps=12, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                         save_strategy="no", disable_tqdm=True, learning_rate=1e-2)
model = peft_model
early = GRITConfig(kfac_update_freq=1, kfac_min_samples=16, ng_warmup_steps=0)
trainer = GRITTrainer(model=model, args=args, train_dataset=dataset, grit_config=early)
"""


def blocks(path: Path, *languages: str) -> list[str]:
    """The code of a page, in order."""
    return [code for language, code in BLOCK.findall(path.read_text()) if language in languages]


def run(where: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of a guide, with this checkout's code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=600)


def test_every_block_says_what_it_is() -> None:
    """`console` and `python` are executed here, `text` is output, `sh` needs more than this machine has: all named."""
    found = {language for path in GUIDES for language, _ in BLOCK.findall(path.read_text())}
    assert found <= {"console", "python", "text", "sh"}
    assert sum(len(blocks(path, "console", "python")) for path in GUIDES) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in GUIDES if blocks(p, "console", "python")], ids=lambda path: path.stem)
def test_a_guide_works_as_it_is_written(path: Path, tmp_path: Path) -> None:
    """Oracle: exit status 0 of every command, and no exception in its Python, from an empty folder, in order."""
    for number, (language, code) in enumerate(BLOCK.findall(path.read_text())):
        if language == "python":
            script = tmp_path / f"test_block_{number}.py"
            script.write_text(GIVEN + code)
            tested = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "def test_" in code else []
            ran = run(tmp_path, sys.executable, *tested, str(script))
            assert ran.returncode == 0, f"{code}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
        elif language == "console":
            for line in code.splitlines():
                if line.startswith("$ grit "):
                    ran = run(tmp_path, sys.executable, "-m", "grit_impl.cli", *line.removeprefix("$ grit ").split())
                    assert ran.returncode == 0, f"{line}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Oracle: mkdocs in strict mode, which counts a link to nothing, a missing page and a missing docstring's name."""
    pytest.importorskip("material", reason="needs the extra `docs`: pip install -e '.[docs]'")
    source = tmp_path / "project"
    source.mkdir()
    for name in ("docs", "grit_impl"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", source)
    built = run(source, sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
    assert built.returncode == 0, built.stderr[-3000:]
    assert (tmp_path / "site" / "guides" / "judge-my-trainer" / "index.html").is_file()
