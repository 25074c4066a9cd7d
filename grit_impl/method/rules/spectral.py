"""Spectral descent with momentum, whitened by the other factor, with a floor: experimental.

Derivation. Of all dA with |B dA| <= e in the spectral norm, <M_A, dA> falls most along dA = -e G^(-1/2) msign(G^(-1/2)
M_A), G = B'B, msign(X) = U V' of X = U S V': Muon's step (Jordan et al. 2024), for the product instead of the factor;
dB likewise with G = A A'. LoRA-Muon (Cesista et al. 2026) takes it so. While B is near 0 that throws A about: a step of
size e in B A needs a huge one in A. Here G is lifted by a share c of the other side's energy,

    dA = R msign(R M_A),  R = (B'B + c tr(A A') I)^(-1/2);    dB = msign(M_B R) R,  R = (A A' + c tr(B'B) I)^(-1/2),

so that A starts to move freely as B has grown to its size. msign(R M) = (R M M' R)^(-1/2) R M needs r x r matrices
only, and no statistics are taken. Under A -> Q A, B -> B Q' with orthogonal Q, B A moves as before; the floor is what
breaks the same for a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_impl.method.rules.base import BETAS, WholeStep, rule
from grit_impl.method.spectra import inverse_root
from grit_impl.method.stacks import A


@rule("spectral")
class Spectral(WholeStep):
    """See the module; the first beta and the weight decay are the parameter groups', the floor is `spectral_floor`.

    Memory, in float32: 4 bytes per trained parameter, and the counts' 8 L.
    """

    captures, lora_only = False, True
    _STATE = ("steps", "exp_avg")

    def init(self) -> None:
        """Moments of zero."""
        self.exp_avg = [stack.zeros() for stack in self.stacks]

    def metric(self, grams: Tensor) -> Tensor:
        """(2, L, r, r): G of A (0) and B (1), from A A' (0) and B'B (1)."""
        own = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        return grams.flip(0) + self.config.spectral_floor * own * self.factors.eye

    def update(self, *, warm: bool, refresh: bool) -> None:
        """The spectral step of the averaged gradients."""
        grams, moments = torch.zeros_like(self.factors.numerator), torch.zeros_like(self.factors.numerator)
        for stack, steps, m in zip(self.stacks, self.steps, self.exp_avg, strict=True):
            stack.put(grams, stack.gram(stack.values()))
            if (g := stack.gradients()) is not None:
                beta = self.groups[stack.group].get("betas", BETAS)[0]
                m.lerp_(g, self.share(stack, beta, self.count(stack, steps)))
                stack.put(moments, stack.gram(m))
        root = inverse_root(self.metric(grams))
        turn = root @ inverse_root(root @ moments @ root) @ root
        for stack, m in zip(self.stacks, self.exp_avg, strict=True):
            stack.write(stack.multiply(m, stack.of(turn[stack.side or A])))
