"""K-FAC's gradient for whatever optimizer there is.

Derivation. With dA = sum_t g_t x_t' and dB = sum_t dy_t s a_t', the Fisher block of A is, in K-FAC's approximation,
E[x x'] (x) S_g and that of B is S_a (x) E[dy dy']. Preconditioning with the r x r side of each gives the natural
gradient in rank space: dA <- (S_g + d I)^-1 dA and dB <- dB (S_a + d I)^-1. By default each keeps the norm that it
had, which is this project's and not the published method's (`renormalise`; preset `released_defaults`).
"""

from __future__ import annotations

import torch

from grit_impl.method.rules.base import UpdateRule, rule
from grit_impl.method.stacks import A


@rule("precondition")
class Precondition(UpdateRule):
    """See the module; nothing changes before the first inversion. No state."""

    def update(self, *, warm: bool, refresh: bool) -> None:
        """Multiply every gradient by its factor's damped inverse, on the r-side."""
        for stack in self.stacks if warm else ():
            raw = stack.gradients()
            if raw is None:
                continue
            new = stack.multiply(raw, stack.of(self.factors.inverse[self.sides[stack.side or A]]))
            if self.config.renormalise == "gradient_norm":  # a gradient of zero stays zero
                size = torch.linalg.vector_norm(new, dim=(1, 2), keepdim=True)
                new *= torch.where(size > 0, torch.linalg.vector_norm(raw, dim=(1, 2), keepdim=True) / size, 0.0)
            stack.write(new)
