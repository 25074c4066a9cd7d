"""Adam in the eigenbasis of the gradients' own r x r Gram matrices: SOAP on the rank side.

Vyas et al. 2025 (SOAP) run Adam in the eigenbases of averages of G G' and G' G; here only the short side is turned. A's
basis is that of the average of dA dA', B's that of dB' dB. Where `eigenbasis` has thousands of tokens per step for its
basis, this rule has a gradient per step, and needs no statistics: what is captured there can be left alone here. It is
the control that says whether the Fisher is worth its capture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_impl.method.factors import TRACE_FLOOR
from grit_impl.method.rules.base import rule
from grit_impl.method.rules.eigenbasis import Eigenbasis


@rule("gram")
class Gram(Eigenbasis):
    """See the module; `factor_decay` is the average's, `kfac_update_freq` the refreshes'. 8 L r^2 bytes more.

    Attributes:
        grams: (2, L, r, r): decayed sums of dA dA' (0) and of dB' dB (1).
    """

    captures = False
    _STATE = (*Eigenbasis._STATE, "grams")

    def init(self) -> None:
        """Grams of zero."""
        super().init()
        self.grams = torch.zeros_like(self.basis)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The Grams; one whose gradient was always zero is not known."""
        return self.grams, self.factors.mean_eigenvalues(self.grams) > TRACE_FLOOR

    def update(self, *, warm: bool, refresh: bool) -> None:
        """Take the gradients in, then as `eigenbasis`."""
        for stack in self.stacks:
            if stack.side is not None and (g := stack.gradients()) is not None:
                stack.put(self.grams, self.config.factor_decay * stack.of(self.grams[stack.side]) + stack.gram(g))
        super().update(warm=warm, refresh=refresh)
