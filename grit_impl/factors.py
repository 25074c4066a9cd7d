"""The Kronecker factors of all layers: averaged over steps, inverted in one batched call.

Numerators (sums of outer products) and denominators (numbers of tokens) are averaged separately and divided when a
factor is needed. Both are linear in the data, so the result does not depend on how a step's tokens were split into
micro-batches or over processes, the exponential average needs no separate bias correction, and a data-parallel run
needs one all-reduce per inversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_impl.autograd import RankStatistics
from grit_impl.config import GRITConfig

# A mean square below this is zero: float32 cannot resolve a damping that is a small fraction of it.
TRACE_FLOOR = 1e-30
READY, STARVED, TOO_FEW, ZERO, NON_FINITE = range(5)
STATUS = ("ready", "starved", "not-ready", "zero", "non-finite")


class KroneckerFactors:
    """S_a and S_g of L layers and their damped inverses.

    Args:
        ranks: The rank of each layer.
        config: Damping, decay, minimum number of samples.
        device: Where the adapters are.

    Attributes:
        numerator: (2, L, r, r) decayed sums of a a' and g g'.
        tokens: (L,) decayed numbers of tokens, the denominator.
        seen: (L,) tokens ever counted, without decay (this process's share of them).
        inverse: (2, L, r, r) damped inverses; the identity where a factor is not ready.
        status: (2, L) one of READY, STARVED, TOO_FEW, ZERO, NON_FINITE, as of the last inversion.
        dropped: (L,) steps whose statistics were not finite and were left out.
    """

    def __init__(self, ranks: list[int], config: GRITConfig, device: torch.device) -> None:
        layers, rank = len(ranks), max(ranks)
        self.config = config
        self.ranks = torch.tensor(ranks, device=device)
        # 1 on the diagonal entries that a layer of smaller rank does not use.
        self._unused = torch.diag_embed((torch.arange(rank, device=device) >= self.ranks[:, None]).float())
        self.eye = torch.eye(rank, device=device)
        self.numerator = torch.zeros(2, layers, rank, rank, device=device)
        self.tokens = torch.zeros(layers, device=device)
        self.seen = torch.zeros(layers, device=device)
        self.inverse = self.eye.expand(2, layers, rank, rank).clone()
        self.status = torch.full((2, layers), STARVED, device=device)
        self.dropped = torch.zeros(layers, device=device)
        self.inversions = 0
        self.processes = 1

    def absorb(self, statistics: RankStatistics) -> None:
        """Take in the sums of one optimizer step; a layer whose sums are not finite is left out and counted."""
        sums = torch.stack((statistics.sum_a, statistics.sum_g))
        finite = sums.isfinite().all(-1).all(-1).all(0)
        decay = self.config.factor_decay
        keep = finite[:, None, None]
        self.numerator = torch.where(keep, decay * self.numerator + sums, self.numerator)
        self.tokens = torch.where(finite, decay * self.tokens + statistics.tokens, self.tokens)
        self.seen += torch.where(finite, statistics.tokens, 0)
        self.dropped += ~finite

    def covariances(self) -> Tensor:
        """(2, L, r, r): S_a and S_g, mean outer products per real token; zero where nothing was seen."""
        return self.numerator / self.tokens.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]

    def all_reduce(self) -> None:
        """Replace the sums by their mean over data-parallel processes, in one call.

        The mean, not the sum: afterwards every process holds its share of the same history, so later sums add up.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        self.processes = dist.get_world_size()
        flat = torch.cat((self.numerator.flatten(), self.tokens, self.seen))
        dist.all_reduce(flat)
        flat /= self.processes
        numerator, self.tokens, self.seen = flat.split((self.numerator.numel(), len(self.tokens), len(self.seen)))
        self.numerator = numerator.view_as(self.numerator)

    def damping(self, covariances: Tensor) -> Tensor:
        """(2, L): d, relative to the mean eigenvalue trace(S)/r or absolute."""
        mean_eigenvalue = covariances.diagonal(dim1=-2, dim2=-1).sum(-1) / self.ranks
        if self.config.damping_mode == "absolute":
            return torch.full_like(mean_eigenvalue, self.config.kfac_damping)
        return self.config.kfac_damping * mean_eigenvalue

    def invert(self) -> None:
        """Recompute all 2 L damped inverses (S + d I)^-1 in one batched Cholesky factorisation.

        A factor with no samples, too few, a zero trace, or non-finite entries gets the identity and a status that
        says so. Nothing here waits for the device.
        """
        self.all_reduce()
        s = self.covariances()
        s = (s + s.mT) / 2
        trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)
        status = torch.full_like(self.status, READY)
        status[:, :] = torch.where(self.seen * self.processes < self.config.kfac_min_samples, TOO_FEW, status)
        status[:, :] = torch.where(self.seen == 0, STARVED, status)
        status = torch.where((status == READY) & (trace <= TRACE_FLOOR), ZERO, status)
        status = torch.where(trace.isfinite(), status, NON_FINITE)
        ready = (status == READY)[..., None, None]
        damped = s + self.damping(s)[..., None, None] * self.eye
        # Scaled to unit mean eigenvalue, the factorisation works near 1 whatever the size of the gradients.
        scale = (trace / self.ranks)[..., None, None]
        damped = torch.where(ready, damped / scale + self._unused, self.eye)
        if (device := self.config.kfac_inversion_device) is not None:
            damped = damped.to(device)
        lower, info = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(lower).to(s.device)
        failed = (info.to(s.device) != 0) | ~inverse.isfinite().all(-1).all(-1)
        self.status = torch.where(failed & (status == READY), NON_FINITE, status)
        ready = (self.status == READY)[..., None, None]
        self.inverse = torch.where(ready, inverse / torch.where(ready, scale, 1.0), self.eye)
        self.inversions += 1

    def spectra(self) -> Tensor:
        """(2, L, r): eigenvalues of S_a and S_g, ascending."""
        return torch.linalg.eigvalsh(self.covariances())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and numbers."""
        names = ("numerator", "tokens", "seen", "inverse", "status", "dropped")
        return {"inversions": self.inversions, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on this object's device."""
        for name, value in state.items():
            setattr(self, name, value.to(self.eye.device).clone() if isinstance(value, Tensor) else value)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp of the entropy of the normalised spectrum (Roy & Vetterli 2007); (..., r) -> (...)."""
    p = eigenvalues.clamp_min(0)
    p = p / p.sum(-1, keepdim=True).clamp_min(TRACE_FLOOR)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))
