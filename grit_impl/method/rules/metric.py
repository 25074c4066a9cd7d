"""The Fisher metric of single LoRA tensors, with the long side that GRIT never forms taken as a multiple of I.

    F_A = s_x I (x) S_g,    s_x = trace(S_a) / |A|^2,     since S_a = A S_x A'
    F_B = S_a (x) s_y I,    s_y = trace(S_g) / |B|^2,     since S_g = s^2 B' S_dy B

Both scales are measured in the directions that matter, from what GRIT knows anyway. They make A and B, and all layers,
comparable: in this metric a step D of one tensor changes the model by D' F D / 2 per token. How far that is from the
divergence itself: see `trust_region`.

Averages lag, and B starts at 0 and grows: S_g = s^2 B' S_dy B of twenty steps ago is far too small a metric. The sizes
|A|^2 and |B|^2 are averaged like the factors, so that s_x and s_y compare like with like, and a factor counts
as grown by what its matrix has grown since: S_g |B|^2 / avg |B|^2, S_a |A|^2 / avg |A|^2.

While B = 0 there is no S_g: A's gradient is zero too, and s_y is E|dy|^2 / d_out with E|dy|^2 = N |dB|^2 / trace(S_a),
which holds for N tokens whose gradients are noise and is too large, hence careful, where they agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_impl.method.factors import READY
from grit_impl.method.rules.base import WholeStep
from grit_impl.method.stacks import A, B


class MetricRule(WholeStep):
    """A rule that knows the metric; 24 L bytes of state in float32.

    Attributes:
        step: Steps taken, in the rhythm of which the factors take in statistics.
        sizes: (2, L): decayed sums of |A|^2 (0) and |B|^2 (1); `weight` is the sum of the weights.
        average: (2, L): the average sizes that belong to the factors of the last refresh.
        scale: (2, L): 1 / s_x for A (0) and 1 / s_y for B (1), as of then; 0 while it is unknown.
    """

    _METRIC_STATE = ("step", "weight", "sizes", "average", "scale")

    def init(self) -> None:
        """Sizes and scales that are not known yet."""
        self.sizes, self.average, self.scale = torch.zeros_like(self.factors.inverse[..., :3, 0]).unbind(-1)
        self.step, self.weight = 0, 0.0

    def _scales(self, refresh: bool) -> Tensor:
        """(2, L): 1 / s_x and 1 / s_y over the growth of the factor that they go with; 0 where unknown."""
        now = torch.zeros_like(self.sizes)
        for stack in self.stacks:
            if stack.side is not None:
                now[stack.side, stack.layers] = stack.values().square().sum((1, 2))
        if (self.step - 1) % self.config.grit_cov_update_freq == 0:  # when the factors took in statistics
            self.sizes = self.config.factor_decay * self.sizes + now
            self.weight = self.config.factor_decay * self.weight + 1
        if refresh:
            self._measure()
        grown = torch.where(self.average > 0, now / self.average, 1.0).flip(A)
        return torch.where(grown > 0, self.scale / grown, 0.0)

    def _measure(self) -> None:
        """Take s_x and s_y from the factors that were just inverted."""
        energy = self.factors.covariances().diagonal(dim1=-2, dim2=-1).sum(-1)
        self.average = self.sizes / self.weight
        for stack in self.stacks:
            if stack.side == B and (g := stack.gradients()) is not None:
                i = stack.layers
                noise = self.factors.tokens[i] * g.square().sum((1, 2)) / (energy[A, i] * stack.shape[1])
                energy[B, i] = torch.where(self.average[B, i] > 0, energy[B, i], noise)
        size = torch.where(self.average > 0, self.average, 1.0)
        ready = (self.factors.status == READY).flip(0) & (energy > 0)
        self.scale = torch.where(ready, size / energy, 0.0)
