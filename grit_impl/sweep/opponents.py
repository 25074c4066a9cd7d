"""Opponents that no library has: whole steps over LoRA's factors, from the formulas of their papers.

What peft and torch have (LoRA+, the Riemannian gradient before Adam, Muon) is theirs, see `optimizers`. Here, with G =
B'B for A and G = A A' for B, M the first moment, msign(U S V') = U V', A's step for both (B's is its transpose):

* LoRA-Muon (Cesista et al. 2026, arXiv 2606.12921): dA = 1/2 G^(-1/2) msign(G^(-1/2) M).
* LoRA-RITE (Yen et al. 2025, arXiv 2410.20625): with B = Q R, the gradient is taken in Q's coordinates, g = R'^-1 dA; P
  = Q' Q_before carries the moments along, V <- P V P' averaged with g g' / d, M <- P M averaged with V^(-1/2) g, and dA
  = R^-1 M. The mass that leaves with a basis is not added to V, as in the authors' defaults.
* Riemannian (Zhang & Pilanci 2024, arXiv 2402.02347): dA = G^-1 dA. peft's gives it to Adam, which divides a good part
  out again (a G that is a multiple of I has no effect at all). Here it multiplies what Adam made, or the momentum.

G is 0 while B is: it is lifted as the rule `spectral` lifts it, by `floor` times the other side's energy (LoRA-Muon and
LoRA-RITE have no floor; what has no size yet does not move).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from grit_impl.method.factors import TRACE_FLOOR
from grit_impl.method.rules.base import BETAS, WholeStep
from grit_impl.method.rules.spectral import Spectral
from grit_impl.method.stacks import A


class LoRAMuon(Spectral):
    """See the module; the spectral rule with no floor but that of the arithmetic, a millionth of the trace."""

    def metric(self, grams: Tensor) -> Tensor:
        """Twice the Gram's root is the half of the step that each factor has."""
        return 4 * grams.flip(0)


class RiemannianSGD(WholeStep):
    """G^-1 times the averaged gradient: the paper's scaled gradient descent, with momentum."""

    captures, lora_only = False, True
    floor = 1e-2
    _STATE: ClassVar[tuple[str, ...]] = ("steps", "exp_avg")

    def init(self) -> None:
        """Moments of zero."""
        self.exp_avg = [stack.zeros() for stack in self.stacks]

    def inner(self, i: int, g: Tensor) -> Tensor:
        """The step of stack i before G^-1: the mean gradient."""
        stack, steps, m = self.stacks[i], self.steps[i], self.exp_avg[i]
        beta = self.groups[stack.group].get("betas", BETAS)[0]
        m.lerp_(g, self.share(stack, beta, self.count(stack, steps)))
        return m / self.correction(stack, beta, steps)

    def update(self, *, warm: bool, refresh: bool) -> None:
        """The inner step, times G^-1: all r x r matrices of the model in one batched factorisation."""
        grams = torch.zeros_like(self.factors.numerator)
        for stack in self.stacks:
            stack.put(grams, stack.gram(stack.values()))
        own = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        lifted = grams.flip(0) + self.floor * own * self.factors.eye
        padded = (self.factors.eye - self.factors.projector) * own.clamp_min(TRACE_FLOOR)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(lifted + padded)[0])
        for i, stack in enumerate(self.stacks):
            if (g := stack.gradients()) is not None:
                stack.write(stack.multiply(self.inner(i, g), stack.of(inverse[stack.side or A])))


class RiemannianAfterAdam(RiemannianSGD):
    """G^-1 times Adam's direction, so that Adam cannot divide it out."""

    _STATE: ClassVar[tuple[str, ...]] = (*RiemannianSGD._STATE, "exp_avg_sq")

    def init(self) -> None:
        """Both moments zero."""
        super().init()
        self.exp_avg_sq = [stack.zeros() for stack in self.stacks]

    def inner(self, i: int, g: Tensor) -> Tensor:
        """Adam's direction of stack i."""
        mean, stack, v = super().inner(i, g), self.stacks[i], self.exp_avg_sq[i]
        group = self.groups[stack.group]
        beta = group.get("betas", BETAS)[1]
        v.mul_(1 - self.share(stack, beta, stack.there())).addcmul_(g, g, value=1 - beta)
        direction: Tensor = mean / ((v / self.correction(stack, beta, self.steps[i])).sqrt() + group.get("eps", 1e-8))
        return direction


class LoRARITE(WholeStep):
    """See the module. QR decompositions and roots are LAPACK's or cuSOLVER's: a GPU is waited for."""

    captures, lora_only, paired = False, True, True
    eps = 1e-6
    _STATE = ("steps", "exp_avg", "seconds", "basis")

    def init(self) -> None:
        """Moments of zero, in bases that are not known yet."""
        places = {
            (stack.side, layer): (i, j)
            for i, stack in enumerate(self.stacks)
            for j, layer in enumerate(stack.layers.tolist())
        }
        self._partners = [[places[1 - (s.side or A), layer] for layer in s.layers.tolist()] for s in self.stacks]
        self.exp_avg = [stack.zeros() for stack in self.stacks]
        self.seconds = [torch.zeros_like(stack.gram(m)) for stack, m in zip(self.stacks, self.exp_avg, strict=True)]
        self.basis = [torch.zeros_like(other) for other in self._others()]

    def _others(self) -> list[Tensor]:
        """Of each stack (n, d, r): its layers' other factors."""
        tall = [stack.values().mT if stack.side == A else stack.values() for stack in self.stacks]
        return [torch.stack([tall[i][j] for i, j in partners]) for partners in self._partners]

    def update(self, *, warm: bool, refresh: bool) -> None:
        """A's step in the coordinates of B's column space, and B's in those of A's row space."""
        for i, (stack, other) in enumerate(zip(self.stacks, self._others(), strict=True)):
            g = stack.gradients()
            if g is None:
                continue
            self.count(stack, self.steps[i])
            betas = self.groups[stack.group].get("betas", BETAS)
            first, second = ((1 - beta) / self.correction(stack, beta, self.steps[i]) for beta in betas)
            q, r = torch.linalg.qr(other)
            back, carried = torch.linalg.pinv(r), q.mT @ self.basis[i]
            g = stack.turn(g, back)
            v = torch.lerp(carried @ self.seconds[i] @ carried.mT, stack.gram(g) * stack.rank / g[0].numel(), second)
            values, vectors = torch.linalg.eigh(v)
            root = vectors @ torch.diag_embed(1 / (values.clamp_min(0).sqrt() + self.eps)) @ vectors.mT
            m = torch.lerp(stack.turn(self.exp_avg[i], carried.mT), stack.multiply(g, root), first)
            self.exp_avg[i], self.seconds[i], self.basis[i] = m, v, q
            stack.write(stack.turn(m, back.mT))


OPPONENTS: dict[str, type[WholeStep]] = {
    "lora_muon": LoRAMuon,
    "lora_rite": LoRARITE,
    "riemannian_sgd": RiemannianSGD,
    "riemannian_after": RiemannianAfterAdam,
}
