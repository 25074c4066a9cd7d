"""The gradient ledger: what happened to every gradient between backward and the optimizer, seen from outside.

    with gradient_ledger(model, path="ledger.jsonl.gz") as ledger:
        trainer.train()
    judge_ledger(ledger)

It uses torch's global optimizer hooks and, while the context is open, stands in front of the few functions that every
training loop passes through: `torch.autograd.backward`, clipping, GradScaler, `zero_grad`, and the callback events of
transformers. A trainer needs to know nothing of it and cannot avoid it. All device work is batched, and a step's
results are fetched while the next step runs.

From the third step on, gradients whose version (torch counts in-place writes) has not changed since the last look are
not fingerprinted again; the hashes of a few guard against writes that are not counted (`.data`, foreign kernels). If
one of those ever differs, or something writes between the backward passes of a step, that step counts as not sampled,
and every later look is a full one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from grit_impl.errors import GRITError
from grit_impl.ledger import timeline
from grit_impl.ledger.interception import Interception
from grit_impl.ledger.rows import RowWriter, factor_row, run_row
from grit_impl.ledger.shadow import GHOST, Shadows
from grit_impl.ledger.sketches import Sketcher
from grit_impl.ledger.step import Step, same_stamps, stamps
from grit_impl.ledger.timeline import Probe
from grit_impl.ledger.watches import ORPHAN_STEP, HookWatch, OrphanWatch, owners, spread

SAMPLE, STRUCTURE, FULL_STEPS = 16, 4, 2
# Above it a matrix is no LoRA factor, and its inner products would cost more than the step.
LARGEST_RANK = 512
FACTOR_STEPS = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000}


@contextlib.contextmanager
def gradient_ledger(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    every: int = 1,
    *,
    sample: int = SAMPLE,
    factors: Any = None,
    resume_from: int = 0,
) -> Iterator[GradientLedger]:
    """Record what happens to the gradients of a model's LoRA tensors while the context is open.

    Args:
        model: The model that is trained. Without tensors named `lora_` all trainable parameters are watched.
        path: Where the ledger goes (`.jsonl.gz`, one JSON object per line), written when the context closes without an
            exception; None: kept in memory.
        every: Fingerprint every n-th optimizer step (the first two always); the sample is followed at every step.
        sample: Tensors whose optimizer is shadowed.
        factors: Object with a `factor_report()` (see GRITManager); found at `model._grit_manager` if there is one.
        resume_from: Optimizer steps that the run has made before. What an interrupted process left at `path`.partial
            is kept up to there, and steps are numbered from there on; call `flush` whenever a checkpoint is written.

    Raises:
        GRITError: the model has no trainable parameter, `every` is below 1, or the file cannot be written.
    """
    ledger = GradientLedger(model, path, every, sample=sample, factors=factors, resume_from=resume_from)
    with ledger:
        yield ledger


class GradientLedger:
    """See `gradient_ledger`.

    Attributes:
        names: The watched tensors.
        steps: Optimizer steps of the run so far (a step that GradScaler skipped counts).
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str] | None = None,
        every: int = 1,
        *,
        sample: int = SAMPLE,
        factors: Any = None,
        resume_from: int = 0,
    ) -> None:
        if every < 1:
            raise GRITError(f"gradient_ledger: every = {every}; it must be at least 1")
        self.model, self.every, self._factors = model, every, factors
        self._owners = owners(model)
        self.names = list(self._owners)
        if not any(self._parameter(n).requires_grad for n in self.names):
            raise GRITError("gradient_ledger: the model has no trainable parameter: add the adapter first")
        self._parameters = [self._parameter(name) for name in self.names]
        self._replaced = 0
        trainable = [i for i, p in enumerate(self._parameters) if p.requires_grad]
        self._sample = spread(trainable, sample)
        small = (
            i for i in trainable if self._parameters[i].ndim == 2 and min(self._parameters[i].shape) <= LARGEST_RANK
        )
        self._structured = spread(list(small), STRUCTURE)
        self._shadows = Shadows({i: self._parameters[i] for i in self._sample})
        self._sketch = Sketcher(max(p.numel() for p in self._parameters))
        self._writer = RowWriter(path)
        self._last_raw: dict[int, Tensor] = {}
        self._lean, self._passes = True, 0
        self._pending: list[Any] = []
        self.steps = self._resumed_from = resume_from
        self._frames: list[dict[str, Any]] = []
        self._context = [timeline.LOOP]
        self._hooks = HookWatch(model)
        self._orphans = OrphanWatch(model)
        self._begin()

    def __enter__(self) -> GradientLedger:
        self.steps = self._resumed_from
        if not self._writer.open(self._resumed_from):
            self._writer.write([run_row(self.names, self._parameters, self._sample, self.every)])
        self._handles = [
            register_optimizer_step_pre_hook(self._optimizer_entry),
            register_optimizer_step_post_hook(self._optimizer_exit),
        ]
        self._interception = Interception(self)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._interception.remove()
        self._hooks.remove()
        for handle in self._handles:
            handle.remove()
        if kind is not None:
            self._writer.discard()
            return
        if self._now.over:
            self._close_step()
        self._drain(0)
        if report := factor_row(self.model, self._factors, self.steps):
            self._writer.write([report])
        self._writer.write([{"kind": "end", "step": self.steps}])
        self._writer.close()

    @property
    def path(self) -> Any:
        """The file, or None."""
        return self._writer.path

    def rows(self) -> list[dict[str, Any]]:
        """All rows, once the context is closed."""
        return self._writer.rows()

    def flush(self) -> None:
        """Put what is known of all finished steps on the disk: a run that is resumed from here loses none of them.

        A step whose gradients are still there is not finished: who changes them before they are cleared comes too late.
        """
        if self._now.over and all(p.grad is None for p in self._parameters):
            self._close_step()
        self._drain(0)
        self._writer.flush()

    @property
    def _seen(self) -> int:
        """Optimizer steps that this process has seen."""
        return self.steps - self._resumed_from

    # --- what the interceptions report ---------------------------------------------------------------------------

    def backward_begins(self) -> None:
        """Before a backward pass: whatever changed since the last one was not autograd."""
        if self._now.over:
            self._look("backward")
            self._close_step()
        elif self._now.pending is not None:
            self._resolve([p.grad for p in self._parameters], last=False)
        elif self._now.raw:
            now = self._now
            written = now.full and not same_stamps(now.stamps, stamps([p.grad for p in self._parameters]))
            self._look("backward")
            self._lean = self._lean and not written
        if not self._now.raw:
            if self._seen <= ORPHAN_STEP or self.steps in FACTOR_STEPS:
                self._hooks.look(self._parameters, lambda: self._now.unhooked)
            if any(p.grad is not None for p in self._parameters):
                self._look("backward")
                self._now.leftover = bool(self._now.full)
            self._now.unhooked = {}

    def backward_ended(self) -> None:
        """After a backward pass: these are the raw gradients."""
        grads = [self._now.unhooked.get(i, p.grad) for i, p in enumerate(self._parameters)]
        another = len(self._now.raw) + 1 < self._passes
        if self._now.full and self._may_skip() and another and not (self._now.unhooked or self._frames):
            self._postpone(grads)
            return
        probe = self._look("backward", timeline.AUTOGRAD, grads)
        self._now.raw.append(len(self._now.probes) - 1)
        self._keep_raw(grads, probe)
        if self._now.unhooked:
            self._look("gradient hooks", self._hooks.kind)
        if self._frames:  # a closure: the optimizer's own entry came too early
            self._frames[-1]["entry"] = len(self._now.probes) - 1
            self._shadows.before(self._frames[-1]["optimizer"])

    def _keep_raw(self, grads: list[Tensor | None], probe: Probe | None) -> None:
        self._now.raw_sample = {i: g.detach().clone() for i in self._sample if (g := grads[i]) is not None}
        if probe is None:
            self._now.raw_norm = torch.stack(torch._foreach_norm([g for g in grads if g is not None]))
        else:
            table = (probe.like or probe).table
            self._now.raw_norm = None if table is None else table[:, 1]

    def _may_skip(self) -> bool:
        return self._lean and self._seen >= FULL_STEPS

    def _postpone(self, grads: list[Tensor | None]) -> None:
        """After a backward pass that another will follow, as it did in the last step: fingerprints can wait."""
        missing = np.array([g is None for g in grads])
        now = self._now
        now.pending, now.lean = Probe(timeline.AUTOGRAD, "backward", None, missing), True
        now.stamps, now.check = stamps(grads), self._checksum(grads)
        now.probes.append(now.pending)
        now.raw.append(len(now.probes) - 1)

    def _resolve(self, grads: list[Tensor | None], *, last: bool) -> None:
        """Take what was postponed. Before another backward pass it is enough to know that nothing has changed."""
        now, pending = self._now, self._now.pending
        if pending is None:
            return
        now.pending = None
        if not self._compare(grads):  # written to where no fingerprints were taken
            self._lean, now.lost = False, True
        if last or now.lost:
            pending.table = None if pending.missing.all() else self._sketch(grads)
            pending.samples = self._structures(grads)
            self._keep_raw(grads, pending)

    def _compare(self, grads: list[Tensor | None]) -> bool:
        """Whether the gradients have the versions that they had at the last look; keeps what will prove it."""
        now = self._now
        if not same_stamps(now.stamps, stamps(grads)):
            return False
        now.checks.append((now.check, self._checksum(grads)))
        return True

    def _checksum(self, grads: list[Tensor | None]) -> Any:
        chosen = [g for i in self._structured if (g := grads[i]) is not None]
        return self._sketch.hashes(chosen) if chosen else None

    def _structures(self, grads: list[Tensor | None]) -> dict[int, Tensor]:
        return {i: g.detach().clone() for i in self._structured if (g := grads[i]) is not None}

    def clips(self, maximum: float | None, value: float | None) -> None:
        """Before clipping, by total norm or element-wise."""
        self._look("clip")
        self._now.clip_value = value
        if maximum is not None and np.isfinite(maximum):
            self._now.max_norm = min(maximum, self._now.max_norm or maximum)

    def unscales(self, inverse: Tensor) -> None:
        """Before GradScaler divides the gradients by its scale."""
        self._look("unscale")
        self._now.unscale = inverse

    def clears(self) -> None:
        """Before zero_grad."""
        self._look("zero_grad")

    def passed(self, who: str) -> None:
        """After any of them."""
        self._look(None, who)

    def event_begins(self, event: str, who: str) -> None:
        """Before a callback event that foreign callbacks listen to."""
        self._look(event)
        self._context.append(f"{event} ({who})")

    def event_ends(self, reads: int) -> None:
        """After it; `reads`: missing gradients that it read."""
        who = self._context.pop()
        self._look(None, who)
        if reads and self._now.stepped:
            self._now.late_reads[who] = self._now.late_reads.get(who, 0) + reads

    def scaler_stepped(self, stepped_before: bool) -> None:
        """After GradScaler.step: it may have skipped the optimizer."""
        self._now.skipped = not stepped_before and not self._now.stepped and bool(self._now.raw)

    @property
    def stepped(self) -> bool:
        """Whether an optimizer has moved parameters since the last backward pass."""
        return self._now.stepped

    @property
    def active(self) -> bool:
        """Whether a step is under way."""
        return bool(self._now.raw) or self._now.stepped

    # --- optimizer hooks -----------------------------------------------------------------------------------------

    def _optimizer_entry(self, optimizer: Optimizer, *_: Any) -> None:
        if GHOST in optimizer.__dict__:
            return
        self._read_parameters()
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        held = np.array([id(p) in ids for p in self._parameters])
        name = type(optimizer).__name__
        if held.any():
            for frame in self._frames:
                frame["innermost"] = False
        if not self._frames:
            self._orphans.look(self._seen, ids, self._parameters)
        self._look(f"step:{name}")
        self._context.append(f"{name}.step")
        frame = {
            "held": held,
            "innermost": True,
            "entry": len(self._now.probes) - 1,
            "name": name,
            "optimizer": optimizer,
            "before": None,
        }
        self._frames.append(frame)
        if held.any():
            if self._now.full:
                frame["before"] = self._sketch(self._parameters)
            self._shadows.before(optimizer)

    def _optimizer_exit(self, optimizer: Optimizer, *_: Any) -> None:
        if GHOST in optimizer.__dict__ or not self._frames:
            return
        frame = self._frames.pop()
        self._context.pop()
        if not frame["innermost"]:
            self._look("after", f"{frame['name']}.step")
            return
        held = frame["held"]
        self._now.entry[held] = frame["entry"]
        self._now.optimizers.append(frame["name"])
        if held.any():
            nested = any(f["optimizer"] is optimizer for f in self._frames)
            result = self._shadows.after(optimizer, self._raw_gradients(), self._now.clip_value, nested)
            if result is not None:
                self._now.shadows.append(result)
            if frame["before"] is not None:
                self._now.moved.append((held, frame["before"], self._sketch(self._parameters)))
        rates = [g["lr"] for g in optimizer.param_groups if "lr" in g]
        self._now.rates += [float(r) for r in rates if not (torch.is_tensor(r) and r.is_cuda)]
        self._now.stepped = True
        self._look("after", "optimizer")

    def _raw_gradients(self) -> dict[int, Tensor]:
        """The sample's unmodified gradients, unscaled and clipped as they would have been."""
        scale: Any = 1.0 if self._now.unscale is None else self._now.unscale
        if self._now.max_norm is not None and self._now.raw_norm is not None:
            norm = self._now.raw_norm.nan_to_num().norm() * scale
            scale = scale * (self._now.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return {i: (g * scale).to(g.dtype) for i, g in self._now.raw_sample.items()}

    # --- probes --------------------------------------------------------------------------------------------------

    def _look(self, moment: str | None, who: str | None = None, grads: list[Tensor | None] | None = None) -> Any:
        if not self._now.full:
            if (moment and moment.startswith("step:")) or who == timeline.AUTOGRAD:
                self._now.probes.append(Probe("", moment or "", None, np.zeros(0, dtype=bool)))
            return None
        now, grads = self._now, grads if grads is not None else [p.grad for p in self._parameters]
        last = now.probes[-1].moment if now.probes else ""
        moment = last if moment is None else moment
        self._resolve(grads, last=True)
        before = (now.probes[-1].like or now.probes[-1]) if now.probes else None
        same = before is not None and self._compare(grads)
        # What was postponed before a pass that then changed nothing has no fingerprints to share.
        if before is not None and same and self._may_skip() and (before.table is not None or before.missing.all()):
            probe = Probe(who or self._context[-1], moment, None, before.missing, like=before)
            now.lean = True
        else:
            missing = np.array([g is None for g in grads])
            table = None if missing.all() else self._sketch(grads)
            probe = Probe(who or self._context[-1], moment, table, missing, self._structures(grads))
            now.stamps, now.check = stamps(grads), self._checksum(grads)
        now.probes.append(probe)
        return probe

    def _begin(self) -> None:
        full = self._seen < 2 or self.steps % self.every == 0
        self._now = Step(full, np.full(len(self.names), -1))
        self._hooks.reset()

    def _close_step(self) -> None:
        """Start fetching what was seen, and begin the next step."""
        self.steps += 1
        now = self._now
        now.number = self.steps
        self._passes = len(now.raw)
        facts: dict[str, Any] = {
            "micro_steps": len(now.raw),
            "optimizer": "+".join(dict.fromkeys(now.optimizers)),
            "lr": [min(now.rates), max(now.rates)] if now.rates else None,
            "max_norm": now.max_norm,
            "skipped": now.skipped or None,
            "orphans": self._orphans.written or None,
            "replaced": self._replaced or None,
            "late_reads": now.late_reads or None,
            "shadow_problem": self._shadows.problem,
            "held": int((now.entry >= 0).sum()),
            "trainable": sum(p.requires_grad for p in self._parameters),
            **self._hooks.facts(),
        }
        now.facts = {k: v for k, v in facts.items() if v is not None}
        now.previous = self._last_raw
        self._last_raw = {**self._last_raw, **now.raw_samples()}
        now.fetch(cuda=self._parameters[0].is_cuda)
        self._pending.append(now)
        if self.steps in FACTOR_STEPS and (report := factor_row(self.model, self._factors, self.steps)):
            self._pending.append(report)
        self._begin()
        self._drain(1)

    def _drain(self, keep: int) -> None:
        while sum(isinstance(p, Step) for p in self._pending) > keep:
            item = self._pending.pop(0)
            self._writer.write(self._rows(item) if isinstance(item, Step) else [item])
        if keep == 0:
            self._writer.write(self._pending)
            self._pending = []

    def _rows(self, step: Step) -> list[dict[str, Any]]:
        data = step.data(len(self.names), self._sample)
        self._lean = self._lean and not step.mistaken
        return timeline.rows(data, self.names)

    # --- the model -----------------------------------------------------------------------------------------------

    def _parameter(self, name: str) -> nn.Parameter:
        module, key = self._owners[name]
        return module._parameters[key]  # type: ignore[return-value]

    def _read_parameters(self) -> None:
        """Look the parameters up again: something may have re-created them."""
        current = [self._parameter(name) for name in self.names]
        self._replaced += sum(a is not b for a, b in zip(self._parameters, current, strict=True))
        self._parameters = current
