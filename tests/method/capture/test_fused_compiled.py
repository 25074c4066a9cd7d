"""Statistics from fused LoRA functions in compiled decoder layers, on stand-ins of Unsloth's (`fused_functions`)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fused_functions
import pytest
import torch
from fused_functions import FUNCTIONS, MODULE, Decoder
from peft import LoraConfig, get_peft_model

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.method.capture import fused
from grit_impl.method.capture.rank_statistics import ForwardContext, RankStatistics
from grit_impl.method.manager import GRITManager

pytestmark = pytest.mark.usefixtures("counters")

LAYERS, RANK = 10, 3
# Both ways run in float64 and add in other orders.
SAME = 1e-12


@pytest.fixture(autouse=True)
def fast_lora(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for Unsloth's module, loaded as Unsloth's would be."""
    module = types.ModuleType(MODULE)
    for name in FUNCTIONS:
        setattr(module, name, getattr(fused_functions, name))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def _model(
    layers: int = LAYERS,
    backend: Any = "aot_eager",
    checkpointing: str | None = None,
    base: Any = None,
    lora: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Any:
    """With compiled layers; without a backend as it is. The base's precision may be another than the adapters'."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=".*_proj", **lora)
    model = get_peft_model(Decoder(layers).double(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32 if base else torch.float64) * 0.1
        elif base:
            parameter.data = parameter.data.to(base)
    decoder = model.base_model.model
    # As with checkpointing: all layers' inputs need gradients, and all layers share a graph.
    decoder.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    decoder.fused, decoder.checkpointing = True, checkpointing
    for layer in decoder.layers if backend else ():
        layer.compile(backend=backend, **{"fullgraph": True, **options})
    return model


def _backward(model: Any, lengths: tuple[int, ...] = (7, 7)) -> None:
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        ids = torch.randint(1, 30, (3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))["loss"].backward()


def _found(backend: Any, lengths: tuple[int, ...] = (7, 7), **options: Any) -> list[Any]:
    """Tokens, sums and gradients; the completeness check must have passed, and a step without statistics."""
    model = _model(3, backend, **options)
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1, grit_cov_update_freq=2)).attach()
    for step in range(3):  # a function's first call outside compiled layers is counted by products of its own
        model.zero_grad()
        _backward(model, lengths)
        if step == 1:
            assert not manager.statistics.tokens.any()
        elif step == 2:
            found = [manager.statistics.tokens.clone(), *manager.statistics.sums.clone()]
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        manager.precondition()
    assert manager.completeness is not None
    assert float(manager.completeness.max()) < 1e-6
    manager.detach()
    return found


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_same_statistics_as_without_a_compiler(checkpointing: str | None, relative: Any) -> None:
    """Oracle: the functions as they are, whose own oracle are peft's modules (`test_fused`). Padding is left out."""
    plain, kept, ours = (
        _found(None), _found(None, checkpointing=checkpointing), _found("aot_eager", checkpointing=checkpointing)
    )  # fmt: skip
    assert (plain[0] == 2 * (3 * 7 - 2)).all()
    for truth, eager, found in zip(plain, kept, ours, strict=True):
        assert relative(eager, truth) < SAME
        assert relative(found, truth) < SAME


@pytest.mark.parametrize(
    "lora",
    [
        {"alpha_pattern": {"up_proj": 1.5, "v_proj": 9.0}},
        {"rank_pattern": {"up_proj": 2, "o_proj": 4}, "alpha_pattern": {"up_proj": 1.5}},
        {"alpha_pattern": dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), RANK)},
    ],
    ids=["scales", "ranks", "no scale"],
)
def test_layers_that_differ(lora: Any, relative: Any) -> None:
    """Oracle: the functions as they are. The layers of one function have other scales and ranks."""
    for truth, found in zip(_found(None, lora=lora), _found("aot_eager", lora=lora), strict=True):
        assert relative(found, truth) < SAME


@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 2], [2, 0, 1], [3]])
def test_layers_added_together(layers: list[int], relative: Any) -> None:
    """Oracle: the same layers, each on its own; those that do not follow one another, too."""
    generator = torch.Generator().manual_seed(0)
    context = ForwardContext(torch.tensor([[True, False, True, True, True]]), 5, torch.tensor(2.0))
    values = torch.randn(2, len(layers), 5 * RANK, generator=generator)
    one, together = (RankStatistics(4, RANK + 1, torch.device("cpu")) for _ in range(2))
    for each in (one, together):
        each.check_completeness = True
    for i, layer in enumerate(layers):
        one.add(layer, values[0, i].view(RANK, 5), values[1, i].view(5, RANK), context, turned=True)
    together.add_together(layers, values, RANK, context)
    assert one.tokens.tolist() == [4 * (i in layers) for i in range(4)]
    for name in ("tokens", "sums", "cross", "energy"):
        assert relative(getattr(together, name), getattr(one, name)) < 1e-6
    with pytest.raises(GRITError, match="saw 4 tokens where the model was given 5"):
        together.add_together(layers, values[:, :, RANK:], RANK, context)


def test_layers_share_graphs_that_are_kept(counters: Any) -> None:
    """Oracles: `fullgraph`, which refuses what cannot be one graph; the number of graphs without GRIT. Ten layers are
    more than may be compiled on their own. A step without GRIT, and its return, compile nothing anew."""
    model = _model()
    manager, graphs = GRITManager(model), []
    for attached in (False, True, False, True):
        if attached:
            manager.attach()
        _backward(model)
        manager.detach()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0], 2 * graphs[0], 2 * graphs[0], 2 * graphs[0]]
    assert not counters["graph_break"]


def test_gradients_keep_every_bit() -> None:
    """Oracle: the compiled layers without GRIT."""
    found = []
    for attached in (False, True):
        model = _model(3)
        manager = GRITManager(model, GRITConfig())
        if attached:
            manager.attach()
        _backward(model)
        manager.detach()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for without, ours in zip(*found, strict=True):
        assert torch.equal(without, ours)


def _counting(operators: Counter[str]) -> Callable[..., Any]:
    """A backend that counts the operators in the graphs as Inductor has simplified them, and makes no code."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def count(graph: Any, inputs: Any, **_: Any) -> Any:
        # An operator that writes to an argument is wrapped in another.
        operators.update(
            str(node.args[0] if "functional" in str(node.target) else node.target) for node in graph.graph.nodes
        )
        return make_boxed_func(graph.forward)

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=count)


@pytest.mark.parametrize(
    ("dynamic", "base"),
    [(None, None), (True, None), (True, torch.bfloat16)],
    ids=["one length", "any length", "any length, float32 adapters on bfloat16"],
)
def test_products_are_taken_once(dynamic: bool | None, base: Any) -> None:
    """Oracle: the compiled graphs without GRIT. What GRIT writes down again the compiler finds to be there already."""
    products, noted = [], []
    for attached in (False, True):
        torch._dynamo.reset()
        operators: Counter[str] = Counter()
        model = _model(2, _counting(operators), dynamic=dynamic, base=base)
        manager = GRITManager(model, GRITConfig())
        if attached:
            manager.attach()
        _backward(model, (7,))
        manager.detach()
        products.append(sum(n for name, n in operators.items() if "mm" in name))
        noted.append(operators["grit.noted_fused.default"])
    assert noted == [0, len(FUNCTIONS)]  # the layers share their graphs
    assert products[1] == products[0]


def test_only_whose_layers_they_are() -> None:
    """A layer's tap is looked up when the compiled code runs: another model's is left alone, as are statistics that
    nobody collects, and the manager's once it is detached."""
    first, second = (GRITManager(_model(2), GRITConfig()).attach() for _ in range(2))
    tokens = 2 * (3 * 7 - 2)
    for mine, other in ((first, second), (second, first)):
        other.statistics.reset()
        _backward(mine.model)
        assert (mine.statistics.tokens == tokens).all()
        assert not other.statistics.tokens.any()
    second.statistics.reset()
    second.model.register_forward_hook(lambda *_: setattr(second.statistics, "collecting", False))
    _backward(second.model)
    assert not second.statistics.tokens.any()
    second.detach()
    _backward(second.model)
    assert not second.statistics.tokens.any()
    assert not first.statistics.tokens.any()
    first.detach()


def test_frozen_adapters() -> None:
    """Those of one layer belong to nobody's: an error in compiled layers, as without a compiler, where statistics are
    collected."""
    for backend in (None, "aot_eager"):
        model = _model(2, backend)
        for name, parameter in model.named_parameters():
            if "layers.0.q_proj.lora_" in name:
                parameter.requires_grad_(False)
        manager = GRITManager(model, GRITConfig()).attach()
        statistics = manager.statistics
        nobody_asks = model.register_forward_hook(lambda *_, s=statistics: setattr(s, "collecting", False))
        _backward(model)
        nobody_asks.remove()
        manager.begin_window()
        with pytest.raises(GRITError, match="in none of the model's LoRA layers"):
            _backward(model)
        manager.detach()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_adapters_that_trade_places(backend: Any, relative: Any) -> None:
    """Oracle: the same adapters that stay. Each A is found by its address, which may become another's."""
    found = []
    for trade in (False, True):
        model = _model(3, backend)
        manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
        for step in range(3):
            if trade and step == 2:
                same = [layer.a for layer in manager.layers if layer.path.endswith("q_proj")]
                places, values = [a.data for a in same], [a.detach().clone() for a in same]
                for i, (a, value) in enumerate(zip(same, values, strict=True)):
                    a.data = places[i - 1]
                    a.data.copy_(value)
            model.zero_grad()
            _backward(model)
            sums = manager.statistics.sums.clone()
            manager.precondition()
        manager.detach()
        found.append(sums)
    assert relative(*found) < SAME


def test_the_compiled_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: nothing here comes from the functions' Python."""
    monkeypatch.setattr(fused.FusedTap, "read", None)
    model = _model(2)
    manager = GRITManager(model, GRITConfig()).attach()
    _backward(model)
    assert (manager.statistics.tokens == 2 * (3 * 7 - 2)).all()
    manager.detach()


@pytest.mark.parametrize("switch", [None, "0", "1"])
def test_whether_unsloth_compiles_is_its_own_affair(
    fast_lora: Any, monkeypatch: pytest.MonkeyPatch, switch: str | None
) -> None:
    """It compiles decoder layers where nobody says otherwise; GRIT attaches whatever it was told."""
    monkeypatch.setitem(sys.modules, "unsloth.models._block_compile", types.ModuleType("blocks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("UNSLOTH_BLOCK_COMPILE", raising=False)
    if switch is not None:
        monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", switch)
    manager = GRITManager(_model(1, None)).attach()
    assert fast_lora.LoRA_W is not fused_functions.LoRA_W
    manager.detach()


@pytest.mark.nightly
def test_inductor(relative: Any) -> None:
    """Oracle: the functions as they are. Code that reuses memory, and batches of changing lengths."""
    lengths = (7, 6, 5, 9)
    for truth, found in zip(_found(None, lengths), _found("inductor", lengths, dynamic=True), strict=True):
        assert relative(found, truth) < SAME


@pytest.mark.nightly
def test_unsloth_itself() -> None:
    """Oracle: peft's modules. Unsloth's own functions, in decoder layers that Unsloth has compiled."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("needs Unsloth (pip install -c requirements/gpu.txt unsloth); found none")
    script = Path(__file__).with_name("unsloth_on_cpu.py")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 of 4 layers compiled" in ran.stdout
