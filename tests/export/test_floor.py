"""How far apart two right programs are: what the measured floor takes into account."""

from __future__ import annotations

import contextlib

import pytest
import torch

from grit_impl.export.floor import Branch, branches, in_double

WIDTH, RANK = 256, 16


class OneLayer(torch.nn.Module):
    """A matrix of zeros, so that all of the output is the adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
def test_products_of_an_adapter_that_stays_apart_are_taken_in_double_too(exact: bool) -> None:
    """Oracle: the same products in float64, rounded once at the end.

    The adapter's own rounding is most of what llama.cpp may differ by where its scaling is large: without it, a right
    export was five times the floor away and called another model.
    """
    draw = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=draw) for shape in ((32, WIDTH), (RANK, WIDTH), (WIDTH, RANK)))
    model = OneLayer()
    branch = {"layer": Branch(a, b, ("F32", "F32"))}
    with torch.no_grad(), in_double(model) if exact else contextlib.nullcontext(), branches(model, branch, exact=exact):
        found = model(x)
    assert found.dtype == torch.float32
    right = (x.double() @ a.double().T @ b.double().T).float()
    assert bool((found == right).all()) == exact
    assert (found - right).abs().max() < 1e-3
