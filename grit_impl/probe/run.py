"""Callback compatibility probe: which events and hooks fire, in which order, for the installed versions.

A small random Llama is trained for a few steps by the stack that a hybrid run uses (SFTTrainer with plain peft, or
with Unsloth's kernels), while everything that could change a gradient is watched: the trainer's callback events, hooks
on modules and tensors, clipping, the optimizer. In `on_pre_optimizer_step` the gradients are rewritten and must be
found at the optimizer's entry, bit for bit. GRIT's own statistics are taken too, and compared with the gradients.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PrinterCallback, TrainerCallback

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError, RunFailed
from grit_impl.machine import versions
from grit_impl.probe.findings import FILE, Event, ProbeReport, Requirement
from grit_impl.recipes.arms import RunSpec, TrainingSettings
from grit_impl.record import RunRecord

if TYPE_CHECKING:
    from grit_impl.method.manager import GRITManager

STEPS, RANK = 20, 8
ENTRY, EXIT, CLIP, ZERO = "optimizer.step entered", "optimizer.step left", "gradients clipped", "zero_grad"
MOMENT = "on_pre_optimizer_step"


class _Watch(TrainerCallback):
    """Notes every event of every step; rewrites the gradients at the moment that counts."""

    def __init__(self, parameters: list[torch.nn.Parameter], manager: GRITManager) -> None:
        self.parameters, self.manager = parameters, manager
        self.steps: list[list[tuple[str, str]]] = []
        self.kinds: dict[str, str] = {}
        self.total: Counter[str] = Counter()
        self.equal: list[int] = []
        self.optimizer = ""
        self.problem = ""
        self._written: list[torch.Tensor | None] = []
        self._inside = False

    def expect(self, name: str, kind: str) -> None:
        """Something that may fire."""
        self.kinds.setdefault(name, kind)

    def note(self, name: str, kind: str) -> None:
        """It fired."""
        self.expect(name, kind)
        self.total[name] += 1
        if self._inside:
            there = sum(p.grad is not None for p in self.parameters)
            self.steps[-1].append((name, "none" if not there else "all" if there == len(self.parameters) else "some"))

    def noting(self, name: str, kind: str = "hook") -> Callable[..., None]:
        """A hook that notes its own call."""
        self.expect(name, kind)
        return lambda *_, **__: self.note(name, kind)

    def event(self, name: str) -> None:
        """A callback event."""
        if name == "on_step_begin":
            self.steps.append([])
            self._inside = True
        self.note(name, "callback")
        if name == MOMENT:
            self._rewrite()
        if name == "on_step_end":
            self._inside = False

    def _rewrite(self) -> None:
        try:
            self.manager.precondition()
        except GRITError as error:
            self.problem = self.problem or str(error)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(-0.5)
        self._written = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]

    def entered(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """At the optimizer's entry: is what was written still there, bit for bit?"""
        kind = type(optimizer)
        bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
        self.optimizer = f"{kind.__module__.partition('.')[0]} {kind.__name__}" + (f" ({bits} bit)" if bits else "")
        self.note(ENTRY, "call")
        pairs = zip(self.parameters, self._written, strict=False)
        self.equal.append(sum(g is not None and p.grad is not None and torch.equal(p.grad, g) for p, g in pairs))
        self._written = []


def _callback_method(name: str) -> Callable[..., None]:
    def method(self: _Watch, *_: Any, **__: Any) -> None:
        self.event(name)

    return method


CALLBACK_EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))
for _name in CALLBACK_EVENTS:
    setattr(_Watch, _name, _callback_method(_name))


def run_probe(training: TrainingSettings, *, unsloth: bool) -> ProbeReport:
    """Train a small random Llama and report what fired.

    Args:
        training: Optimizer, precision, checkpointing, batch and accumulation are taken from here.
        unsloth: With Unsloth's kernels; it has to be imported already.

    Raises:
        GRITError: the stack cannot be set up at all.
    """
    from grit_impl.method.manager import GRITManager

    with tempfile.TemporaryDirectory(prefix="grit-probe-") as name:
        folder = Path(name)
        spec = _spec(training, folder)
        trainer, model = _trainer(spec, folder, unsloth)
        parameters = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
        manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
        watch = _Watch(parameters, manager)
        trainer.add_callback(watch)
        with _watching(watch, trainer, model):
            trainer.train()
        manager.detach()
    return _report(watch, manager, "unsloth" if unsloth else "peft")


def _spec(training: TrainingSettings, folder: Path) -> RunSpec:
    base = "random:tiny"
    if torch.cuda.is_available():
        from grit_impl.recipes.random_base import save_random

        base = str(save_random(base, folder / "base"))
    small = replace(training, steps=STEPS, rank=RANK, alpha=RANK, save_every=0, report_to="")
    return RunSpec(arm="baseline", base_model=base, training=small)


def _trainer(spec: RunSpec, folder: Path, unsloth: bool) -> tuple[Any, Any]:
    from grit_impl.recipes import train
    from grit_impl.recipes.arms import find_arm
    from grit_impl.recipes.datasets import load_instructions
    from grit_impl.recipes.tokens import tokenize

    settings = spec.training
    model, tokenizer = train.build_model(spec, unsloth)
    examples = settings.steps * settings.batch_size * settings.accumulation
    data = tokenize(load_instructions(spec.dataset, "train", examples, spec.seed), tokenizer, settings.max_length)
    log = train.StepLog(RunRecord.create(folder / "record"))
    trainer, _ = train.build_trainer(find_arm(spec.arm), spec, model, tokenizer, data, folder, log)
    trainer.remove_callback(PrinterCallback)
    return trainer, model


@contextlib.contextmanager
def _watching(watch: _Watch, trainer: Any, model: Any) -> Iterator[None]:
    """Hooks on one LoRA layer and its tensors, on clipping, zero_grad and the optimizer."""
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A)
    a, b, short = layer.lora_A["default"], layer.lora_B["default"], name.rpartition(".")[2]
    watch.expect(MOMENT, "callback")
    handles = [
        layer.register_forward_hook(watch.noting(f"forward hook on {short}")),
        a.register_forward_hook(watch.noting(f"forward hook on {short}.lora_A")),
        b.register_forward_hook(watch.noting(f"forward hook on {short}.lora_B")),
        a.weight.register_hook(watch.noting("tensor hook on lora_A.weight")),
        b.weight.register_hook(watch.noting("tensor hook on lora_B.weight")),
        a.weight.register_post_accumulate_grad_hook(watch.noting("post-accumulate hook on lora_A.weight")),
        b.weight.register_post_accumulate_grad_hook(watch.noting("post-accumulate hook on lora_B.weight")),
        register_optimizer_step_pre_hook(watch.entered),
        register_optimizer_step_post_hook(watch.noting(EXIT, "call")),
    ]
    wrapped = ((trainer.accelerator, "clip_grad_norm_", CLIP), (model, "zero_grad", ZERO))
    for owner, attribute, event in wrapped:
        setattr(owner, attribute, _noted(getattr(owner, attribute), watch.noting(event, "call")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, attribute, _ in wrapped:
            delattr(owner, attribute)


def _noted(original: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    return call


def _report(watch: _Watch, manager: GRITManager, stack: str) -> ProbeReport:
    # Inside a run: the first step may set things up, the last one tears them down.
    steady = watch.steps[1:-1] or watch.steps
    reference = steady[-1] if steady else []
    first: dict[str, tuple[int, str]] = {}
    for name, gradients in reference:
        first.setdefault(name, (len(first) + 1, gradients))
    counts = [Counter(name for name, _ in step) for step in steady]
    events = []
    for name, kind in watch.kinds.items():
        order, gradients = first.get(name, (0, ""))
        times = [c[name] for c in counts] or [0]
        events.append(Event(name, kind, order, (min(times), max(times)), gradients, watch.total[name]))
    events.sort(key=lambda event: (event.order == 0, event.order))
    return ProbeReport(stack, watch.optimizer, versions(), tuple(events), _checks(watch, manager, events))


def _checks(watch: _Watch, manager: GRITManager, events: list[Event]) -> tuple[Requirement, ...]:
    by_name = {event.name: event for event in events}
    moment, entry = by_name[MOMENT], by_name.get(ENTRY)
    tensors, layers = len(watch.parameters), len(manager.layers)
    in_order = entry is not None and 0 < moment.order < entry.order
    clip = by_name[CLIP]
    report = manager.factor_report()
    counted, error = sum(row["samples"] > 0 for row in report["layers"]), report["completeness_error"]
    return (
        Requirement(
            "fires once per optimizer step",
            moment.per_step == (1, 1),
            f"{MOMENT}: {_times(moment.per_step)} per step",
        ),
        Requirement(
            "clipping < on_pre_optimizer_step < optimizer.step",
            in_order and (clip.order == 0 or clip.order < moment.order),
            f"places {clip.order or '-'}, {moment.order or '-'}, {entry.order if entry else '-'} in a step",
        ),
        Requirement(
            "gradients are ready at that moment", moment.gradients == "all", f"{moment.gradients or 'no'} LoRA tensors"
        ),
        Requirement(
            "what is written there enters the optimizer, bit for bit",
            bool(watch.equal) and min(watch.equal) == tensors,
            f"{min(watch.equal, default=0)} of {tensors} tensors, {watch.optimizer or 'no optimizer step seen'}",
        ),
        Requirement(
            "GRIT's statistics see every layer and add up to the gradients",
            not watch.problem and counted == layers and error is not None,
            watch.problem
            or f"{counted} of {layers} layers, completeness error {'unknown' if error is None else f'{error:.4f}'}",
        ),
    )


def _times(per_step: tuple[int, int]) -> str:
    least, most = per_step
    return str(least) if least == most else f"{least}-{most}"


def require_probe(path: Path, training: TrainingSettings, *, unsloth: bool) -> ProbeReport:
    """Run the probe before a hybrid run, unless the run's folder has one of these versions.

    Raises:
        RunFailed: a callback cannot precondition with these versions.
    """
    file = path / FILE
    found = ProbeReport.read(file) if file.is_file() else None
    if found is None or found.versions != versions():
        found = run_probe(training, unsloth=unsloth)
        found.write(file)
        # What follows has the process to itself: memory, and what Dynamo remembers of the small model's sizes, after
        # which Unsloth 2026.10 on torch 2.11 fails to compile a larger model's decoder layers, with GRIT or without.
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not found.good:
        wrong = "; ".join(f"{check.name}: {check.found}" for check in found.checks if not check.good)
        installed = ", ".join(f"{name} {found.versions[name]}" for name in ("transformers", "trl", "peft"))
        raise RunFailed(f"a callback cannot precondition here ({installed}): {wrong}")
    return found
