"""README's snippets, word for word, on the tiny base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def snippet(containing: str) -> str:
    """The one Python block of README that contains a text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return str(found)


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """What a user has before the snippet: a PEFT model, and tokens to learn from."""
    from grit_impl.recipes.arms import RunSpec, TrainingSettings
    from grit_impl.recipes.tokens import make_tokens, read_tokens
    from grit_impl.recipes.train import build_model

    spec = RunSpec("pure", training=TrainingSettings(steps=4))
    name = make_tokens(spec, tmp_path)
    data = read_tokens(tmp_path / f"{name}.json", name)
    columns = data.dataset()
    model, _ = build_model(spec, use_unsloth=False)
    return {"peft_model": model, "data": [{**row, "labels": row["input_ids"]} for row in columns]}


def test_the_first_way_to_train_is_the_one_that_wins(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Oracle: rule and settings of docs/measurements/grit-vs-lora.md, in the optimizer that took the steps."""
    from grit_impl.method.optimizer import GRITOptimizer

    steps: list[tuple[str, Any, float]] = []
    original = GRITOptimizer.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        group = self.param_groups[0]
        steps.append((self.manager.config.update_rule, tuple(group["betas"]), group["initial_lr"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GRITOptimizer, "step", step)
    monkeypatch.chdir(tmp_path)
    text = snippet("training_arguments(").replace("max_steps=200", "max_steps=2, per_device_train_batch_size=1")
    exec(compile(text, "README.md", "exec"), tiny)
    assert set(steps) == {("eigenbasis", (0.8, 0.95), 7.3e-3)}
