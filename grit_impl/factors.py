"""The Kronecker factors of all layers: averaged over steps, inverted in one batched call.

Numerators (sums of outer products) and denominators (numbers of tokens) are averaged separately and divided when a
factor is needed. Both are linear in the data, so the result does not depend on how a step's tokens were split into
micro-batches or over processes, and the exponential average needs no separate bias correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grit_impl.autograd import RankStatistics
from grit_impl.config import GRITConfig

# A mean square below this is zero: inverses and the norms of what they multiply must stay within float32.
TRACE_FLOOR = 1e-26
READY, STARVED, TOO_FEW, ZERO, NON_FINITE = range(5)
STATUS = ("ready", "starved", "not-ready", "zero", "non-finite")


class KroneckerFactors:
    """S_a and S_g of L layers and their damped inverses.

    Args:
        ranks: The rank of each layer.
        config: Damping, decay, minimum number of samples.
        device: Where the adapters are.
        dtype: float32, or float64 for a model in double precision.

    Attributes:
        numerator: (2, L, r, r) decayed sums of a a' and g g'.
        tokens: (L,) decayed numbers of tokens, the denominator.
        seen: (L,) tokens ever counted, without decay.
        projector: (2, L, r, r) onto the space in which a (0) and g (1) live: the layer's rank, or what a reprojection
            kept of it.
        kept: (L,) dimension of that space.
        inverse: (2, L, r, r) damped inverses; the identity where a factor is not ready.
        status: (2, L) one of READY, STARVED, TOO_FEW, ZERO, NON_FINITE, as of the last inversion.
        dropped: (L,) steps whose statistics were not finite and were left out.
        inversions: How often the inverses were recomputed on schedule.
    """

    _STATE = ("numerator", "tokens", "seen", "projector", "kept", "inverse", "status", "dropped")

    def __init__(
        self, ranks: Sequence[int], config: GRITConfig, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        layers, rank = len(ranks), max(ranks)
        self.config = config
        self.kept = torch.tensor(ranks, device=device)
        self.eye = torch.eye(rank, device=device, dtype=dtype)
        used = (torch.arange(rank, device=device) < self.kept[:, None]).to(dtype)
        self.projector = torch.diag_embed(used).repeat(2, 1, 1, 1)
        self.numerator = torch.zeros_like(self.projector)
        self.tokens, self.seen, self.dropped = torch.zeros(3, layers, device=device, dtype=dtype).unbind()
        self.inverse = self.eye.expand_as(self.numerator).clone()
        self.status = torch.full((2, layers), STARVED, device=device)
        self.inversions = 0

    def absorb(self, statistics: RankStatistics) -> None:
        """Take in the sums of one optimizer step; a layer whose sums are not finite is left out and counted."""
        sums = torch.stack((statistics.sum_a, statistics.sum_g))
        finite = sums.isfinite().all(-1).all(-1).all(0)
        decay = self.config.factor_decay
        self.numerator = torch.where(finite[:, None, None], decay * self.numerator + sums, self.numerator)
        self.tokens = torch.where(finite, decay * self.tokens + statistics.tokens, self.tokens)
        self.seen = self.seen + torch.where(finite, statistics.tokens, 0)
        self.dropped = self.dropped + ~finite

    def covariances(self) -> Tensor:
        """(2, L, r, r): S_a and S_g, mean outer products per real token; zero where nothing was seen."""
        s = self.numerator / self.tokens.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
        return (s + s.mT) / 2

    def mean_eigenvalues(self, covariances: Tensor) -> Tensor:
        """(2, L): trace(S) over the dimension of the space that a layer uses."""
        return covariances.diagonal(dim1=-2, dim2=-1).sum(-1) / self.kept

    def damping(self, covariances: Tensor) -> Tensor:
        """(2, L): d, relative to the mean eigenvalue trace(S)/r or absolute."""
        mean = self.mean_eigenvalues(covariances)
        if self.config.damping_mode == "absolute":
            return torch.full_like(mean, self.config.kfac_damping)
        return self.config.kfac_damping * mean

    def invert(self) -> None:
        """Recompute all 2 L damped inverses (S + d I)^-1 in one batched Cholesky factorisation.

        A factor with no samples, too few, a zero trace, or non-finite entries gets the identity and a status that
        says so. Nothing here waits for the device, unless `kfac_inversion_device` is another one.
        """
        s = self.covariances()
        mean = self.mean_eigenvalues(s)
        status = torch.full_like(self.status, READY)
        status = torch.where(self.seen < self.config.kfac_min_samples, TOO_FEW, status)
        status = torch.where(self.seen == 0, STARVED, status)
        status = torch.where((status == READY) & (mean <= TRACE_FLOOR), ZERO, status)
        status = torch.where(mean.isfinite(), status, NON_FINITE)
        ready = (status == READY)[..., None, None]
        # Scaled to unit mean eigenvalue, the factorisation works near 1 whatever the size of the gradients; outside
        # the space that is used, S is 0 and the identity keeps it invertible.
        scale = torch.where(ready, mean[..., None, None], 1.0)
        damped = (s + self.damping(s)[..., None, None] * self.eye) / scale + (self.eye - self.projector)
        damped = torch.where(ready, damped, self.eye)
        if (device := self.config.kfac_inversion_device) is not None:
            damped = damped.to(device)
        lower, info = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(lower).to(s.device)
        failed = (info.to(s.device) != 0) | ~inverse.isfinite().all(-1).all(-1)
        self.status = torch.where(failed & (status == READY), NON_FINITE, status)
        self.inverse = torch.where((self.status == READY)[..., None, None], inverse / scale, self.eye)

    def restrict(self) -> None:
        """After A and B were projected: a and g live in the projectors' spaces, and so must their statistics."""
        self.numerator = self.projector @ self.numerator @ self.projector
        self.invert()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and numbers."""
        return {"inversions": self.inversions, **{name: getattr(self, name) for name in self._STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on this object's device."""
        self.inversions = state["inversions"]
        for name in self._STATE:
            setattr(self, name, state[name].to(self.eye.device).clone())


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp of the entropy of the normalised spectrum (Roy & Vetterli 2007); (..., r) -> (...)."""
    p = eigenvalues.clamp_min(0)
    p = p / p.sum(-1, keepdim=True).clamp_min(TRACE_FLOOR)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))
