"""Eigenvalues of the factors, solved on the host.

A GPU's batched solver takes a workspace for every matrix of the batch at once. Where the five inversions of 224 layers
that a checkpoint found unsolved were solved there, the run's peak rose by 0.3 GiB beyond any training step's
(docs/measurements/gpu.md). On one core LAPACK needs about 0.1 s for the 7,168 matrices of a full history at rank 16,
0.8 s at rank 64, and every caller waits for the device anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_impl.method.factors import TRACE_FLOOR

# Inversions whose eigenvalues may wait in host memory: 0.5 MiB each for Llama-3-8B at rank 16, 7 MiB at rank 64.
UNSOLVED_AT_MOST = 16
# Near zero an eigenvalue grows 2.25-fold per iteration: 17 for the floor, and some more to converge.
ROOT_FLOOR, ROOT_ITERATIONS = 1e-6, 23


def eigvalsh(matrices: Tensor) -> Tensor:
    """Eigenvalues in ascending order, on the host; (..., r, r) -> (..., r)."""
    values: Tensor = torch.linalg.eigvalsh(matrices.cpu())
    return values


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order, on the host, and eigenvectors where the matrices are."""
    values, vectors = torch.linalg.eigh(matrices.cpu())
    return values, vectors.to(matrices.device)


def inverse_root(matrices: Tensor) -> Tensor:
    """S^(-1/2) of symmetric positive semi-definite matrices (..., r, r), for which no device is waited for.

    Coupled Newton-Schulz iteration (Higham 2008, section 6.7). Eigenvalues are lifted by ROOT_FLOOR of the trace; a
    matrix of zero gets the identity.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    there = trace > TRACE_FLOOR
    scale = torch.where(there, trace, 1.0)
    y = torch.where(there, matrices / scale + ROOT_FLOOR * eye, eye) / (1 + ROOT_FLOOR)
    z = eye.expand_as(y)
    for _ in range(ROOT_ITERATIONS):
        step = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ step, step @ z
    return torch.where(there, z / (scale * (1 + ROOT_FLOOR)).sqrt(), eye)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp of the entropy of the normalised spectrum (Roy & Vetterli 2007); (..., r) -> (...)."""
    p = eigenvalues.clamp_min(0)
    p = p / p.sum(-1, keepdim=True).clamp_min(TRACE_FLOOR)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))


class SpectrumHistory:
    """The factors' spectra at every inversion, averaged over layers.

    Eigenvalues are computed when the history is asked for and not in the step, which would wait for them.

    Args:
        top: Number of eigenvalues kept.
        rows: Of a checkpoint.
    """

    def __init__(self, top: int, rows: list[dict[str, Any]] | None = None) -> None:
        self.top = top
        self._rows = list(rows or [])
        self._unsolved: list[tuple[int, Tensor]] = []
        self._device = torch.device("cpu")

    @property
    def full(self) -> bool:
        """Whether so many inversions wait that they should be solved."""
        return len(self._unsolved) >= UNSOLVED_AT_MOST

    def note(self, step: int, covariances: Tensor) -> None:
        """Keep S_a and S_g (2, L, r, r) of an inversion on the host; nothing waits for the copy until `rows`."""
        self._device = covariances.device
        self._unsolved.append((step, covariances.to("cpu", non_blocking=True)))

    def rows(self) -> list[dict[str, Any]]:
        """Per inversion: `step`, `top_a`, `top_g`, `effective_rank_a`, `effective_rank_g`; waits for the device."""
        if self._unsolved:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)  # a copy that did not wait may not have arrived
            values = eigvalsh(torch.stack([s for _, s in self._unsolved])).flip(-1)
            ranks, top = effective_rank(values).mean(-1), values[..., : self.top].mean(2)
            for i, (step, _) in enumerate(self._unsolved):
                row: dict[str, Any] = {"step": step}
                for side, key in enumerate("ag"):
                    row[f"top_{key}"] = top[i, side].tolist()
                    row[f"effective_rank_{key}"] = float(ranks[i, side])
                self._rows.append(row)
            self._unsolved = []
        return list(self._rows)
