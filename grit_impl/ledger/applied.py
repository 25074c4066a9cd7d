"""What a modifier applied, told from what the ledger sees itself: the matrix, and the statistics it may come from.

A preconditioned gradient is P G, or G P, with an r x r matrix P that follows from both (see structure.py). If P is the
inverse of S + d I, its inverse is S but for a multiple of the identity and a scale: the angle between the traceless
parts of inv(P) and of S says so, whatever the damping and the normalisation. Powers are told in the same way.

The statistics are the ledger's own, from hooks on a few layers' `lora_A`: a, its output, and g, the gradient there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from grit_impl.ledger.structure import Matrix, RankOperator

if TYPE_CHECKING:
    from torch import Tensor, nn

OWN = "its own factor"
OTHER = "the other side's factor"
GRADIENT = "its gradient's second moment"
WEIGHTS = "the other tensor's Gram matrix"
ELSEWHERE = "another layer's factor"
FIRST = "its own factor of the first step"
EXPLAINED = 0.9
"""Least cosine between traceless parts that names a statistic. Unrelated ones of rank 4 have 0.3, of rank 16 0.1."""
CLEAR = 0.02
"""The tensor's own factor is named unless another explains the matrix better by this."""
POWERS = {1.0: "the inverse of", 2.0: "the inverse root of", 0.5: "the inverse square of"}
DECAYS = np.array([0.0, 0.5, 0.95, 1.0])[:, None, None]
"""Of the running averages that a preconditioner may keep: the last step alone, ..., the sum of all."""
LARGEST_RANK = 128


class Witness:
    """Sums of a a' and g g' over the tokens of a step, for a few layers.

    Args:
        layers: Name -> (lora_A, A, B).
        protect: Makes a function that does not raise of one that may.
    """

    def __init__(self, layers: dict[str, tuple[nn.Module, Tensor, Tensor]], protect: Any) -> None:
        self._protect, self._layers = protect, layers
        self._sums: dict[tuple[str, str], Tensor] = {}
        # A hook would become part of a compiled graph.
        compiled = any(getattr(m, "_compiled_call_impl", None) for m, _, _ in layers.values())
        wanted = {} if compiled or "unsloth" in sys.modules else layers
        self._handles = [m.register_forward_hook(self._hook(name)) for name, (m, _, _) in wanted.items()]

    def _hook(self, name: str) -> Any:
        from grit_impl.ledger.watches.copies import wrapped
        from grit_impl.ledger.watches.tensors import ModuleHook

        add = self._protect(self._add, "witness")

        def forward(module: Any, inputs: Any, output: Any) -> None:
            # What a function transform has wrapped lives no longer than it does.
            if getattr(output, "requires_grad", False) and not wrapped(output):
                add((name, "a"), output)
                output.register_hook(lambda grad: add((name, "g"), grad))

        return ModuleHook(forward)

    def _add(self, key: tuple[str, str], rows: Tensor) -> None:
        flat = rows.detach().reshape(-1, rows.shape[-1]).float()
        self._sums[key] = self._sums.get(key, 0) + flat.mT @ flat

    def take(self) -> dict[str, dict[str, Tensor]]:
        """The step's, by layer: `a`, `g`, and the tensors' Gram matrices `aa` (A A') and `bb` (B'B)."""
        out = {}
        for name, (_, a, b) in self._layers.items():
            found = {side: self._sums[name, side] for side in "ag" if (name, side) in self._sums}
            if len(found) == 2:
                out[name] = {**found, "aa": a.detach().float() @ a.detach().float().mT}
                out[name]["bb"] = b.detach().float().mT @ b.detach().float()
        self._sums = {}
        return out

    def remove(self) -> None:
        """Take our hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class Explainer:
    """Names matrices, step after step: it keeps the running averages that a preconditioner may keep."""

    def __init__(self) -> None:
        self._averages: dict[tuple[str, str], Matrix] = {}  # (decays, r, r)
        self._first: dict[tuple[str, str], Matrix] = {}

    def see(self, statistics: dict[str, dict[str, Matrix]], squares: dict[str, Matrix]) -> None:
        """One step.

        Args:
            statistics: By layer, as `Witness.take` gives them.
            squares: By tensor, G G' of its raw gradient along the rank.
        """
        found = {(name, side): value for name, sides in statistics.items() for side, value in sides.items()}
        found |= {(name, "gradient"): value for name, value in squares.items()}
        for (name, side), value in found.items():
            scale = float(np.trace(value))
            if not np.isfinite(scale) or scale <= 0 or len(value) > LARGEST_RANK:
                continue
            self._first.setdefault((name, side), value / scale)
            before = self._averages.get((name, side))
            if before is None or before.shape[1:] != value.shape:  # a rank that grew, or shrank
                before = np.zeros((len(DECAYS), *value.shape))
            # Relative to its size: losses fall, and with them what one step adds.
            self._averages[name, side] = DECAYS * before + value / scale

    def explain(self, tensor: str, layer: str, side: str, operator: RankOperator) -> str:
        """What a matrix is.

        Args:
            tensor, layer, side: Whose it is; side "A" or "B".
            operator: It.
        """
        if operator.residual > 0.1:
            return "no matrix of the rank's size"
        if not operator.determined:
            return "a matrix that gradients of so low a rank do not determine"
        if operator.identity_distance < 1e-2:
            return "a number"
        if operator.diagonal_distance < 1e-2:
            return "a diagonal"
        averages = self._averages
        own, other = ("g", "a") if side == "A" else ("a", "g")
        candidates: dict[str, list[tuple[str, str]]] = {
            OWN: [(layer, own)],
            OTHER: [(layer, other)],
            GRADIENT: [(tensor, "gradient")],
            WEIGHTS: [(layer, "bb" if side == "A" else "aa")],
            ELSEWHERE: [key for key in averages if key[1] == own and key[0] != layer],
        }
        known = {
            what: [self._averages[key] for key in keys if key in self._averages] for what, keys in candidates.items()
        }
        known[FIRST] = [self._first[layer, own][None]] if (layer, own) in self._first else []
        scores = _scores(operator.matrix, known)
        if not any(what in (OWN, OTHER) for what, _ in scores):
            scores = {k: v for k, v in scores.items() if k[0] == GRADIENT}
        best = max(scores.values(), default=0.0)
        if best < EXPLAINED:
            seen = any(what == OWN for what, _ in scores)
            return "a matrix that no statistic explains" if seen else "a matrix; its statistics were not seen"
        for what in (OWN, GRADIENT, OTHER, WEIGHTS, FIRST, ELSEWHERE):
            for power, name in POWERS.items():
                if scores.get((what, power), 0.0) >= best - CLEAR:
                    return f"{name} {what}"
        return "a matrix that no statistic explains"


def _scores(matrix: Matrix, known: dict[str, list[Matrix]]) -> dict[tuple[str, float], float]:
    """By statistic and power, the best cosine with the matrix's own inverse power; none for one that is no inverse."""
    symmetric = (matrix + matrix.T) / 2
    values, vectors = np.linalg.eigh(symmetric)
    if np.linalg.norm(matrix - symmetric) > 0.1 * np.linalg.norm(matrix) or values[0] <= 1e-9 * values[-1]:
        return {}
    powers = np.array(list(POWERS))
    found = _unit((vectors * values ** -powers[:, None, None]) @ vectors.T)
    out: dict[tuple[str, float], float] = {}
    for what, statistics in known.items():
        fitting = [s for s in statistics if s.shape[1:] == matrix.shape]
        if fitting:
            cosines = np.einsum("kij,pij->kp", _unit(np.concatenate(fitting)), found).max(0)
            out |= {(what, power): max(0.0, float(c)) for power, c in zip(powers.tolist(), cosines, strict=True)}
    return out


def _unit(matrices: Matrix) -> Matrix:
    """(K, r, r), each without its multiple of the identity, of norm 1; 0 where nothing is left."""
    r = matrices.shape[-1]
    parts: Matrix = matrices - np.trace(matrices, axis1=1, axis2=2)[:, None, None] / r * np.eye(r)
    parts /= np.maximum(np.linalg.norm(parts, axis=(1, 2), keepdims=True), 1e-300)
    return parts
