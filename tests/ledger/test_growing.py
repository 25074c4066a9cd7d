"""Adapters whose shapes change while the ledger looks, and adapters without LoRA's two factors: it goes on looking."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

from grit_impl import gradient_ledger, judge


def layers(config: object) -> nn.Module:
    """Two linear layers with adapters."""
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)), config)  # type: ignore[arg-type]


def train(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> None:
    """Plain training on random rows."""
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("ranks", [(4, 8), (8, 4)])
def test_a_rank_that_changes_is_followed(ranks: tuple[int, int]) -> None:
    """Oracle: new parameters of another rank in mid-run are no reason to stop looking."""
    model = layers(LoraConfig(r=ranks[0], target_modules=["0", "2"], init_lora_weights=False))
    with gradient_ledger(model) as ledger:
        train(model, 3, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2))
        for module in model.modules():
            if "default" in getattr(module, "lora_A", {}):
                module.lora_A["default"].weight = nn.Parameter(0.1 * torch.randn(ranks[1], 12))
                module.lora_B["default"].weight = nn.Parameter(0.1 * torch.randn(12, ranks[1]))
        train(model, 9, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2))
    assert ledger.problem is None
    assert judge(ledger).cause != "undecided"


def test_adapters_without_matrices_are_watched() -> None:
    """Oracle: VeRA trains vectors only; plain training is called that."""
    model = layers(VeraConfig(r=4, target_modules=["0", "2"], init_weights=True))
    with gradient_ledger(model) as ledger:
        train(model, 12, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2))
    assert ledger.problem is None
    assert judge(ledger).cause == "no-modifier"
