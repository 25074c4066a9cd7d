"""What the ledger does when something happens outside of an optimizer: a backward pass, clipping, a callback."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from grit_impl.ledger import timeline, watches
from grit_impl.ledger.step import same_stamps, stamps
from grit_impl.ledger.stepping import Stepping
from grit_impl.ledger.watches import access


class Observer(Stepping):
    """Watches the tensors of one model; see `Stepping`."""

    def backward_begins(self) -> None:
        """Before a backward pass: whatever changed since the last one was not autograd."""
        access.ignore(self._listener)
        looks, grads = self._looks, [p.grad for p in self._parameters]
        if self._now.restart or self._now.manual:
            self._forget()
        if self._now.over:
            looks.look("backward", grads=grads)
            self._close_step()
        elif self._now.pending is not None:
            looks.resolve(grads, last=False)
        elif self._now.raw:
            now = self._now
            written = now.full and not same_stamps(now.stamps, stamps(grads))
            looks.look("backward", grads=grads)
            looks.lean = looks.lean and not written
        if not self._now.raw:
            if self._inspects():
                self._hooks.look(self._parameters, lambda j: self._now.hooked.setdefault(j, {}))
            if any(g is not None for g in grads):
                looks.look("backward", grads=grads)
                self._now.leftover = bool(self._now.full)
            self._now.hooked = {}
        if self._frames and not self._in_closure:
            self._frames[-1]["computes"] = True
        self._now.before_pass = stamps(grads)
        self._in_backward = True

    def backward_ended(self) -> None:
        """After a backward pass: these are the raw gradients, if it touched any."""
        self._in_backward = False
        now, looks = self._now, self._looks
        now.passes, self._passes = now.passes + 1, self._passes + 1
        if now.inside:
            self._stepped_inside()
            return
        grads = [now.unhooked.get(i, p.grad) for i, p in enumerate(self._parameters)]
        if not now.unhooked and same_stamps(now.before_pass, stamps(grads)):
            return  # another model's, or of a loss that does not depend on these tensors
        another = len(now.raw) + 1 < looks.usual_passes
        if now.full and looks.may_skip() and another and not (now.unhooked or self._frames):
            looks.postpone(grads)
            return
        probe = looks.look("backward", timeline.AUTOGRAD, grads)
        looks.raw(grads, probe)
        now.why = self._layers.absent()
        for j in sorted(now.hooked):
            after = now.hooked.get(j + 1, {})
            looks.look(
                "gradient hooks", self._hooks.kind, [after.get(i, p.grad) for i, p in enumerate(self._parameters)]
            )
        self._listen()
        if self._frames:  # a closure: the optimizer's own entry came too early
            self._frames[-1]["entry"] = len(now.probes) - 1
            self._shadows.before(self._frames[-1]["optimizer"])

    def _stepped_inside(self) -> None:
        """Optimizers have stepped while backward ran: what they found and left was kept."""
        now, looks = self._now, self._looks
        grads = [now.inside[i][0] if i in now.inside else p.grad for i, p in enumerate(self._parameters)]
        probe = looks.look("backward", timeline.AUTOGRAD, grads)
        looks.raw(grads, probe)
        now.why = self._layers.absent()
        entry = [now.inside[i][1] if i in now.inside else p.grad for i, p in enumerate(self._parameters)]
        looks.look("step:inside backward", self._hooks.kind, entry)
        looks.look("after", "optimizer")
        held = np.isin(np.arange(len(self.names)), list(now.inside))
        now.entry[held], now.stepped_on = len(now.probes) - 2, now.stepped_on + held
        if now.full:
            places = range(len(self.names))
            before = looks.fingerprint([now.inside[i][2] if i in now.inside else None for i in places], self._left)
            after = looks.fingerprint([now.inside_after.get(i) for i in places], before, distances=True)
            self._compare_with_left(before)
            now.moved.append((held, before.table, after.table))
            self._left = after
        self._layers.reset()
        now.stepped = True

    def grad_returned(self, inputs: Any, grads: Any) -> None:
        """After `torch.autograd.grad`: if it was asked for gradients of these tensors, they are the raw ones."""
        with temporarily_clear_interpreter_stack():  # what is done here is no part of a function transform
            self._grad_returned(inputs, grads)

    def _grad_returned(self, inputs: Any, grads: Any) -> None:
        if any(map(watches.traced, grads)):
            return
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
        wrapped = zip(given, grads, strict=True)
        pairs = [(watches.plain(x), watches.plain(g).detach()) for x, g in wrapped if isinstance(g, Tensor)]
        found = {i: g for x, g in pairs if (i := self._places.get(id(x))) is not None}
        fresh = bool(found)
        if not found:
            found, fresh = self._copies.returned(pairs, self._parameters), self._copies.fresh
        if not found:
            return
        if self._now.over:
            self._looks.look("backward")
            self._close_step()
        now = self._now
        if now.raw and not now.manual:  # a backward pass has filled `.grad`: this is somebody's statistics
            return
        before = now.manual if fresh else {}
        now.manual = {**now.manual, **{i: before[i] + g if i in before else g for i, g in found.items()}}
        sums = [now.manual.get(i) for i in range(len(self._parameters))]
        self._looks.raw(sums, self._looks.look("backward", timeline.AUTOGRAD, sums))
        now.why = self._layers.absent() | self._copies.why

    def _forget(self) -> None:
        """What was seen of this step was a trial: a closure begins again, or gradients that nobody used."""
        now = self._now
        first = now.before_closure if now.restart else 0
        now.probes, now.raw = now.probes[:first], [j for j in now.raw if j < first]
        now.manual, now.pending, now.restart, now.stamps = {}, None, False, []

    def clips(self, maximum: Any, norm_type: Any, value: Any) -> None:
        """Before clipping, by total norm or element-wise."""
        access.ignore(self._listener)  # clipping reads, too
        self._looks.look("clip")
        self._now.clip_value = None if value is None else float(value)
        limit = float("inf") if maximum is None or float(norm_type) != 2.0 else float(maximum)
        if np.isfinite(limit):
            self._now.max_norm = min(limit, self._now.max_norm or limit)

    def unscales(self, scaler: Any) -> None:
        """Before GradScaler divides the gradients by its scale."""
        access.ignore(self._listener)
        self._looks.look("unscale")
        scale = getattr(scaler, "_scale", None)
        self._now.unscale = None if scale is None else scale.reciprocal()

    def clears(self) -> None:
        """Before zero_grad."""
        self._looks.look("zero_grad")

    def passed(self, who: str) -> None:
        """After any of them."""
        self._looks.look(None, who)
        if self._now.read and not (self._now.over or self._frames):
            access.listen(self._listener)

    def event_begins(self, event: str, who: str) -> None:
        """Before a foreign callback's method."""
        self._looks.look(event)
        self._looks.context.append(f"{event} ({who})")

    def event_ends(self, reads: int) -> None:
        """After it; `reads`: missing gradients that it read."""
        who = self._looks.context.pop()
        self._looks.look(None, who)
        if reads and self._now.stepped:
            self._now.late_reads[who] = self._now.late_reads.get(who, 0) + reads

    def scaler_stepped(self, stepped_before: bool) -> None:
        """After GradScaler.step: it may have skipped the optimizer."""
        self._now.skipped = not stepped_before and not self._now.stepped and bool(self._now.raw)

    def stepped(self) -> bool:
        """Whether an optimizer has moved parameters since the last backward pass."""
        return self._now.stepped

    def replaying(self) -> bool:
        """Whether the code that runs is an optimizer's replay."""
        return self._shadows.running

    def active(self) -> bool:
        """Whether a step is under way."""
        return bool(self._now.raw) or self._now.stepped
