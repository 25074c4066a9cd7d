"""Were all tokens of all layers seen? sum_t g_t a_t' must equal dA A' and B' dB, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from grit_impl.errors import GRITError
from grit_impl.method.capture.rank_statistics import RankStatistics
from grit_impl.method.factors import world_size

if TYPE_CHECKING:
    from grit_impl.method.layers import LoRAFactorPair

# Sums over tokens in float32 (bf16 products) against dA A': measured 0.011 at worst; a layer that misses one of two
# micro-batches is off by 0.3 or more.
COMPLETENESS_TOLERANCE = 0.1
# A sum of outer products this much smaller than its terms has no direction to compare; measured at least 0.02.
CANCELLATION = 1e-4


_LAYER_BYPASSED = (
    "Something computes this layer without calling its modules (fused kernels), or changed the gradients before GRIT "
    "saw them"
)
_ALL_BYPASSED = (
    "No layer saw a token: something computes them without calling their modules (fused kernels), or a wrapper called "
    "the model's forward() itself, past its hooks: give GRIT the outermost model"
)


def completeness_errors(statistics: RankStatistics, layers: Sequence[LoRAFactorPair]) -> Tensor | None:
    """Relative errors of sum_t g_t a_t' against the gradients. Waits for the device; every process has to call it.

    Only the direction counts: a loss scale and the mean over processes are common factors. While B = 0 all of
    it is zero, and after an overflow it is not finite.

    Returns:
        (L,) on the host, or None: nothing to compare yet.

    Raises:
        GRITError: a layer is off by more than `COMPLETENESS_TOLERANCE`.
    """
    # A gradient is the mean over processes: their tokens are summed here once, besides the sums that become factors.
    local = torch.cat((statistics.cross.flatten(1), statistics.energy[:, None], _traces(statistics.sum_a)), 1)
    if world_size() > 1:
        dist.all_reduce(local)
    seen, energy, trace = torch.split(local.double(), [local.shape[1] - 2, 1, 1], 1)
    seen = seen.view(len(layers), 1, *statistics.cross.shape[1:])
    truth = seen.new_zeros(len(layers), 2, *seen.shape[2:])
    for i, layer in enumerate(layers):
        a, b, r = layer.a, layer.b, layer.rank
        if a.grad is not None:
            truth[i, 0, :r, :r] = a.grad.to(local.dtype) @ a.to(local.dtype).T
        if b.grad is not None:
            truth[i, 1, :r, :r] = b.to(local.dtype).T @ b.grad.to(local.dtype)
    norms, size = truth.norm(dim=(-2, -1)), seen.norm(dim=(-2, -1))
    cosine = (seen * truth).sum((-2, -1)) / (size * norms).clamp_min(torch.finfo(torch.float64).tiny)
    # Where the tokens cancel in the sum, its direction is rounding.
    bound = (energy * trace).sqrt()
    certain = (norms > 0) & ((size > CANCELLATION * bound) | (bound == 0))
    errors = torch.where(certain, (1 - cosine.clamp(0, 1) ** 2).sqrt(), 0.0).amax(-1).cpu()
    if not bool((certain.any() & norms.isfinite().all() & seen.isfinite().all()).cpu()):
        return None
    worst = int(errors.argmax())
    if errors[worst] > COMPLETENESS_TOLERANCE:
        why = _LAYER_BYPASSED if size.any() else _ALL_BYPASSED
        raise GRITError(
            f"GRIT's statistics do not add up to the gradients: {layers[worst].path} is off by "
            f"{errors[worst]:.2f} (tolerance {COMPLETENESS_TOLERANCE}). {why}"
        )
    return errors


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
