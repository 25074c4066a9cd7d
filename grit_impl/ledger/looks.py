"""Looks at all gradients at the moments of one step: which are fingerprinted, and which need not be.

From the third step on, gradients whose version (torch counts in-place writes) has not changed since the last look are
not fingerprinted again; the hashes of a few guard against writes that are not counted (`.data`, foreign kernels). If
one of those ever differs, or something writes between the backward passes of a step, that step counts as not sampled,
and every later look is a full one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grit_impl.ledger import timeline
from grit_impl.ledger.fingerprints import Fingerprinter, Look
from grit_impl.ledger.step import Step, same_stamps, stamps
from grit_impl.ledger.timeline import Probe

FULL_STEPS = 2
Gradients = list[Tensor | None]


class Looks:
    """Takes probes of the gradients of some parameters.

    Args:
        parameters: Of the model; replaced in this list where the model replaces them.
        structured: Positions of those whose gradients are kept for the step.
        sample: Positions of those whose unmodified gradients the shadows need; may shrink.

    Attributes:
        now: The step under way.
        context: Who runs, innermost last.
        lean: Looks may be skipped.
        usual_passes: Backward passes with gradients in the step before.
        seen: Steps seen so far.
    """

    def __init__(self, parameters: list[nn.Parameter], structured: list[int], sample: list[int]) -> None:
        self.parameters, self._structured, self.sample = parameters, structured, sample
        self.fingerprint = Fingerprinter(max(p.numel() for p in parameters))
        self.context = [timeline.LOOP]
        self.lean, self.usual_passes, self.seen = True, 0, 0
        self.now: Step = self.begin(np.zeros(len(parameters), dtype=bool), full=True)

    def begin(self, expected: Any, *, full: bool) -> Step:
        """A new step.

        Args:
            expected: (N,) who should get a gradient.
            full: Take fingerprints.
        """
        n = len(self.parameters)
        nothing = np.zeros(n, dtype=np.int64)
        self.now = Step(full, np.full(n, -1), nothing, np.zeros(n, dtype=bool), expected)
        return self.now

    def gradients(self) -> Gradients:
        """As they are; those that `torch.autograd.grad` returned, where nobody has made them a `.grad` yet."""
        return [p.grad if p.grad is not None else self.now.manual.get(i) for i, p in enumerate(self.parameters)]

    def look(self, moment: str | None, who: str | None = None, grads: Gradients | None = None) -> Probe | None:
        """One probe.

        Args:
            moment: What comes next; None: what came next at the last probe.
            who: Whose work the time since then was; None: that of the context.
            grads: If other than `gradients()`.
        """
        now = self.now
        if not now.full:
            if (moment and moment.startswith("step:")) or who == timeline.AUTOGRAD:
                now.probes.append(Probe("", moment or "", None, np.zeros(0, dtype=bool)))
            return None
        grads = self.gradients() if grads is None else grads
        last = now.probes[-1].moment if now.probes else ""
        moment = last if moment is None else moment
        self.resolve(grads, last=True)
        before = (now.probes[-1].like or now.probes[-1]) if now.probes else None
        same = before is not None and self.compare(grads)
        # What was postponed before a pass that then changed nothing has no fingerprints to share.
        if before is not None and same and self.may_skip() and (before.table is not None or before.missing.all()):
            probe = Probe(who or self.context[-1], moment, None, before.missing, like=before)
            now.lean = True
        else:
            missing = np.array([g is None for g in grads])
            look = self._take(grads, before)
            samples = self._structures(grads) if now.structured or who == timeline.AUTOGRAD else {}
            probe = Probe(who or self.context[-1], moment, look.table, missing, samples, look=look)
            probe.written = before is not None and not same
            now.stamps, now.check = stamps(grads), self._checksum(grads)
            if before is not None:
                before.look = None  # no later look is compared with it, and each is as large as all gradients
        now.probes.append(probe)
        return probe

    def _take(self, grads: Gradients, before: Probe | None) -> Look:
        return self.fingerprint(grads, before.look if before else None, self.now.raw_look)

    def raw(self, grads: Gradients, probe: Probe | None) -> None:
        """These are the unmodified gradients, as the last probe saw them."""
        now = self.now
        now.raw.append(len(now.probes) - 1)
        self.keep_raw(grads, probe)

    def keep_raw(self, grads: Gradients, probe: Probe | None) -> None:
        """What the shadows and later looks need of them."""
        now = self.now
        now.raw_sample = {i: g.detach().clone() for i in self.sample if (g := grads[i]) is not None}
        if probe is None:
            norms = torch._foreach_norm([g for g in grads if g is not None])
            now.raw_norm = torch.stack(norms) if norms else None
        else:
            root = probe.like or probe
            now.raw_look, table = root.look, root.table
            now.raw_norm = None if table is None else table[:, timeline.NORM]

    def may_skip(self) -> bool:
        """Whether a look may rely on versions."""
        return self.lean and self.seen >= FULL_STEPS

    def postpone(self, grads: Gradients) -> None:
        """After a backward pass that another will follow, as it did in the last step: fingerprints can wait."""
        missing = np.array([g is None for g in grads])
        now = self.now
        now.pending, now.lean = Probe(timeline.AUTOGRAD, "backward", None, missing), True
        now.stamps, now.check = stamps(grads), self._checksum(grads)
        now.probes.append(now.pending)
        now.raw.append(len(now.probes) - 1)

    def resolve(self, grads: Gradients, *, last: bool) -> None:
        """Take what was postponed. Before another backward pass it is enough to know that nothing has changed."""
        now, pending = self.now, self.now.pending
        if pending is None:
            return
        now.pending = None
        if not self.compare(grads):  # written to where no fingerprints were taken
            self.lean, now.lost = False, True
        if last or now.lost:
            pending.look = self._take(grads, None)
            pending.table, pending.samples = pending.look.table, self._structures(grads)
            self.keep_raw(grads, pending)

    def compare(self, grads: Gradients) -> bool:
        """Whether the gradients have the versions that they had at the last look; keeps what will prove it."""
        now = self.now
        if not now.stamps or not same_stamps(now.stamps, stamps(grads)):
            return False
        now.checks.append((now.check, self._checksum(grads)))
        return True

    def _checksum(self, grads: Gradients) -> Any:
        chosen = [g for i in self._structured if (g := grads[i]) is not None]
        return self.fingerprint.hashes(chosen) if chosen else None

    def _structures(self, grads: Gradients) -> dict[int, Tensor]:
        return {i: g.detach().clone() for i in self._structured if (g := grads[i]) is not None}
