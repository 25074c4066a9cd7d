"""Natural gradient with momentum, its length measured in the rule's own metric; no Adam.

Derivation. To second order KL(p_theta || p_theta+D) = D' F D / 2 (Martens 2020, section 6). The step that lowers the
linear model of the loss most within KL <= e^2 / 2 is D = -e v / sqrt(m' v), v = F^-1 m, m the gradient. With K-FAC's
blocks, their long sides multiples of I (`metric`), v_A = (s_x (S_g + d))^-1 m_A and v_B = m_B (s_y (S_a + d))^-1: one
length for the whole step, and no ratio of learning rates to tune. The learning rate is e, the radius, and follows
warm-up and decay. Where the unbounded step -v is shorter it is taken, D = -min(1, lr / sqrt(m' v)) v, as in K-FAC's
trust region (Ba et al. 2017). m is the exponential average of the gradients (the group's first beta, bias-corrected),
preconditioned after averaging, so that old gradients meet the present metric.

What is promised: D' F D <= lr^2 for this F. That is no bound on the divergence of the model, which was measured 23 to
4,380 times lr^2 / 2 on the embedded base (suites/benchmarks/trust_region_kl.py; docs/measurements/grit-vs-lora.md,
section 12): the tensors' steps agree where a block-diagonal F lets each count alone (5 to 24 x), tokens with large
activations have large gradients too, which a product of averages misses (2 to 12 x), and in the first steps the
averages lag behind factors that grow. So the radius is to be tuned, like any learning rate.
"""

from __future__ import annotations

import torch

from grit_impl.method.rules.base import BETAS, rule
from grit_impl.method.rules.metric import MetricRule
from grit_impl.method.stacks import A


@rule("trust_region")
class TrustRegion(MetricRule):
    """See the module. F is damped as the inverses are, so that the KL predicted is not below the undamped model's.

    Memory, in float32: 4 bytes per trained parameter (the momentum; AdamW keeps 8), the metric's and counts' 32 L.

    Attributes:
        decrement: 0-dim; m' F^-1 m of the last step, whose predicted KL is min(lr^2, decrement) / 2.
    """

    lora_only = True
    _STATE = (*MetricRule._METRIC_STATE, "steps", "exp_avg")

    def init(self) -> None:
        """Moments of zero."""
        super().init()
        self.exp_avg = [stack.zeros() for stack in self.stacks]
        self.decrement = torch.zeros_like(self.scale[0, 0])

    def update(self, *, warm: bool, refresh: bool) -> None:
        """The natural gradient of the averaged gradients, times the length that the bound allows."""
        self.step += 1
        scale, decrement = self._scales(refresh), torch.zeros_like(self.decrement)
        for stack, steps, m in zip(self.stacks, self.steps, self.exp_avg, strict=True):
            g = stack.gradients()
            if g is None:
                continue
            beta, there = self.groups[stack.group].get("betas", BETAS)[0], self.count(stack, steps)
            mean = m.lerp_(g, self.share(stack, beta, there)) / self.correction(stack, beta, steps)
            if there is not None:  # what does not move is no part of the step's length
                mean = mean * stack.each(there)
            side = stack.side or A
            natural = stack.turn(mean, stack.of(self.factors.inverse[1 - side])) * scale[side, stack.layers, None, None]
            decrement += (mean * natural).sum()
            stack.write(natural)
        radius = decrement.clamp_min(torch.finfo(decrement.dtype).tiny).rsqrt()
        for stack in self.stacks:
            rate = float(self.groups[stack.group]["lr"])
            stack.scale((radius.clamp(max=1 / rate) if rate else radius).expand(stack.shape[0]))
        self.decrement = decrement

    def project(self) -> None:
        """First moments into the projectors' spaces."""
        for stack, m in zip(self.stacks, self.exp_avg, strict=True):
            m.copy_(stack.turn(m, stack.of(self.factors.projector[stack.side or A])))
