"""Natural gradient with momentum, its length from a bound on the Kullback-Leibler divergence; no Adam.

Derivation. To second order KL(p_theta || p_theta+D) = D' F D / 2 (Martens 2020, section 6). The step that lowers the
linear model of the loss most within KL <= e^2 / 2 is D = -e v / sqrt(m' v), v = F^-1 m, m the gradient. K-FAC has
S_x (x) S_g for A and S_a (x) s^2 S_dy for B; the long sides, which GRIT never forms, are taken as multiples of I:

    F_A = s_x I (x) S_g,    s_x = trace(S_a) / |A|^2,     since S_a = A S_x A'
    F_B = S_a (x) s_y I,    s_y = trace(S_g) / |B|^2,     since S_g = s^2 B' S_dy B

so that both scales are measured in the directions that matter, from what GRIT knows anyway. They make A and B, and all
layers, comparable: one length for the whole step, and no ratio of learning rates to tune. The learning rate is e, the
radius: the predicted KL per token of a step is at most lr^2 / 2, and follows warm-up and decay. Where the unbounded
step -v is shorter it is taken, D = -min(1, lr / sqrt(m' v)) v, as in K-FAC's trust region (Ba et al. 2017). m is the
exponential average of the gradients (the group's first beta, bias-corrected), preconditioned after averaging, so that
old gradients meet the present metric.

Averages lag, and B starts at 0 and grows: S_g = s^2 B' S_dy B of twenty steps ago is far too small a metric. The sizes
|A|^2 and |B|^2 are averaged like the factors, so that s_x and s_y compare like with like, and a factor counts
as grown by what its matrix has grown since: S_g |B|^2 / avg |B|^2, S_a |A|^2 / avg |A|^2.

While B = 0 there is no S_g: A's gradient is zero too, and s_y is E|dy|^2 / d_out with E|dy|^2 = N |dB|^2 / trace(S_a),
which holds for N tokens whose gradients are noise and is too large, hence careful, where they agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_impl.errors import GRITError
from grit_impl.factors import READY
from grit_impl.update_rules.base import BETAS, A, B, Stack, UpdateRule


class TrustRegion(UpdateRule):
    """See the module. F is damped as the inverses are, so that the KL predicted is not below the undamped model's.

    Memory, in float32: 4 bytes per trained parameter (the momentum; AdamW keeps 8) and 24 L (sizes and scales).

    Attributes:
        sizes: (2, L): decayed sums of |A|^2 (0) and |B|^2 (1); `weight` is the sum of the weights.
        average: (2, L): the average sizes that belong to the inverses.
        scale: (2, L): 1 / s_x for A (0) and 1 / s_y for B (1); 0 while the metric is unknown: nothing moves.
        step: Steps taken, for the bias correction.
        decrement: 0-dim; m' F^-1 m of the last step, whose predicted KL is min(lr^2, decrement) / 2.
    """

    _STATE = ("step", "weight", "sizes", "average", "scale", "exp_avg")

    def _allocate(self) -> None:
        self.exp_avg = [stack.zeros() for stack in self.stacks]
        self.sizes, self.average, self.scale = torch.zeros_like(self.factors.inverse[..., :3, 0]).unbind(-1)
        self.decrement = torch.zeros_like(self.scale[0, 0])
        self.step, self.weight = 0, 0.0
        if any(stack.side is None for stack in self.stacks):
            raise GRITError(
                "update_rule = 'trust_region' knows a metric for LoRA factors only, and other parameters are trained "
                "too: freeze them, or use update_rule = 'eigenbasis'"
            )

    def write(self, refresh: bool) -> None:
        """The natural gradient of the averaged gradients, times the length that the bound allows."""
        self.step += 1
        now = self._measure()
        if refresh:
            self._refresh()
        grown = torch.where(self.average > 0, now / self.average, 1.0).flip(0)
        scale = torch.where(grown > 0, self.scale / grown, 0.0)
        found: list[tuple[Stack, Tensor]] = []
        decrement = torch.zeros_like(self.decrement)
        for stack, m in zip(self.stacks, self.exp_avg, strict=True):
            g = stack.gradients()
            if g is None:
                continue
            beta = self.groups[stack.group].get("betas", BETAS)[0]
            mean = m.lerp_(g, 1 - beta) / (1 - beta**self.step)
            i, r, side = stack.layers, stack.rank, stack.side or A
            natural = stack.turn(mean, self.factors.inverse[1 - side, i, :r, :r]) * scale[side, i, None, None]
            decrement += (mean * natural).sum()
            found.append((stack, natural))
        radius = decrement.clamp_min(torch.finfo(decrement.dtype).tiny).rsqrt()
        for stack, natural in found:
            rate = float(self.groups[stack.group]["lr"])
            stack.write(natural * (radius.clamp(max=1 / rate) if rate else radius))
        self.decrement = decrement

    def _measure(self) -> Tensor:
        """(2, L): |A|^2 and |B|^2 now; they enter the averages when the factors take in statistics."""
        now = torch.zeros_like(self.sizes)
        for stack in self.stacks:
            values = torch.stack([p.detach() for p in stack.parameters()]).to(stack.dtype)
            now[stack.side or A, stack.layers] = values.square().sum((1, 2))
        if (self.step - 1) % self.config.grit_cov_update_freq == 0:
            self.sizes = self.config.factor_decay * self.sizes + now
            self.weight = self.config.factor_decay * self.weight + 1
        return now

    def _refresh(self) -> None:
        """Take s_x and s_y from the factors that were just inverted."""
        s = self.factors.covariances()
        trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)
        self.average = self.sizes / self.weight
        energy, size = trace, self.average
        for stack in self.stacks:
            if stack.side == B and (g := stack.gradients()) is not None:
                i = stack.layers
                noise = self.factors.tokens[i] * g.square().sum((1, 2)) / (trace[0, i] * stack.shape[1])
                energy = energy.index_put((torch.ones_like(i), i), torch.where(size[1, i] > 0, trace[1, i], noise))
        size = torch.where(size > 0, size, 1.0)
        ready = (self.factors.status == READY).flip(0) & (energy > 0)
        self.scale = torch.where(ready, size / energy, 0.0)

    def project(self) -> None:
        """First moments into the projectors' spaces."""
        for stack, m in zip(self.stacks, self.exp_avg, strict=True):
            m.copy_(stack.turn(m, self.factors.projector[stack.side, stack.layers, : stack.rank, : stack.rank]))
