"""Adam in the eigenbasis of the Fisher factors.

Derivation. K-FAC's block of A is E[x x'] (x) S_g. With S_g = Q diag(l) Q', the r-side of the block is diagonal in
the coordinates Q' dA, so that there the diagonal that Adam estimates misses no curvature of that side. It is Adam's own
second moment, not l: George et al. 2018 (EKFAC) show that in a Kronecker eigenbasis the measured second moments
are the diagonal nearest to the Fisher, and Vyas et al. 2025 (SOAP) that Adam in Shampoo's eigenbasis is Shampoo with
that correction. Here the basis is the Fisher's own, E[g g'] over tokens, in place of an average of dA dA' over steps:
thousands of samples per step, known from the first one on. B likewise: dB Q_a, S_a = Q_a diag(l) Q_a'.

    m <- b1 m + (1 - b1) Q' dA,  v <- b2 v + (1 - b2) (Q' dA)^2,  direction = Q [m^ / (sqrt(v^) + eps)]

Only the short side is turned: no matrix larger than r x r is formed. Under A -> R A, B -> B R' with orthogonal R the
bases turn along (Q -> R Q) and B A moves as before, which it does not under Adam.

Refresh. The first bases come from an eigenvalue solver, on the host, later ones from one step of orthogonal iteration,
Q <- qr(S Q), as in SOAP, for which neither the host nor a GPU waits for the other. With T = Q_old' Q_new the first
moment turns exactly, m <- T' m. The second moment of a turned vector is sum_ij T_ik T_jk E[u_i u_j]; in an
eigenbasis the off-diagonal terms are 0, which leaves v <- (T o T)' v. T o T is doubly stochastic: mass is kept,
permutations and signs are followed exactly, nothing has to be sorted or matched.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from grit_impl.method.factors import READY, TRACE_FLOOR
from grit_impl.method.rules.base import BETAS, WholeStep, rule
from grit_impl.method.spectra import eigh

EPS = 1e-8
# At B = 0 there is no S_g yet: the first refreshes (steps 1, 2, 4 and 8 by default) see quite different factors.
SOLVED_REFRESHES = 4


@rule("eigenbasis")
class Eigenbasis(WholeStep):
    """See the module; betas, eps and weight decay are AdamW's, from the parameter groups.

    Memory, in float32: 8 bytes per trained parameter (both moments, as AdamW), 8 L r^2 (the bases), 8 L (the counts).

    Attributes:
        basis: (2, L, r, r): columns are the eigenvectors of S_g for A (0) and of S_a for B (1).
        refreshes: How often the bases were renewed.
    """

    _STATE: ClassVar[tuple[str, ...]] = ("steps", "refreshes", "basis", "exp_avg", "exp_avg_sq")

    def init(self) -> None:
        """The identity as bases, and moments of zero."""
        eye = self.factors.eye
        self.basis = eye.expand(2, len(self.layers), *eye.shape).clone()
        ranks = torch.tensor([layer.rank for layer in self.layers], device=eye.device)
        self._used = torch.diag_embed((torch.arange(len(eye), device=eye.device) < ranks[:, None]).to(eye.dtype))
        self.refreshes = 0
        self.exp_avg = [stack.zeros() for stack in self.stacks]
        self.exp_avg_sq = [stack.zeros() for stack in self.stacks]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(2, L, r, r) whose eigenvectors are the bases of A (0) and of B (1), and (2, L): which are known."""
        return self.factors.covariances().flip(0), (self.factors.status == READY).flip(0)

    def refresh(self) -> None:
        """Renew all bases in one batched call; a factor that is not ready keeps its basis. Waits only at first."""
        s, ready = self.matrices()
        s = s / self.factors.mean_eigenvalues(s).clamp_min(TRACE_FLOOR)[..., None, None]
        ready = ready[..., None, None]
        s = torch.where(ready, s, self.factors.eye)
        if self.refreshes < SOLVED_REFRESHES:
            # Lifted by one, the layer's own rank comes before the padding, however singular S is.
            basis = eigh(s + self._used)[1].flip(-1)
        else:
            basis = torch.linalg.qr((s + self.factors.eye - self._used) @ self.basis).Q
        basis = torch.where(ready, basis, self.basis)
        change = self.basis.mT @ basis
        self.basis = basis
        self.refreshes += 1
        for stack, m, v in zip(self.stacks, self.exp_avg, self.exp_avg_sq, strict=True):
            if stack.side is not None:
                turn = stack.of(change[stack.side])
                m.copy_(stack.turn(m, turn))
                v.copy_(stack.turn(v, turn.square()))

    def update(self, *, warm: bool, refresh: bool) -> None:
        """Adam's direction, computed in the eigenbasis."""
        if refresh:
            self.refresh()
        for stack, steps, m, v in zip(self.stacks, self.steps, self.exp_avg, self.exp_avg_sq, strict=True):
            g = stack.gradients()
            if g is None:
                continue
            group = self.groups[stack.group]
            (beta1, beta2), eps = group.get("betas", BETAS), group.get("eps", EPS)
            basis = None if stack.side is None else stack.of(self.basis[stack.side])
            if basis is not None:
                g = stack.turn(g, basis)
            there = self.count(stack, steps)
            m.lerp_(g, self.share(stack, beta1, there))
            v.mul_(1 - self.share(stack, beta2, there)).addcmul_(g, g, value=1 - beta2)  # a missing g is 0
            root = torch.sqrt(v, out=g).div_(self.correction(stack, beta2, steps).sqrt()).add_(eps)
            direction = torch.div(m, root, out=g).div_(self.correction(stack, beta1, steps))
            stack.write(direction if basis is None else stack.turn(direction, basis.mT))

    def project(self) -> None:
        """First moments into the projectors' spaces: m <- (Q' P Q) m for A, m (Q' P Q) for B."""
        projector = self.basis.mT @ self.factors.projector @ self.basis
        for stack, m in zip(self.stacks, self.exp_avg, strict=True):
            if stack.side is not None:
                m.copy_(stack.turn(m, stack.of(projector[stack.side])))
