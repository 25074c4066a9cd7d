"""Eigenvalue problems are solved on the host, where their workspace takes no memory of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grit_impl.config import GRITConfig
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer
from grit_impl.method.spectra import UNSOLVED_AT_MOST, SpectrumHistory, eigh, eigvalsh


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Per eigenvalue problem solved: whether its matrices had just been copied to the host.

    On a CPU everything is on the host, so that what `cpu()` returned is marked.
    """
    found: list[bool] = []

    def watched(solver: Any) -> Any:
        def solve(matrices: torch.Tensor) -> Any:
            found.append(hasattr(matrices, "copied_to_the_host"))
            return solver(matrices)

        return solve

    def cpu(self: torch.Tensor) -> torch.Tensor:
        copy = self.detach().clone()
        copy.copied_to_the_host = True  # type: ignore[attr-defined]
        return copy

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, watched(getattr(torch.linalg, name)))
    return found


@pytest.mark.parametrize("update_rule", ["precondition", "eigenbasis"])
def test_a_run_solves_on_the_host(
    update_rule: str, solved: list[bool], llama: Any, sequences: Any, collate: Any
) -> None:
    """Steps, a refresh of the bases, a reprojection, a checkpoint and the report at the end."""
    model = llama()
    config = {"kfac_update_freq": 1, "kfac_min_samples": 1, "reprojection_freq": 2, "reprojection_k": 2}
    manager = GRITManager(model, GRITConfig.from_dict({**config, "update_rule": update_rule})).attach()
    optimizer = GRITOptimizer(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), manager)
    for step in range(1, 4):
        optimizer.zero_grad()
        model(**collate(sequences(4, step))).loss.backward()
        optimizer.step()
    assert manager.reprojection.count == 1
    before = len(solved)
    manager.state_dict()
    assert len(solved) == before + 1
    manager.factor_report()
    assert len(solved) > before + 1
    assert all(solved)


def test_the_watch_sees_a_solver_on_the_device(solved: list[bool]) -> None:
    """Control: one that did not copy, and one whose copy was changed afterwards."""
    torch.linalg.eigvalsh(torch.eye(3))
    torch.linalg.eigh(torch.eye(3).cpu() + 1)
    eigvalsh(torch.eye(3))
    assert solved == [False, False, True]


def test_vectors_return_to_the_device() -> None:
    """On a GPU that exists in name alone: values stay on the host, vectors multiply what is on the device."""
    with FakeTensorMode():
        matrices = torch.empty(2, 5, 16, 16, device="cuda", dtype=torch.float64)
        values, vectors = eigh(matrices)
        assert (values.device.type, vectors.device.type) == ("cpu", "cuda")
        assert (vectors @ vectors.mT).shape == matrices.shape
        assert eigvalsh(matrices).device.type == "cpu"


class Copies(TorchDispatchMode):
    """Notes which copies to the host do not wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.waiting.append(not (kwargs or {}).get("non_blocking"))
        return func(*args, **(kwargs or {}))


def test_a_history_keeps_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that exists in name alone: what waits lies on the host, and is read after the device has finished."""
    events: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(f"waited for {device}"))

    def solver(matrices: torch.Tensor) -> Any:
        events.append(f"solved on {matrices.device}")
        raise StopIteration

    monkeypatch.setattr(torch.linalg, "eigvalsh", solver)
    history = SpectrumHistory(top=2)
    with FakeTensorMode():
        covariances = torch.empty(2, 3, 4, 4, device="cuda")
        with Copies() as copies:
            history.note(1, covariances)
        assert copies.waiting == [False]
        assert {s.device.type for _, s in history._unsolved} == {"cpu"}
        with pytest.raises(StopIteration):
            history.rows()
    assert events == ["waited for cuda:0", "solved on cpu"]


def test_a_history_is_full_after_so_many_inversions() -> None:
    history = SpectrumHistory(top=2)
    for step in range(UNSOLVED_AT_MOST):
        assert not history.full
        history.note(step, torch.eye(4).expand(2, 3, 4, 4))
    assert history.full
    rows = history.rows()
    assert not history.full
    assert [row["step"] for row in rows] == list(range(UNSOLVED_AT_MOST))
    assert rows[0]["top_a"] == [1.0, 1.0]
    assert rows[0]["effective_rank_g"] == pytest.approx(4)
    assert SpectrumHistory(2, rows).rows() == rows


@pytest.mark.gpu
def test_memory_of_a_full_history() -> None:
    """As many inversions of 224 layers as may wait take no memory of the GPU; what is copied meanwhile arrives."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; found none")
    history, eye = SpectrumHistory(top=8), torch.eye(16, device="cuda").expand(2, 224, 16, 16).contiguous()
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(UNSOLVED_AT_MOST):
            for _ in range(4):
                busy.copy_(busy @ busy / 64)
            history.note(step, eye * (step + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rows = history.rows()
    assert torch.cuda.max_memory_allocated() == before
    assert [row["top_a"][0] for row in rows] == [step + 1 for step in range(UNSOLVED_AT_MOST)]
