"""A fused function of another library is read by its `Site` alone, on a stand-in (`other_functions`)."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import fused_functions
import other_functions
import pytest
import torch
from peft import LoraConfig, get_peft_model

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.capture import sites
from grit_impl.method.capture.sites import Site
from grit_impl.method.manager import GRITManager

SITE = Site(
    other_functions.MODULE,
    "LoRAPair",
    a=(4, 5),
    b=(6, 2),
    x=(3, 3),
    dy=(0, 1),
    arguments=(3, 5),
    scales=lambda ctx: (ctx.scale, ctx.scale),
)
# Both ways run in float64 and add in other orders.
SAME = 1e-12


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, loaded as the library's module would be, and described."""
    module: Any = types.ModuleType(other_functions.MODULE)
    module.LoRAPair = other_functions.LoRAPair
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sites, "SITES", [*sites.SITES, SITE])
    return module


def _found(fused: bool, backend: str | None = None) -> list[Any]:
    """Tokens, sums and gradients of the second step; the completeness check must have passed."""
    torch.manual_seed(0)
    model = get_peft_model(
        other_functions.decoder().double(),
        LoraConfig(r=3, lora_alpha=6, target_modules=["left", "right"], init_lora_weights=False),
    )
    decoder = model.base_model.model
    decoder.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    decoder.fused = fused
    for layer in decoder.layers if backend else ():
        layer.compile(backend=backend, fullgraph=True)
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    for _ in range(2):
        model.zero_grad()
        ids = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(1))
        labels = ids.masked_fill(torch.arange(7) > 4, -100)
        model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels)["loss"].backward()
        found = [manager.statistics.tokens.clone(), *manager.statistics.sums.clone()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        manager.precondition()
    manager.detach()
    assert manager.completeness is not None
    return found


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "traced"])
def test_statistics_equal_the_modules(backend: str | None, library: Any, relative: Any, counters: Any) -> None:
    """Oracle: the same weights and batches through peft's modules, whether Python runs or a compiler traces it."""
    truth, ours = _found(False), _found(True, backend)
    assert truth[0].tolist() == [3 * 5] * 4
    for expected, found in zip(truth, ours, strict=True):
        assert relative(found, expected) < SAME


def test_without_its_site_it_is_missed(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: nothing but the table tells of the function. Nor is a table believed that takes A for B."""
    monkeypatch.setattr(sites, "SITES", sites.SITES[:-1])
    with pytest.raises(GRITError, match="do not add up"):
        _found(True)
    monkeypatch.setattr(sites, "SITES", [dataclasses.replace(SITE, a=SITE.b, b=SITE.a)])
    with pytest.raises(GRITError):
        _found(True)


def test_two_libraries_side_by_side(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: identity of the functions. Those of both are replaced, and put back when the last manager lets go."""
    unsloth: Any = types.ModuleType(fused_functions.MODULE)
    vars(unsloth).update({name: getattr(fused_functions, name) for name in fused_functions.FUNCTIONS})
    config = LoraConfig(r=3, target_modules=["left", "right"])
    first, second = (GRITManager(get_peft_model(other_functions.decoder(), config)) for _ in range(2))
    first.attach()
    monkeypatch.setitem(sys.modules, unsloth.__name__, unsloth)
    second.attach()
    assert library.LoRAPair is not other_functions.LoRAPair
    assert unsloth.LoRA_W is not fused_functions.LoRA_W
    second.detach()
    assert unsloth.LoRA_W is fused_functions.LoRA_W
    assert library.LoRAPair is not other_functions.LoRAPair
    first.detach()
    assert library.LoRAPair is other_functions.LoRAPair
