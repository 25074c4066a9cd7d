"""Statistics of a compiled model: the same numbers, from graphs that GRIT has not cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from grit_impl.config import GRITConfig
from grit_impl.method.manager import GRITManager

pytestmark = pytest.mark.usefixtures("counters")

# The same float32 products; a compiler may fuse what is before them.
SAME = 1e-6


def _compile_layers(model: Any, **options: Any) -> None:
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager", **options)


def _backward(model: Any, batch: dict[str, Any], times: int = 2) -> None:
    for _ in range(times):
        model(**batch).loss.backward()


_NIGHTLY = pytest.mark.nightly  # half a minute each, to compile


@pytest.mark.parametrize(
    ("compiled", "checkpointing"),
    [
        ("layers", None),
        ("layers", True),
        ("layers", False),
        ("whole", None),
        pytest.param("whole", True, marks=_NIGHTLY),
        pytest.param("whole", False, marks=_NIGHTLY),
    ],
    ids=lambda value: {None: "kept", True: "reentrant", False: "not reentrant"}.get(value, value),
)
def test_same_statistics(
    compiled: str, checkpointing: bool | None, llama: Any, sequences: Any, collate: Any, relative: Any
) -> None:
    """Oracle: the model as it is. Each layer compiled, or all of it as transformers' `torch_compile=True` does."""
    found, batch = [], collate(sequences(4))
    for compiling in (False, True):
        model = llama()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        manager = GRITManager(model).attach()
        if compiling and compiled == "layers":
            _compile_layers(model)
        _backward(torch.compile(model, backend="aot_eager") if compiling and compiled == "whole" else model, batch)
        found.append((manager.statistics.tokens.clone(), *manager.statistics.sums.clone()))
    assert (found[0][0] == 2 * float(batch["attention_mask"].sum())).all()
    for plain, ours in zip(*found, strict=True):
        assert relative(ours, plain) < SAME


def test_no_graph_is_cut_and_layers_share_one(counters: Any, llama: Any, sequences: Any, collate: Any) -> None:
    """Oracles: `fullgraph`, which refuses what cannot be one graph, and what may not be shared by more than eight
    layers; the number of graphs without GRIT. Attached once more, it compiles nothing anew."""
    found, batch = [], collate(sequences(4))
    for attached in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = llama(layers=10)
        _compile_layers(model, fullgraph=True)
        manager = GRITManager(model)
        for _ in range(2):
            if attached:
                manager.attach()
            _backward(model, batch, times=1)
            manager.detach()
        found.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert found[0] == found[1]


def test_gradients_and_the_completeness_check(llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Oracles: plain LoRA's gradients, and dA A' = B' dB: what a compiled layer computes is what was noted."""
    gradients, batch = [], collate(sequences(4))
    for attached in (False, True):
        model = llama()
        if attached:
            manager = GRITManager(model).attach()
        _compile_layers(model)
        _backward(model, batch)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    gradients = [[gradient.clone() for gradient in each] for each in gradients]
    manager.precondition()
    assert manager.completeness is not None
    assert float(manager.completeness.max()) < 1e-5
    assert len(gradients[0]) > 0
    for plain, ours in zip(*gradients, strict=True):
        assert relative(ours, plain) < SAME


def test_each_tap_counts_its_own(llama: Any, sequences: Any, collate: Any) -> None:
    """A compiled layer looks its taps up when it runs: a copy's tokens are not the model's; a manager of the tuner
    counts beside; statistics that are not collected, and a detached manager, get nothing."""
    model, batch = llama(), collate(sequences(4))
    tokens = float(batch["attention_mask"].sum())
    manager = GRITManager(model).attach()
    twin = copy.deepcopy(model)
    _compile_layers(model)
    _backward(model, batch, times=1)
    manager.statistics.reset()
    _compile_layers(twin)
    _backward(twin, batch)
    assert not manager.statistics.tokens.any()
    # Not of the base: peft 0.17 calls the base's forward itself, past its hooks.
    second = GRITManager(model.base_model).attach()
    _backward(model, batch, times=1)
    assert (manager.statistics.tokens == tokens).all()
    assert (second.statistics.tokens == tokens).all()
    manager.statistics.collecting = False
    second.detach()
    _backward(model, batch, times=1)
    assert (manager.statistics.tokens == tokens).all()
    assert (second.statistics.tokens == tokens).all()
    manager.detach()
    assert "forward" not in vars(manager.layers[0].module.lora_A["default"])


def test_an_exported_program_is_without_grit(llama: Any) -> None:
    """Oracle: the operators in the program, which must run where GRIT is not installed."""
    model = llama()
    GRITManager(model).attach()
    projection = model.base_model.model.model.layers[0].mlp.down_proj
    program = torch.export.export(projection, (torch.randn(2, 3, projection.in_features),))
    assert "linear" in str(program.graph)
    assert "grit" not in str(program.graph)


@pytest.mark.nightly
def test_inductor(llama: Any, sequences: Any, collate: Any, relative: Any) -> None:
    """Oracle: the model as it is. Code that reuses memory, and batches of changing lengths."""
    found = []
    for compiling in (False, True):
        model = llama()
        manager = GRITManager(model).attach()
        for layer in model.base_model.model.model.layers if compiling else ():
            layer.compile(fullgraph=True)
        for n in (4, 3, 2):
            _backward(model, collate(sequences(n)), times=1)
        found.append((manager.statistics.tokens.clone(), *manager.statistics.sums.clone()))
    for plain, ours in zip(*found, strict=True):
        assert relative(ours, plain) < SAME


@pytest.mark.slow
def test_trl_compiles(training: Any, llama: Any, relative: Any) -> None:
    """Oracle: TRL's trainer without `torch_compile=True`. It leaves the model's own loss unused."""
    found = []
    for compiling in (False, True):
        model = llama()
        settings: dict[str, Any] = {"torch_compile_backend": "aot_eager"} if compiling else {}
        settings |= {"max_steps": 2, "gradient_accumulation_steps": 1}
        config = GRITConfig(kfac_update_freq=1, kfac_min_samples=1)
        training("sft-pure", model, config, torch_compile=compiling, **settings).train()
        found.append([p.detach().clone() for name, p in model.named_parameters() if "lora_" in name])
    for plain, ours in zip(*found, strict=True):
        assert relative(ours, plain) < SAME
