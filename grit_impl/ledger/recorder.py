"""The gradient ledger: what happened to every gradient between backward and the optimizer, seen from outside.

    with gradient_ledger(model, path="ledger.jsonl.gz") as ledger:
        trainer.train()
    judge_ledger(ledger)

It uses torch's global optimizer hooks and, while the context is open, stands in front of the few functions that every
training loop passes through: `torch.autograd.backward` and `grad`, clipping, GradScaler, `zero_grad`, and the callback
events of transformers. A trainer needs to know nothing of it and cannot avoid it. All device work is batched, and a
step's results are fetched while the next step runs.

It never ends or changes a training: an exception of its own ends the observation (`GradientLedger.problem`), and the
verdict is then undecided.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from grit_impl.errors import GRITError
from grit_impl.ledger import timeline
from grit_impl.ledger.applied import Explainer, Witness
from grit_impl.ledger.interception import Guarded, Interception
from grit_impl.ledger.observer import Observer
from grit_impl.ledger.rows import RowWriter, factor_row, run_row
from grit_impl.ledger.step import Step
from grit_impl.ledger.stepping import EARLY, FACTOR_STEPS, FOLLOWED, LOOKED_INTO
from grit_impl.ledger.structure import Memory
from grit_impl.ledger.watches import access, sharded, spread

SAMPLE = 16
_log = logging.getLogger(__name__)


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
        sample: Tensors whose optimizer is shadowed, in the first eight steps; four of them in every step.
        factors: Object with a `factor_report()` (see GRITManager); found at `model._grit_manager` if there is one.
        resume_from: Optimizer steps that the run has made before. What an interrupted process left at `path`.partial
            is kept up to there, and steps are numbered from there on; call `flush` whenever a checkpoint is written.

    Raises:
        GRITError: the model's parameters are sharded, `every` is below 1, or the file cannot be opened. Nothing is
            raised from then on; a model that cannot be watched gets an undecided verdict.
    """
    ledger = GradientLedger(model, path, every, sample=sample, factors=factors, resume_from=resume_from)
    with ledger:
        yield ledger


class GradientLedger(Observer):
    """See `gradient_ledger`."""

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
        if kind := sharded(model):
            raise GRITError(f"gradient_ledger: the parameters are sharded ({kind}); no process sees a whole gradient")
        self.every, self._factors = every, factors
        self._writer = RowWriter(path)
        self._resumed_from = resume_from
        self._undo: list[Callable[[], None]] = []
        self._unwatchable: str | None = None
        self._pending: list[Any] = []
        self._guard = Guarded(self)
        self.names, self._parameters, self._sample, self.steps = [], [], [], resume_from
        try:
            super().__init__(model, sample)
        except Exception as error:
            self.names, self._parameters, self._sample = [], [], []
            self._unwatchable = f"the model cannot be watched: {type(error).__name__}: {error}".replace("\n", " ")
        self.problem = self._unwatchable

    def __enter__(self) -> GradientLedger:
        kept = self._writer.open(self._resumed_from)
        self.problem = self._unwatchable
        if self.problem is None:
            self._guard._install()
        if not kept:
            self._writer.write([self._run_row()])
        return self

    def _install(self) -> None:
        """Everything that the ledger puts into the process, each with the way back."""
        self._reset()
        self.steps = self._resumed_from
        self._pending = []
        self._last = Memory()
        self._begin()
        self._undo += [self._layers.remove, self._hooks.remove, self._leave_optimizers]
        # In front of everybody else's: what they do to gradients is seen apart.
        before = register_optimizer_step_pre_hook(self._guard._optimizer_entry)
        self._undo.append(before.remove)
        _global_optimizer_pre_hooks.move_to_end(before.id, last=False)  # type: ignore[attr-defined]
        after = register_optimizer_step_post_hook(self._guard._optimizer_exit)
        self._undo.append(after.remove)
        _global_optimizer_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._witness, self._explainer = Witness(self._pairs(), self._guard.wrap), Explainer()
        self._undo.append(self._witness.remove)
        self._layers.open(self._guard.wrap)
        self._undo.append(Interception(self._guard).remove)

    def _leave_optimizers(self) -> None:
        for handle in (*self._instance_hooks.values(), *self._exit_hooks.values()):
            handle.remove()
        for base, step, hooked in self._hooked_bases:
            if vars(base).get("step") is hooked:
                base.step = step
        self._hooked_bases = []

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._unwatchable is None:
            access.ignore(self._listener)
        for undo in reversed(self._undo):
            with contextlib.suppress(Exception):
                undo()
        self._undo = []
        if kind is not None:
            self._writer.discard()
            return
        self._guard._finish()
        if self.problem is not None:
            self._guard_the_file()

    def _finish(self) -> None:
        if self._now.over:
            self._close_step()
        self._drain(0)
        if report := factor_row(self.model, self._factors, self.steps):
            self._writer.write([report])
        self._writer.write([{"kind": "end", "step": self.steps, **self._weights()}])
        self._writer.close()

    def _weights(self) -> dict[str, Any]:
        """Hashes of the parameters, in the order of `names`, and what was done to them after the last step."""
        self._read_parameters()
        look = self._looks.fingerprint(self._parameters)
        if look.table is None:
            return {}
        found: dict[str, Any] = {"weights": timeline.hexes(look.table.cpu().numpy())}
        kept = None if self._stand_ins else self._kept.look(look, self._left)
        if kept is not None and not kept.isnan().all():
            found["kept"] = [[timeline.short(v) for v in row] for row in kept.tolist()]
        return found

    def _guard_the_file(self) -> None:
        """After a failure: what was seen before, and what went wrong."""
        try:
            self._writer.write([self._problem_row(), {"kind": "end", "step": self.steps}])
            self._writer.close()
        except Exception as error:
            _log.warning("gradient ledger: %s", error)
            self._writer.discard()

    def fail(self, where: str, error: Exception) -> None:
        """As the base's, and says so."""
        super().fail(where, error)
        _log.warning("gradient ledger: stopped looking in step %d, %s", self.steps + 1, self.problem)
        self._pending = []

    def _problem_row(self) -> dict[str, Any]:
        return {"kind": "problem", "step": self.steps, "text": self.problem}

    def _run_row(self) -> dict[str, Any]:
        return run_row(self.names, self._parameters, self._sample, self.every)

    @property
    def path(self) -> Any:
        """The file, or None."""
        return self._writer.path

    def rows(self) -> list[dict[str, Any]]:
        """All rows, once the context is closed."""
        if self.problem is not None and (self.path is None or not self.path.is_file()):
            return [self._run_row(), self._problem_row()]
        return self._writer.rows()

    def flush(self) -> None:
        """Put what is known of all finished steps on the disk: a run that is resumed from here loses none of them.

        A step whose gradients are still there is not finished: who changes them before they are cleared comes too late.
        """
        self._guard._flush()

    def _flush(self) -> None:
        if self._now.over and all(p.grad is None for p in self._parameters):
            self._close_step()
        self._drain(0)
        self._writer.flush()

    # --- steps ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        full = self._looks.seen < 2 or self.steps % self.every == 0
        self._trained = self._trained | np.array([p.requires_grad for p in self._parameters])
        now = self._looks.begin(self._trained, full=full)
        now.structured = self._looks.seen < EARLY or (self.steps + 1) % LOOKED_INTO == 0
        self._reads = 0
        self._hooks.reset()

    def _close_step(self) -> None:
        """Start fetching what was seen, and begin the next step."""
        self.steps += 1
        self._looks.seen += 1
        now = self._now
        now.number = self.steps
        self._looks.usual_passes = len(now.raw)
        for i in np.flatnonzero(self._trained).tolist():
            if not self._parameters[i].requires_grad:
                now.why.setdefault(i, "frozen")
        facts: dict[str, Any] = {
            "micro_steps": len(now.raw),
            "passes": now.passes if now.passes != len(now.raw) else None,
            "optimizer": "+".join(dict.fromkeys(now.optimizers)),
            "lr": [min(now.rates), max(now.rates)] if now.rates else None,
            "max_norm": now.max_norm,
            "skipped": now.skipped or None,
            "orphans": self._memory.orphans or None,
            "left_behind": self._memory.kept or None,
            "dead_hooks": self._memory.dead_hooks or None,
            "matrices": self._memory.matrices or None,
            "idle": [self.names[i] for i in self._memory.idle if now.entry[i] < 0] or None,
            "repeated": [self.names[i] for i in sorted(self._hooks.repeated)] or None,
            "read": now.read or None,
            "again": [self.names[i] for i in now.again] or None,
            "replaced": self._replaced or None,
            "late_reads": now.late_reads or None,
            "shadow_problem": self._shadows.problem,
            "held": int((now.entry >= 0).sum()),
            "trainable": sum(p.requires_grad for p in self._parameters),
            "foreign": now.foreign or None,
            "stand_ins": len(self._stand_ins) or None,
            **self._hooks.facts(),
        }
        now.facts = {k: v for k, v in facts.items() if v is not None}
        now.previous = self._last.by_age() if now.structured else {}
        self._last.add(now.raw_samples())
        now.witness = self._witness.take()
        now.fetch(cuda=self._parameters[0].is_cuda)
        self._pending.append(now)
        if self.steps in FACTOR_STEPS and (report := factor_row(self.model, self._factors, self.steps)):
            self._pending.append(report)
        if self._looks.seen == EARLY:
            self._shadows.followed = self._looks.sample = spread(self._sample, FOLLOWED)
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
        self._looks.lean = self._looks.lean and not step.mistaken
        return timeline.rows(data, self.names, self._explainer)
