"""Statistics of a compiled model: the same numbers, from graphs that GRIT has not cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grit_impl.config import GRITConfig
from grit_impl.manager import GRITManager

# The same float32 products; a compiler may fuse what is before them.
SAME = 1e-6
LAYER_FRAMES = 2  # one graph per decoder layer of the tests' model


@pytest.fixture(autouse=True)
def counters() -> Iterator[Any]:
    """Dynamo's counters, with nothing compiled before or left behind."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


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


def test_no_graph_is_cut(counters: Any, llama: Any, sequences: Any, collate: Any) -> None:
    """Oracle: `fullgraph`, which refuses what cannot be one graph."""
    model, batch = llama(), collate(sequences(4))
    GRITManager(model).attach()
    _compile_layers(model, fullgraph=True)
    _backward(model, batch)
    assert counters["stats"]["unique_graphs"] == LAYER_FRAMES
    assert not counters["graph_break"]


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


def test_no_more_after_detaching_and_none_of_a_copys(llama: Any, sequences: Any, collate: Any) -> None:
    """A compiled layer looks its tap up when it runs: the copy's tokens are not the model's."""
    model, batch = llama(), collate(sequences(4))
    manager = GRITManager(model).attach()
    twin = copy.deepcopy(model)
    _compile_layers(twin)
    _backward(twin, batch)
    assert not manager.statistics.tokens.any()
    _compile_layers(model)
    _backward(model, batch, times=1)
    assert (manager.statistics.tokens == float(batch["attention_mask"].sum())).all()
    manager.detach()
    manager.statistics.reset()
    _backward(model, batch)
    assert not manager.statistics.tokens.any()


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
