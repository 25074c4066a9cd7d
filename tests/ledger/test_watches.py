"""What the ledger sees of others' hooks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from grit_impl.ledger.watches import HookWatch


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.base = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_A(x)


@pytest.mark.parametrize("how", ["forward hook", "forward of its own", "none"])
def test_hooked_modules_are_counted_when_called(how: str) -> None:
    """Oracle: by hand: whoever listens to lora_A, by a hook or a forward in its place, is seen, and each call is."""
    model = Layer()
    if how == "forward hook":
        model.lora_A.register_forward_hook(lambda *_: None)
    elif how == "forward of its own":
        model.lora_A.forward = partial(nn.Linear.forward, model.lora_A)  # type: ignore[method-assign]
    watch = HookWatch(model)
    watch.look([], dict)
    assert watch.facts() == ({} if how == "none" else {"hooked_modules": 1, "module_calls": 0})
    model(torch.zeros(1, 3))
    model(torch.zeros(1, 3))
    assert watch.facts() == ({} if how == "none" else {"hooked_modules": 1, "module_calls": 2})
    watch.remove()
