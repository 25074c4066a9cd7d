"""What the ledger does when something happens: a backward pass, clipping, a callback, an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from grit_impl.errors import GRITError
from grit_impl.ledger import timeline, watches
from grit_impl.ledger.fingerprints import Look
from grit_impl.ledger.interception import Guarded
from grit_impl.ledger.looks import Looks
from grit_impl.ledger.shadow import GHOST, Shadows, foreign
from grit_impl.ledger.step import Step, same_stamps, stamps

STRUCTURE = 4
# Above it a matrix is no LoRA factor, and its inner products would cost more than the step.
LARGEST_RANK = 512
FACTOR_STEPS = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000}


class Observer:
    """Watches the tensors of one model.

    Args:
        model: It.
        sample: Tensors whose optimizer is shadowed.

    Attributes:
        names: The watched tensors.
        steps: Optimizer steps of the run so far (a step that GradScaler skipped counts).
        problem: What went wrong in the ledger, which then stopped looking; None: nothing.

    Raises:
        GRITError: nothing is trained, or parameters are sharded.
    """

    def __init__(self, model: nn.Module, sample: int) -> None:
        self.model = model
        self._owners = watches.owners(model)
        self.names = list(self._owners)
        if not any(self._parameter(n).requires_grad for n in self.names):
            raise GRITError("gradient_ledger: the model has no trainable parameter: add the adapter first")
        if kind := watches.sharded(model):
            raise GRITError(f"gradient_ledger: the parameters are sharded ({kind}); no process sees a whole gradient")
        self._parameters = [self._parameter(name) for name in self.names]
        self._trained = np.array([p.requires_grad for p in self._parameters])
        trainable = np.flatnonzero(self._trained).tolist()
        self._sample = watches.spread(trainable, sample)
        small = (
            i for i in trainable if self._parameters[i].ndim == 2 and min(self._parameters[i].shape) <= LARGEST_RANK
        )
        self._structured = watches.spread(list(small), STRUCTURE)
        self._looks = Looks(self._parameters, self._structured, list(self._sample))
        self._shadows = Shadows({i: self._parameters[i] for i in self._sample})
        self.problem: str | None = None
        self._guard = Guarded(self)
        self._layers = watches.LayerWatch(model, self._owners)
        self._hooks = watches.HookWatch(model, self._guard.wrap)
        self._orphans = watches.OrphanWatch(model)
        self.steps = self._replaced = 0
        self._left: Look | None = None
        self._left_stamps: list[Any] = []
        self._left_check: Any = None
        self._masters: dict[int, Tensor] = {}
        self._frames: list[dict[str, Any]] = []
        self._instance_hooks: dict[int, Any] = {}
        self._hooked_bases: list[tuple[Any, Any, Any]] = []
        self._in_backward = self._in_closure = False

    def _pairs(self) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
        """Layer -> (lora_A, A, B), for those whose structure is looked at."""
        places, found = {name: i for i, name in enumerate(self.names)}, {}
        for name in (self.names[i] for i in self._structured):
            b = places.get(name.replace(".lora_A.", ".lora_B."))
            if ".lora_A." in name and b is not None:
                module, _ = self._owners[name]
                found[name.partition(".lora_")[0]] = (module, self._parameter(name), self._parameters[b])
        return found

    def fail(self, where: str, error: Exception) -> None:
        """An exception of the ledger's own: the training goes on, unobserved."""
        self.problem = f"{where.lstrip('_')}: {type(error).__name__}: {error}".replace("\n", " ")
        self._frames, self._left = [], None

    def _close_step(self) -> None:
        """The step is over: write down what was seen, and begin the next one."""
        raise NotImplementedError

    @property
    def _now(self) -> Step:
        return self._looks.now

    # --- what the interceptions report ---------------------------------------------------------------------------

    def backward_begins(self) -> None:
        """Before a backward pass: whatever changed since the last one was not autograd."""
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
            if looks.seen <= watches.ORPHAN_STEP or self.steps in FACTOR_STEPS:
                self._hooks.look(self._parameters, lambda: self._now.unhooked)
            if any(g is not None for g in grads):
                looks.look("backward", grads=grads)
                self._now.leftover = bool(self._now.full)
            self._now.unhooked = {}
        if self._frames and not self._in_closure:
            self._frames[-1]["computes"] = True
        self._now.before_pass = stamps(grads)
        self._in_backward = True

    def backward_ended(self) -> None:
        """After a backward pass: these are the raw gradients, if it touched any."""
        self._in_backward = False
        now, looks = self._now, self._looks
        now.passes += 1
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
        if now.unhooked:
            looks.look("gradient hooks", self._hooks.kind)
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
        held = np.isin(np.arange(len(self.names)), list(now.inside))
        now.entry[held], now.stepped_on = len(now.probes) - 1, now.stepped_on + held
        if now.full:
            places = range(len(self.names))
            before = looks.fingerprint([now.inside[i][2] if i in now.inside else None for i in places], self._left)
            after = looks.fingerprint([now.inside_after.get(i) for i in places], before, distances=True)
            now.moved.append((held, before.table, after.table))
            self._left = after
        now.stepped = True

    def grad_returned(self, inputs: Any, grads: Any) -> None:
        """After `torch.autograd.grad`: if it was asked for gradients of these tensors, they are the raw ones."""
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
        places = {id(p): i for i, p in enumerate(self._parameters)}
        found = {
            places[id(x)]: g.detach()
            for x, g in zip(given, grads, strict=True)
            if id(x) in places and isinstance(g, Tensor)
        }
        if not found:
            return
        if self._now.over:
            self._looks.look("backward")
            self._close_step()
        now = self._now
        if now.raw and not now.manual:  # a backward pass has filled `.grad`: this is somebody's statistics
            return
        now.manual = {**now.manual, **{i: now.manual[i] + g if i in now.manual else g for i, g in found.items()}}
        sums = [now.manual.get(i) for i in range(len(self._parameters))]
        self._looks.raw(sums, self._looks.look("backward", timeline.AUTOGRAD, sums))
        now.why = self._layers.absent()

    def _forget(self) -> None:
        """What was seen of this step was a trial: a closure begins again, or gradients that nobody used."""
        now = self._now
        now.probes, now.raw, now.manual, now.pending, now.restart = [], [], {}, None, False
        now.stamps = []

    def clips(self, maximum: Any, norm_type: Any, value: Any) -> None:
        """Before clipping, by total norm or element-wise."""
        self._looks.look("clip")
        self._now.clip_value = None if value is None else float(value)
        limit = float("inf") if maximum is None or float(norm_type) != 2.0 else float(maximum)
        if np.isfinite(limit):
            self._now.max_norm = min(limit, self._now.max_norm or limit)

    def unscales(self, scaler: Any) -> None:
        """Before GradScaler divides the gradients by its scale."""
        self._looks.look("unscale")
        scale = getattr(scaler, "_scale", None)
        self._now.unscale = None if scale is None else scale.reciprocal()

    def clears(self) -> None:
        """Before zero_grad."""
        self._looks.look("zero_grad")

    def passed(self, who: str) -> None:
        """After any of them."""
        self._looks.look(None, who)

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

    # --- optimizer hooks -----------------------------------------------------------------------------------------

    def _optimizer_entry(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Before any other hook of this step."""
        if GHOST in optimizer.__dict__:
            return None
        self._hooked_bases += watches.hook_bases(type(optimizer))
        self._read_parameters()
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        held = np.array([id(p) in ids for p in self._parameters])
        if self._in_backward:
            self._enter_inside(optimizer, np.flatnonzero(held).tolist())
            return None
        if not held.any():
            held = self._find_masters(optimizer, ids, held)
        if held.any():
            for outer in self._frames:
                outer["innermost"] = False
        if not self._frames:
            self._orphans.look(self._looks.seen, ids, self._parameters)
        name = type(optimizer).__name__
        if self._now.passes and not self._now.raw and held.any():  # nothing arrived: this is what backward left
            grads = self._looks.gradients()
            self._looks.raw(grads, self._looks.look("backward", timeline.AUTOGRAD, grads))
            self._now.why = self._layers.absent()
        self._looks.look(f"step:{name}")
        frame: dict[str, Any] = {"held": held, "innermost": True, "name": name, "optimizer": optimizer, "before": None}
        self._frames.append(frame)
        if len(_global_optimizer_pre_hooks) + len(optimizer._optimizer_step_pre_hooks) == 1:
            return self._optimizer_ready(optimizer, args, kwargs)
        self._looks.context.append("step pre-hook")
        frame["hooks"] = True
        if old := self._instance_hooks.pop(id(optimizer), None):
            old.remove()
        self._instance_hooks[id(optimizer)] = optimizer.register_step_pre_hook(self._guard._optimizer_ready)
        return None

    def _find_masters(self, optimizer: Optimizer, ids: set[int], held: Any) -> Any:
        """Tensors that the optimizer holds in the place of the model's, as in mixed precision with float32 copies."""
        if not self._masters and self._now.raw and self._looks.seen <= watches.ORPHAN_STEP:
            self._masters = watches.masters(optimizer, self._parameters, np.flatnonzero(self._trained).tolist())
            self._shadows.sample |= {i: q for i, q in self._masters.items() if i in self._shadows.sample}
        return np.array([id(self._masters.get(i)) in ids for i in range(len(held))])

    def _optimizer_ready(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """After all other hooks: this is what the optimizer is given."""
        if GHOST in optimizer.__dict__ or not self._frames or self._frames[-1]["optimizer"] is not optimizer:
            return None
        frame, looks = self._frames[-1], self._looks
        if frame.pop("hooks", None):
            looks.look(f"step:{frame['name']}")
            looks.context.pop()
        grads = [self._held(i).grad for i in range(len(self.names))]
        if self._now.manual or self._masters:
            looks.look(f"step:{frame['name']}", grads=grads)
        looks.context.append(f"{frame['name']}.step")
        frame["entry"], frame["missing"] = len(looks.now.probes) - 1, np.array([g is None for g in grads])
        if frame["held"].any():
            if looks.now.full:
                frame["before"] = self._parameters_now()
            self._shadows.before(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None
        looks.lean = False  # it may evaluate a step several times
        watched = self._watched(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _parameters_now(self) -> Look:
        """A look at the parameters; the last one where nobody has written to them since, as their versions say."""
        looks = self._looks
        values = [self._held(i) for i in range(len(self.names))]
        if self._left is not None and looks.may_skip() and same_stamps(self._left_stamps, stamps(values)):
            now = looks.fingerprint.hashes([values[i] for i in self._structured])
            if now.is_cuda:
                self._now.checks.append((self._left_check, now))
                self._now.lean = True
                return self._left
            if torch.equal(self._left_check, now):
                return self._left
        return looks.fingerprint(values, self._left, distances=True)

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            self._guard._closure_begins()
            result = closure()
            self._guard._closure_ended()
            return result

        return watched

    def _closure_begins(self) -> None:
        self._now.restart = self._in_closure = True

    def _closure_ended(self) -> None:
        self._in_closure = False
        if self._frames and not self._now.restart:  # it ran a backward pass
            frame = self._frames[-1]
            self._looks.look(f"step:{frame['name']}")
            frame["entry"] = len(self._now.probes) - 1
            frame["missing"] = np.array([p.grad is None for p in self._parameters])
            self._shadows.before(frame["optimizer"])
        self._now.restart = False

    def _optimizer_exit(self, optimizer: Optimizer, *_: Any) -> None:
        if GHOST in optimizer.__dict__:
            return
        if self._in_backward:
            self._leave_inside(optimizer)
            return
        if not self._frames:
            return
        frame = self._frames.pop()
        self._looks.context.pop()
        now, looks = self._now, self._looks
        if not frame["innermost"]:
            looks.look("after", f"{frame['name']}.step")
            return
        held = frame["held"]
        now.entry[held & (now.entry < 0)] = frame["entry"]
        now.stepped_on = now.stepped_on + (held & ~frame["missing"])
        now.optimizers.append(frame["name"])
        now.foreign = now.foreign or foreign(optimizer)
        if frame.get("computes"):
            self._shadows.problem = f"{frame['name']} cannot be shadowed: its step runs backward passes of its own"
        if held.any():
            nested = any(f["optimizer"] is optimizer for f in self._frames)
            result = self._shadows.after(optimizer, self._raw_gradients(), now.clip_value, nested)
            if result is not None:
                now.shadows.append(result)
            if frame["before"] is not None:
                now.left = None if self._left is None else self._left.table
                values = [self._held(i) for i in range(len(self.names))]
                after = looks.fingerprint(values, frame["before"], distances=True)
                before = frame["before"].table
                if frame["before"] is self._left:  # nothing happened to them since
                    before = before.clone()
                    before[:, timeline.PREVIOUS] = 0
                now.moved.append((held, before, after.table))
                self._left, self._left_stamps = after, stamps(values)
                self._left_check = self._looks.fingerprint.hashes([values[i] for i in self._structured])
        self._read_rates(optimizer)
        now.stepped = True
        looks.look("after", "optimizer")

    def _read_rates(self, optimizer: Optimizer) -> None:
        places = {id(self._held(i)): i for i in range(len(self.names))}
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, int | float) or (isinstance(rate, Tensor) and not rate.is_cuda):
                self._now.rates.append(float(rate))
                if float(rate) == 0:
                    self._now.rate_zero[[places[id(p)] for p in group["params"] if id(p) in places]] = True

    def _enter_inside(self, optimizer: Optimizer, held: list[int]) -> None:
        for i in held:
            p = self._parameters[i]
            if p.grad is not None:
                raw = self._now.unhooked.get(i, p.grad).detach().clone()
                self._now.inside[i] = (raw, p.grad.detach().clone(), p.detach().clone())
                self._now.raw_sample[i] = raw
        self._shadows.before(optimizer)

    def _leave_inside(self, optimizer: Optimizer) -> None:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for i, p in enumerate(self._parameters):
            if id(p) in ids and i in self._now.inside:
                self._now.inside_after[i] = p.detach().clone()
        result = self._shadows.after(optimizer, self._now.raw_sample, self._now.clip_value)
        if result is not None:
            self._now.shadows.append(result)
        self._now.optimizers.append(type(optimizer).__name__)
        self._read_rates(optimizer)

    def _raw_gradients(self) -> dict[int, Tensor]:
        """The sample's unmodified gradients, unscaled and clipped as they would have been."""
        scale: Any = 1.0 if self._now.unscale is None else self._now.unscale
        if self._now.max_norm is not None and self._now.raw_norm is not None:
            norm = self._now.raw_norm.nan_to_num().norm() * scale
            scale = scale * (self._now.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return {i: (g * scale).to(g.dtype) for i, g in self._now.raw_sample.items()}

    # --- the model -----------------------------------------------------------------------------------------------

    def _parameter(self, name: str) -> Any:
        module, key = self._owners[name]
        return module._parameters[key]

    def _held(self, i: int) -> Tensor:
        """What the optimizer holds for a parameter."""
        held: Tensor = self._masters.get(i, self._parameters[i])
        return held

    def _read_parameters(self) -> None:
        """Look the parameters up again: something may have re-created them."""
        pairs = [(self._parameter(name), old) for name, old in zip(self.names, self._parameters, strict=True)]
        current = [old if new is None else new for new, old in pairs]
        self._replaced += sum(a is not b for a, b in zip(self._parameters, current, strict=True))
        self._parameters[:] = current  # the looks share this list
