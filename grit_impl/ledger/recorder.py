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
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from grit_impl.errors import GRITError
from grit_impl.ledger import timeline
from grit_impl.ledger.applied import Explainer, Witness
from grit_impl.ledger.interception import Interception
from grit_impl.ledger.observer import FACTOR_STEPS, Observer
from grit_impl.ledger.rows import RowWriter, factor_row, run_row
from grit_impl.ledger.step import Step
from grit_impl.ledger.watches import spread

SAMPLE = 16
EARLY, FOLLOWED = 8, 4
"""Steps in which the whole sample is shadowed, and how many tensors of it from then on."""
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
        GRITError: the model has no trainable parameter, its parameters are sharded, `every` is below 1, or the file
            cannot be opened. Nothing is raised from then on.
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
        super().__init__(model, sample)
        self.every, self._factors = every, factors
        self._writer = RowWriter(path)
        self._resumed_from = resume_from
        self._start()

    def _start(self) -> None:
        self.steps, self.problem, self._replaced = self._resumed_from, None, 0
        self._last_raw: dict[int, Tensor] = {}
        self._pending: list[Any] = []
        self._frames, self._masters, self._instance_hooks = [], {}, {}
        self._left, self._in_backward, self._in_closure = None, False, False
        self._begin()

    def __enter__(self) -> GradientLedger:
        self._start()
        if not self._writer.open(self._resumed_from):
            self._writer.write([self._run_row()])
        self._handles = [
            register_optimizer_step_pre_hook(self._guard._optimizer_entry),
            register_optimizer_step_post_hook(self._guard._optimizer_exit),
        ]
        # In front of everybody else's: what they do to gradients is seen apart.
        _global_optimizer_pre_hooks.move_to_end(self._handles[0].id, last=False)  # type: ignore[attr-defined]
        self._witness, self._explainer = Witness(self._pairs(), self._guard.wrap), Explainer()
        self._interception = Interception(self._guard)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._interception.remove()
        self._hooks.remove()
        self._witness.remove()
        for handle in (*self._handles, *self._instance_hooks.values()):
            handle.remove()
        for base, step, hooked in self._hooked_bases:
            if vars(base).get("step") is hooked:
                base.step = step
        self._hooked_bases = []
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
        self._writer.write([{"kind": "end", "step": self.steps, "weights": self._weights()}])
        self._writer.close()

    def _weights(self) -> list[str]:
        """Hashes of the parameters, in the order of `names`."""
        self._read_parameters()
        table = self._looks.fingerprint(self._parameters).table
        return [] if table is None else timeline.hexes(table.cpu().numpy())

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
        self._looks.begin(self._trained, full=full)
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
            "orphans": self._orphans.written or None,
            "replaced": self._replaced or None,
            "late_reads": now.late_reads or None,
            "shadow_problem": self._shadows.problem,
            "held": int((now.entry >= 0).sum()),
            "trainable": sum(p.requires_grad for p in self._parameters),
            "foreign": now.foreign or None,
            "masters": len(self._masters) or None,
            **self._hooks.facts(),
        }
        now.facts = {k: v for k, v in facts.items() if v is not None}
        now.previous = self._last_raw
        self._last_raw = {**self._last_raw, **now.raw_samples()}
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
