"""What a modifier did to a gradient, read off the gradient: the r x r matrix that it was multiplied with.

LoRA preconditioners act in rank space: dA <- P dA, or dB <- dB P. Given both gradients, P follows by least squares;
the residual says whether there is such a P, and the same P applied to the result says whether it was applied twice.

All of it follows from inner products along the long side, X Y' (r x r), of the gradients at a few moments. They are
taken where the gradients are; the gradients themselves never travel, and nothing of their length is decomposed: a
singular value decomposition on the host of 16 x 14336 numbers cost more than the training step (see `Grams`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Matrix = NDArray[np.float64]
SINGULAR = 1e-10
"""Smallest over largest eigenvalue of X X' from which X determines P: singular values in a ratio of 1e-5."""


@dataclass(frozen=True)
class RankOperator:
    """P with written = P raw, for matrices with the rank as first axis.

    Attributes:
        matrix: (r, r).
        residual: |P raw - written| / |written|; 0: written is exactly a left multiple of raw. Known to 1e-7.
        determined: There is one such P; otherwise, raw being short of rank, this is the smallest of many.
    """

    matrix: Matrix
    residual: float
    determined: bool = True

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest singular value."""
        return float(np.linalg.cond(self.matrix))

    @property
    def identity_distance(self) -> float:
        """|P - c I| / |P| for the best c; 0: P only scales."""
        r = len(self.matrix)
        c = np.trace(self.matrix) / r
        return float(np.linalg.norm(self.matrix - c * np.eye(r)) / max(float(np.linalg.norm(self.matrix)), 1e-300))

    def likeness(self, other: RankOperator) -> float:
        """Cosine with another one, multiples of the identity apart."""
        a, b = (p.matrix - np.trace(p.matrix) / len(p.matrix) * np.eye(len(p.matrix)) for p in (self, other))
        return float((a * b).sum() / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300))

    @property
    def diagonal_distance(self) -> float:
        """|P - diag(P)| / |P|; 0: P scales each row by itself."""
        off = self.matrix - np.diag(np.diag(self.matrix))
        return float(np.linalg.norm(off) / max(float(np.linalg.norm(self.matrix)), 1e-300))

    @property
    def positive(self) -> float:
        """Smallest over largest eigenvalue of P's symmetric part, P's sign apart; below 0: it has both signs."""
        sign = -1.0 if np.trace(self.matrix) < 0 else 1.0
        values = np.linalg.eigvalsh(sign * (self.matrix + self.matrix.T) / 2)
        return float(values[0] / max(abs(values[0]), abs(values[-1]), 1e-300))


def gram(gradients: Sequence[Tensor]) -> Tensor:
    """(K, r, K, r), float64, on the gradients' device: block [j, :, k, :] is X_j X_k'.

    Args:
        gradients: K of one shape, A's (r, d_in) or B's (d_out, r): the shorter side is the rank.
    """
    import torch

    x = torch.stack(list(gradients)).double()
    if x.shape[1] > x.shape[2]:
        x = x.mT
    flat = x.reshape(-1, x.shape[2])
    return (flat @ flat.mT).view(*x.shape[:2], *x.shape[:2])


@dataclass(frozen=True)
class Grams:
    """Inner products of one tensor's gradients at K moments.

    Attributes:
        blocks: (K, r, K, r), see `gram`.
    """

    blocks: Matrix

    def square(self, j: int) -> Matrix:
        """(r, r): X_j X_j'."""
        return self._block(j, j)

    def _block(self, j: int, k: int) -> Matrix:
        return self.blocks[j, :, k, :]

    def fit(self, raw: int, written: int) -> RankOperator | None:
        """Least squares for P; None where raw is zero or something is not finite."""
        square, cross, energy = self._block(raw, raw), self._block(written, raw), self._energy(written)
        if not (np.isfinite(square).all() and np.isfinite(cross).all() and np.isfinite(energy)) or energy <= 0:
            return None
        values, vectors = np.linalg.eigh(square)
        if values[-1] <= 0:
            return None
        known = values >= SINGULAR * values[-1]
        vectors = vectors[:, known]
        matrix = (cross @ vectors / values[known]) @ vectors.T
        # |P X - W|^2 = |W|^2 - <P, W X'>, since P is the least-squares solution.
        residual = float(np.sqrt(max(0.0, 1 - float((matrix * cross).sum()) / energy)))
        return RankOperator(matrix, residual, bool(known.all()))

    def mix(self, target: int, sources: Sequence[int]) -> float:
        """|target - sum of c_j X_j| / |target| for the best numbers c: 0, the target is a mix of the sources."""
        inner = np.array([[float(np.trace(self._block(j, k))) for k in sources] for j in sources])
        cross = np.array([float(np.trace(self._block(j, target))) for j in sources])
        energy = self._energy(target)
        if not (np.isfinite(inner).all() and np.isfinite(cross).all() and energy > 0):
            return float("nan")
        best = np.linalg.lstsq(inner, cross, rcond=SINGULAR)[0]
        return float(np.sqrt(max(0.0, 1 - float(cross @ best) / energy)))

    def scaling_residual(self, before: int, after: int, operator: Matrix | None = None) -> float:
        """|after - c P before| / |after| with the best scalar c; P is the identity if not given."""
        p: Any = np.eye(self.blocks.shape[1]) if operator is None else operator
        inner = float((p * self._block(after, before)).sum())
        square, energy = float((p @ self._block(before, before) * p).sum()), self._energy(after)
        explained = inner * inner / square if square > 0 else 0.0
        return float(np.sqrt(max(0.0, 1 - explained / energy))) if energy > 0 else 0.0

    def _energy(self, j: int) -> float:
        return float(np.trace(self._block(j, j)))


class Memory:
    """What somebody may have kept of a tensor's earlier gradients: the last two, and running averages."""

    DECAYS = (0.5, 0.9, 0.98)

    def __init__(self) -> None:
        self._kept: dict[int, list[Tensor]] = {}

    def add(self, gradients: dict[int, Tensor]) -> None:
        """One step's unmodified ones, by position; a tensor of another shape begins anew."""
        for i, g in gradients.items():
            old = self._kept.get(i)
            if old is None or old[0].shape != g.shape:
                self._kept[i] = [g] * (2 + len(self.DECAYS))
            else:
                averages = zip(old[2:], self.DECAYS, strict=True)
                self._kept[i] = [g, old[0], *(g.lerp(average, decay) for average, decay in averages)]

    def by_age(self) -> dict[int, dict[int, Tensor]]:
        """Position -> key -> gradient: -1 the last, -2 the one before, from -3 on the averages."""
        return {i: {-1 - k: g for k, g in enumerate(kept)} for i, kept in self._kept.items()}
