"""What the ledger does at an optimizer's step: what the optimizer finds, what it leaves, and whether it follows."""

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
from grit_impl.ledger.watches import access
from grit_impl.ledger.watches.kept import KeptWatch

STRUCTURE = 4
# Above it a matrix is no LoRA factor, and its inner products would cost more than the step.
LARGEST_RANK = 512
FACTOR_STEPS = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000}
EARLY, FOLLOWED = 8, 4
"""Steps in which the whole sample is shadowed, and how many tensors of it from then on."""
LOOKED_INTO = 4
"""From then on what was applied is looked into at every so manieth step."""
READS = 6
"""Most foreign reads of a step that are looks."""


class Stepping:
    """Watches the tensors of one model.

    Args:
        model: It.
        sample: Tensors whose optimizer is shadowed.

    Attributes:
        names: The watched tensors.
        steps: Optimizer steps of the run so far (a step that GradScaler skipped counts).
        problem: What went wrong in the ledger, which then stopped looking; None: nothing.

    Raises:
        GRITError: parameters are sharded.
    """

    def __init__(self, model: nn.Module, sample: int) -> None:
        self.model = model
        self._owners = watches.owners(model)
        self.names = list(self._owners)
        self._parameters = [self._parameter(name) for name in self.names]
        self._trained = np.array([p.requires_grad for p in self._parameters], dtype=bool)
        self._frozen = not self._trained.any()
        self._trained |= self._frozen  # if nothing is trained, all of it should have been
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
        lora = (p for n, p in zip(self.names, self._parameters, strict=True) if "lora_" in n and p.ndim == 2)
        # A square tensor's gradients look like statistics.
        ranks = {min(p.shape) for p in lora if p.shape[0] != p.shape[1]}
        self._memory = watches.MemoryWatch(model, ranks - {1})
        self._listener = self._guard.wrap(self._accessed, "read of a gradient")
        self._reset()

    def _reset(self) -> None:
        """As before the first step."""
        self.steps = self._replaced = self._passes = 0
        self._places = {id(p): i for i, p in enumerate(self._parameters)}
        self._copies, self._over = watches.CopyWatch(), watches.PassWatch()
        self._kept, self._reads, self._looking = KeptWatch(len(self.names)), 0, False
        self._left: Look | None = None
        self._left_stamps: list[Any] = []
        self._left_check: Any = None
        self._stand_ins: dict[int, watches.StandIn] = {}
        self._frames: list[dict[str, Any]] = []
        self._instance_hooks: dict[int, Any] = {}
        self._exit_hooks: dict[int, Any] = {}
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
        access.ignore(self._listener)

    def _close_step(self) -> None:
        """The step is over: write down what was seen, and begin the next one."""
        raise NotImplementedError

    @property
    def _now(self) -> Step:
        return self._looks.now

    def _inspects(self) -> bool:
        """Whether this is one of the steps in which hooks are looked for, and foreign reads are looks."""
        return self._looks.seen < EARLY or self.steps in FACTOR_STEPS

    def _listen(self) -> None:
        """From here to the optimizer's entry each foreign read of a gradient that was written to is a look."""
        if self._now.full and self._inspects() and not access.compiled():
            self._now.read = True
            self._over.begin()
            access.listen(self._listener)

    def _accessed(self, parameter: Any, grad: Tensor | None, assigned: bool) -> None:
        if self._looking or self._shadows.running:
            return
        i = self._places.get(id(parameter))
        if i is None and self._looks.seen < watches.MEMORY_STEP:
            self._memory.read[id(parameter)] = parameter
        if i is None or grad is None or not self._now.stamps:
            return
        self._over.access(i, grad)
        if self._reads >= READS:
            return
        seen = self._now.stamps[i]
        if seen is None or seen[0]() is not grad or seen[1] != grad._version:
            self._reads, self._looking = self._reads + 1, True
            try:
                self._looks.look(None)
            finally:
                self._looking = False

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
        if not held.all():
            held |= self._find_stand_ins(optimizer, held)
        if held.any():
            for outer in self._frames:
                outer["innermost"] = False
        if not self._frames:
            self._looking = True  # it reads gradients itself
            self._memory.look(self._looks.seen, ids, self._parameters, self)
            self._looking = False
        name = type(optimizer).__name__
        if (
            self._now.passes and not self._now.raw and (held.any() or self._frozen)
        ):  # nothing arrived: this is what backward left
            grads = self._looks.gradients()
            self._looks.raw(grads, self._looks.look("backward", timeline.AUTOGRAD, grads))
            self._now.why = self._layers.absent()
        self._looks.look(f"step:{name}")
        frame: dict[str, Any] = {"held": held, "innermost": True, "name": name, "optimizer": optimizer, "before": None}
        self._frames.append(frame)
        self._leave_before_others(optimizer)
        if len(_global_optimizer_pre_hooks) + len(optimizer._optimizer_step_pre_hooks) == 1:
            return self._optimizer_ready(optimizer, args, kwargs)
        self._looks.context.append("step pre-hook")
        frame["hooks"] = True
        if old := self._instance_hooks.pop(id(optimizer), None):
            old.remove()
        self._instance_hooks[id(optimizer)] = optimizer.register_step_pre_hook(self._guard._optimizer_ready)
        return None

    def _leave_before_others(self, optimizer: Optimizer) -> None:
        """Where others have hooks that run after the step, ours comes first: what they do is too late."""
        hooks: Any = optimizer._optimizer_step_post_hooks
        if hooks and not self._left_early(optimizer):
            handle = self._exit_hooks[id(optimizer)] = optimizer.register_step_post_hook(self._guard._leave)
            hooks.move_to_end(handle.id, last=False)

    def _left_early(self, optimizer: Optimizer) -> bool:
        handle = self._exit_hooks.get(id(optimizer))
        return handle is not None and handle.id in optimizer._optimizer_step_post_hooks

    def _find_stand_ins(self, optimizer: Optimizer, held: Any) -> Any:
        """Tensors that the optimizer holds in the place of the model's; those that a parameter still follows."""
        theirs = {id(q): q for group in optimizer.param_groups for q in group["params"]}
        for i, known in list(self._stand_ins.items()):
            if id(known.tensor) in theirs and not known.follows(self._parameters[i]):
                del self._stand_ins[i]
        if self._now.raw and self._looks.seen <= watches.MEMORY_STEP:
            models = {id(p) for p in self.model.parameters()}
            others = [q for k, q in theirs.items() if k not in models]
            missing = np.flatnonzero(self._trained & ~held).tolist()
            if others and missing and not any(i in self._stand_ins for i in missing):
                elsewhere = watches.optimized()  # a twin's optimizer has nothing to do with this model
                missing = [i for i in missing if id(self._parameters[i]) not in elsewhere]
                self._stand_ins |= watches.stand_ins(others, self._parameters, missing)
                whole = {i: s.tensor for i, s in self._stand_ins.items() if s.tensor.shape == s.shape}
                self._shadows.sample |= {i: q for i, q in whole.items() if i in self._shadows.sample}
        return np.array([i in self._stand_ins and id(self._stand_ins[i].tensor) in theirs for i in range(len(held))])

    def _optimizer_ready(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """After all other hooks: this is what the optimizer is given."""
        if GHOST in optimizer.__dict__ or not self._frames or self._frames[-1]["optimizer"] is not optimizer:
            return None
        frame, looks = self._frames[-1], self._looks
        access.ignore(self._listener)
        if frame.pop("hooks", None):
            looks.look(f"step:{frame['name']}")
            looks.context.pop()
        if self._now.read:
            again = self._over.again([p.grad for p in self._parameters])
            self._now.again = sorted({*self._now.again, *again})
        grads = [(self._stand_ins.get(i) or p).grad for i, p in enumerate(self._parameters)]
        if self._now.manual or self._stand_ins:
            looks.look(f"step:{frame['name']}", grads=grads)
        if self._now.manual:  # what nobody has made a `.grad` has not arrived
            for probe in self._now.probes:
                probe.missing = probe.missing | (frame["held"] & np.array([g is None for g in grads]))
        looks.context.append(f"{frame['name']}.step")
        frame["entry"], frame["missing"] = len(looks.now.probes) - 1, np.array([g is None for g in grads])
        if frame["held"].any():
            if looks.now.full:
                frame["before"] = self._parameters_now()
                if frame["before"] is not self._left:
                    self._compare_with_left(frame["before"])
            self._shadows.before(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None
        looks.lean = False  # it may evaluate a step several times
        watched = self._watched(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _compare_with_left(self, now: Look) -> None:
        kept, before = self._kept.look(now, self._left), self._now.kept
        if kept is not None:
            self._now.kept = kept if before is None else torch.where(kept.isnan(), before, kept)

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
        # What the first closure finds was done before the step; what a later one finds, by the closure before it.
        frame = self._frames[-1] if self._frames else {}
        self._now.restart = "passes" in frame
        if not (self._now.restart or self._now.over):
            self._now.before_closure = len(self._now.probes)
        frame["passes"], self._in_closure = self._passes, True

    def _closure_ended(self) -> None:
        self._in_closure = False
        access.ignore(self._listener)
        if self._frames and self._frames[-1].get("passes") != self._passes:  # it ran a backward pass
            frame = self._frames[-1]
            self._looks.look(f"step:{frame['name']}")
            frame["entry"] = len(self._now.probes) - 1
            frame["missing"] = np.array([p.grad is None for p in self._parameters])
            self._shadows.before(frame["optimizer"])
        self._now.restart = False

    def _optimizer_exit(self, optimizer: Optimizer, *_: Any) -> None:
        """After all other hooks of this step."""
        if GHOST in optimizer.__dict__:
            return
        if self._left_early(optimizer):
            self._looks.look(None, "step post-hook")
        else:
            self._leave(optimizer)

    def _leave(self, optimizer: Optimizer, *_: Any) -> None:
        """Before any other hook that comes after this step."""
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
        self._layers.reset()
        now.stepped = True
        looks.look("after", "optimizer")

    def _read_rates(self, optimizer: Optimizer) -> None:
        held = {i: id(self._stand_ins[i].tensor if i in self._stand_ins else p) for i, p in enumerate(self._parameters)}
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, int | float) or (isinstance(rate, Tensor) and not rate.is_cuda):
                self._now.rates.append(float(rate))
                if float(rate) == 0:
                    still = set(map(id, group["params"]))
                    self._now.rate_zero |= np.array([held[i] in still for i in held])

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

    def _parameter(self, name: str) -> Any:
        module, key = self._owners[name]
        return module._parameters[key]

    def _held(self, i: int) -> Tensor:
        """What the optimizer holds for a parameter."""
        return self._stand_ins[i].value if i in self._stand_ins else self._parameters[i]

    def _read_parameters(self) -> None:
        """Look the parameters up again: something may have re-created them."""
        pairs = [(self._parameter(name), old) for name, old in zip(self.names, self._parameters, strict=True)]
        current = [old if new is None else new for new, old in pairs]
        replaced = sum(a is not b for a, b in zip(self._parameters, current, strict=True))
        if replaced:
            if kind := watches.sharded(self.model):
                raise GRITError(f"the parameters were sharded ({kind}); no process sees a whole gradient")
            self._replaced += replaced
            self._parameters[:] = current  # the looks share this list
            self._places = {id(p): i for i, p in enumerate(current)}
