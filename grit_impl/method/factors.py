"""The Kronecker factors of all layers: averaged over steps, inverted in one batched call.

Numerators (sums of outer products) and denominators (numbers of tokens) are averaged separately and divided when a
factor is needed. Both are linear in the data, so the result does not depend on how a step's tokens were split into
micro-batches or over processes, and the exponential average needs no separate bias correction. The average itself is
linear, too: every process averages its own sums, and they are added up once per inversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.method.capture.rank_statistics import RankStatistics

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
        dropped: (L,) steps whose statistics were not finite and were left out, summed over processes.
        recent: What this process has seen since the last `merge`, one vector: 2 L r r numerators and L tokens, decayed;
            then L tokens and L dropped steps, undecayed.
        lag: The decay that the merged sums have missed since then.
        pending: Steps since then; the same on every process.
        inversions: How often the inverses were recomputed on schedule.
    """

    _STATE = ("numerator", "tokens", "seen", "projector", "kept", "inverse", "status", "dropped", "recent")

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
        self.recent = torch.zeros(self.numerator.numel() + 3 * layers, device=device, dtype=dtype)
        self.lag, self.pending = 1.0, 0
        self.inversions = 0

    def absorb(self, statistics: RankStatistics) -> None:
        """Take in this process's sums of one optimizer step; a layer whose sums are not finite is left out and counted.

        Where there are several processes, they count from the next `merge` on.
        """
        # By Cauchy-Schwarz no entry of a sum of outer products is larger than the largest on its diagonal (but for
        # rounding at the largest float).
        finite = statistics.sums.diagonal(dim1=-2, dim2=-1).isfinite().all(-1).all(0)
        tokens = torch.where(finite, statistics.tokens, 0)
        numerators = torch.where(finite[:, None, None], statistics.sums, 0)
        decayed = 2 * self.eye.numel() * len(self.tokens) + len(self.tokens)
        self.recent[:decayed] *= self.config.factor_decay
        self.recent += torch.cat((numerators.flatten(), tokens, tokens, (~finite).to(tokens.dtype)))
        self.lag *= self.config.factor_decay
        self.pending += 1
        if world_size() == 1:
            self.merge()

    def merge(self) -> None:
        """Add up what all processes have seen since the last time; every process has to call it.

        One all-reduce of 2 L r r + 3 L numbers, and none where there is one process. NCCL's runs on a stream of its
        own: the device waits for it, the host goes on.
        """
        if not self.pending:
            return
        reduction = dist.all_reduce(self.recent, async_op=True) if world_size() > 1 else None
        # Meanwhile, what does not need the other processes' sums.
        numerator_before, tokens_before = self.lag * self.numerator, self.lag * self.tokens
        if reduction is not None:
            reduction.wait()
        layers = len(self.tokens)
        numerator, *counts = torch.split(self.recent, [self.numerator.numel(), layers, layers, layers])
        self.numerator = numerator_before + numerator.view_as(self.numerator)
        self.tokens = tokens_before + counts[0]
        self.seen, self.dropped = self.seen + counts[1], self.dropped + counts[2]
        self.recent, self.lag, self.pending = torch.zeros_like(self.recent), 1.0, 0

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
        """Everything that a resumed run needs, as tensors and numbers; `merge` first where there are processes."""
        tensors = {name: getattr(self, name) for name in self._STATE}
        return {"inversions": self.inversions, "lag": self.lag, "pending": self.pending, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on this object's device.

        What was not merged yet goes to the first process: all load the same state, and it must count once.
        """
        self.inversions, self.lag, self.pending = state["inversions"], state["lag"], state["pending"]
        for name in self._STATE:
            setattr(self, name, state[name].to(self.eye.device).clone())
        if world_size() > 1 and dist.get_rank() != 0:
            self.recent.zero_()


def world_size() -> int:
    """Data-parallel processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
