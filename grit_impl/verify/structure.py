"""What a modifier did to a gradient, read off the gradient: the r x r matrix that it was multiplied with.

LoRA preconditioners act in rank space: dA <- P dA, or dB <- dB P. Given both gradients, P follows by least squares;
the residual says whether there is such a P, and the same P applied to the result says whether it was applied twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class RankOperator:
    """P with written = P raw, for matrices with the rank as first axis.

    Attributes:
        matrix: (r, r).
        residual: |P raw - written| / |written|; 0: written is exactly a left multiple of raw.
    """

    matrix: Matrix
    residual: float

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

    def explains(self, before: Matrix, after: Matrix) -> float:
        """Residual of after = c P before, with the best scalar c."""
        return scaling_residual(self.matrix @ before, after)


def scaling_residual(before: Matrix, after: Matrix) -> float:
    """Residual of after = c before, with the best scalar c."""
    square = float((before**2).sum())
    c = float((before * after).sum()) / square if square > 0 else 0.0
    return float(np.linalg.norm(after - c * before) / max(float(np.linalg.norm(after)), 1e-300))


def fit(raw: Matrix, written: Matrix) -> RankOperator | None:
    """Least squares for P; None where raw does not determine it (zero, non-finite, or short of rank)."""
    if not (np.isfinite(raw).all() and np.isfinite(written).all()) or raw.shape[0] > raw.shape[1]:
        return None
    u, s, vt = np.linalg.svd(raw, full_matrices=False)
    if s[0] <= 0 or s[-1] < 1e-5 * s[0] or not written.any():
        return None
    matrix = (written @ vt.T / s) @ u.T
    residual = np.linalg.norm(matrix @ raw - written) / np.linalg.norm(written)
    return RankOperator(matrix, float(residual))


def rank_first(gradient: Matrix) -> Matrix:
    """(r, d) from A's gradient (r, d_in) or B's (d_out, r): the shorter axis is the rank."""
    return gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
