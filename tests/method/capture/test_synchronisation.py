"""No step of GRIT waits for the device: nothing reads a tensor's value on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grit_impl.config import GRITConfig
from grit_impl.method.manager import GRITManager

READS = {
    "aten::_local_scalar_dense": "item(), float() or bool()",
    "aten::nonzero": "nonzero()",
    "aten::masked_select": "masked_select()",
    "aten::equal": "equal()",
    "aten::linalg_eigh": "eigh() checks its result",
    "aten::_linalg_eigh": "eigh() checks its result",
    "aten::unique_dim": "unique()",
    "aten::_unique2": "unique()",
}
"""Operators that make the host wait for a GPU, whatever is done with their result."""


READING_METHODS = ("cpu", "tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__")


class NoReads(TorchDispatchMode):
    """Fails where a value leaves the device; copies to the host are no operator on the CPU, so methods are watched."""

    def __enter__(self) -> Any:
        self._patch = pytest.MonkeyPatch()
        for name in READING_METHODS:
            self._patch.setattr(torch.Tensor, name, self._refusal(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        super().__exit__(*error)

    @staticmethod
    def _refusal(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"a host synchronisation: {name}()")

        return method

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        assert name not in READS, f"a host synchronisation: {READS[name]}"
        if name.startswith("aten::index"):
            masks = [i for i in args[1] if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
            assert not masks, "a host synchronisation: indexing with a mask"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def prepared(llama: Any, sequences: Any, collate: Any) -> Any:
    """(**options) -> model, manager and batch after one step, in which GRIT looks whether every token was seen."""

    def build(**options: Any) -> tuple[Any, GRITManager, Any]:
        model, batch = llama(), collate(sequences(4))
        config = {"kfac_update_freq": 1, "kfac_min_samples": 1, "lambda_kfac": 1e-3, "lambda_reproj": 1e-3}
        manager = GRITManager(model, GRITConfig(**{**config, **options})).attach()
        model(**batch).loss.backward()
        manager.precondition()
        manager.after_step()
        model.zero_grad()
        return model, manager, batch

    return build


@pytest.mark.parametrize("renormalise", ["gradient_norm", "none"])
def test_preconditioning_reads_nothing(renormalise: str, prepared: Any) -> None:
    """Inversion, regularisers, preconditioning, norms, the spectrum's log, enforcing: not one value is read."""
    model, manager, batch = prepared(renormalise=renormalise, reprojection_freq=100)
    model(**batch).loss.backward()
    with NoReads():
        manager.precondition()
        manager.after_step()
    assert manager.step == 2
    assert len(manager.spectrum_history()) == 2


def test_hooks_read_nothing(prepared: Any) -> None:
    """Statistics are taken in forward and backward: only GRIT's own hooks run under the watch."""
    model, manager, batch = prepared()
    tap, statistics = manager._taps[0], manager.statistics
    before, add, flush = tap._before, statistics.add, statistics.flush
    calls = []

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(function)
            with NoReads():
                return function(*args)

        return call

    statistics.add, statistics.flush = watched(add), watched(flush)
    model.register_forward_pre_hook(watched(before), with_kwargs=True)
    model(**batch).loss.backward()
    statistics.flush()
    assert calls.count(add) == len(manager.layers)
    assert calls.count(before) == 1
    assert statistics.tokens.all()


def test_the_watch_sees_a_read() -> None:
    """Control: a value that is read, a mask that indexes, a tensor that moves to the host."""
    x = torch.ones(3)
    for read in (lambda: float(x[0]), lambda: x[x > 0], lambda: x.cpu(), lambda: bool(x[0]), lambda: x.tolist()):
        with pytest.raises(AssertionError, match="host synchronisation"), NoReads():
            read()


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu(llama: Any, sequences: Any, collate: Any) -> None:
    """Oracle: CUDA's own debug mode, which raises on every synchronising call, around hooks and preconditioning."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; found none")
    model = llama().cuda()
    batch = {name: value.cuda() for name, value in collate(sequences(4)).items()}
    manager = GRITManager(model, GRITConfig(kfac_update_freq=1, kfac_min_samples=1, lambda_kfac=1e-3)).attach()
    # The model's own preparation is left out: transformers reads there whether the batch is padded.
    body, mode = model.get_base_model().model, "default"
    body.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    body.layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode(mode))
    for step in range(3):
        model.zero_grad()
        mode = "error" if step else "default"
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(**batch).loss.backward()
            manager.precondition()
            manager.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert manager.factor_report()["coverage"] == 1.0
