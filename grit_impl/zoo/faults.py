"""The faults: small honest sabotages of real runs, each with the cause that must be named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grit_impl.zoo.bench import Bench, Moments, Whitening
from grit_impl.zoo.cases import OPEN_ORDER, fault
from grit_impl.zoo.kernels import HookedKFAC, fuse
from grit_impl.zoo.optimizers import BufferSGD, KeepsGradients

CALLBACK_TRAINERS = ("trainer", "sft", "hybrid", "pure")


def _change(bench: Bench, new: Callable[[str, nn.Parameter, Tensor], Tensor | None]) -> Callable[[], None]:
    """Replace every gradient by new(name, parameter, gradient), in place."""

    def run() -> None:
        for name, p in bench.lora.items():
            if p.grad is not None and (value := new(name, p, p.grad)) is not None:
                p.grad.copy_(value)

    return run


@fault("late-after-step", "modified-too-late")
def _late(bench: Bench) -> Moments:
    """Preconditions after the optimizer step (the seed experiment's on_optimizer_step)."""
    return Moments(after_step=Whitening(bench.lora).apply)


@fault("late-after-clearing", "modified-too-late", trainers=CALLBACK_TRAINERS)
def _late_cleared(bench: Bench) -> Moments:
    """Preconditions in on_step_end, where the gradients are already gone."""
    kfac = HookedKFAC(bench.model, bench.lora)
    return Moments(step_end=kfac.apply)


@fault("late-new-gradient", "modified-too-late")
def _late_new(bench: Bench) -> Moments:
    """Writes the preconditioned gradient after clearing: it leaks into the next step's sum."""
    white = Whitening(bench.lora)
    kept: dict[str, Tensor] = {}

    def keep() -> None:
        kept.update({n: white.result(n, p.grad) for n, p in bench.lora.items() if p.grad is not None})

    def write() -> None:
        for name, p in bench.lora.items():
            if name in kept:
                p.grad = kept[name]

    return Moments(after_step=keep, step_end=write)


@fault("starved-fused-kernels", "starved")
def _fused(bench: Bench) -> Moments:
    """Fused LoRA kernels read the weights and never call the modules that hold the hooks."""
    kfac = HookedKFAC(bench.model, bench.lora)
    fuse(bench.model)
    return Moments(before_step=kfac.apply)


@fault("starved-hooks-elsewhere", "starved")
def _hooks_elsewhere(bench: Bench) -> Moments:
    """Hooks were put on a copy of the model; the preconditioner reports layers without samples."""
    kfac = HookedKFAC(copy.deepcopy(bench.model), bench.lora)
    bench.model._grit_manager = kfac
    return Moments(before_step=kfac.apply)


@fault("not-enough-samples", "not-ready")
def _few_samples(bench: Bench) -> Moments:
    """The factors never reach their minimum of samples; the preconditioner falls back to the identity."""
    kfac = HookedKFAC(bench.model, bench.lora, min_samples=10**6)
    bench.model._grit_manager = kfac
    return Moments(before_step=kfac.apply)


@fault("never-inverted", "not-ready")
def _never_inverted(bench: Bench) -> Moments:
    """The first inversion is due after the run's last step."""
    kfac = HookedKFAC(bench.model, bench.lora, every=1000)
    bench.model._grit_manager = kfac
    return Moments(before_step=kfac.apply)


@fault("written-to-a-copy", "nothing-written")
def _copy(bench: Bench) -> Moments:
    """Preconditions a clone of each gradient and drops it."""
    kfac = HookedKFAC(bench.model, bench.lora)
    bench.model._grit_manager = kfac
    return Moments(before_step=lambda: kfac.apply(write=False))


SCALED = {"sgd": ("scaled-only",)}


@fault("damping-drowns-factor", "cancelled-by-optimizer", per_optimizer=SCALED)
def _identity(bench: Bench) -> Moments:
    """Absolute damping far above the factors: a multiple of the identity, another for each tensor."""
    scales = {n: 2.0 + i % 5 for i, n in enumerate(bench.lora)}
    return Moments(before_step=_change(bench, lambda n, p, g: g * scales[n]))


@fault("constant-factor", "cancelled-by-optimizer", per_optimizer=SCALED)
def _constant(bench: Bench) -> Moments:
    """Multiplies every gradient by three."""
    return Moments(before_step=_change(bench, lambda n, p, g: 3 * g))


@fault("constant-diagonal", "cancelled-by-optimizer", optimizers=("adamw",))
def _diagonal(bench: Bench) -> Moments:
    """A constant positive diagonal: turns the gradient, and Adam divides it out again."""
    generator = torch.Generator().manual_seed(bench.seed)
    scale = {n: 0.1 + 5 * torch.rand(p.shape, generator=generator) for n, p in bench.lora.items()}
    return Moments(before_step=_change(bench, lambda n, p, g: g * scale[n]))


@fault("restored-after-clipping", "overwritten", trainers=OPEN_ORDER)
def _restored(bench: Bench) -> Moments:
    """Preconditions after backward; something puts the raw gradients back just before the step."""
    white = Whitening(bench.lora)
    raw: dict[str, Tensor] = {}

    def precondition() -> None:
        raw.update({n: p.grad.clone() for n, p in bench.lora.items() if p.grad is not None})
        white.apply()

    return Moments(before_clip=precondition, before_step=_change(bench, lambda n, p, g: raw[n]))


@fault("restored-by-optimizer", "overwritten")
def _restored_inside(bench: Bench) -> Moments:
    """A wrapping optimizer keeps gradients of its own and hands those to the inner one."""
    bench.make_optimizer = lambda b: KeepsGradients(b.standard(list(b.lora.values())))
    return Moments(ready=lambda: bench.built.watch(), before_step=Whitening(bench.lora).apply)


@fault("recomputed-by-closure", "overwritten", trainers=("loop",), optimizers=("adamw", "sgd"))
def _recomputed(bench: Bench) -> Moments:
    """The gradients are cleared and computed again after they were preconditioned."""
    white = Whitening(bench.lora)
    rows = torch.tensor([row["input_ids"] for row in bench.batches()[:2]])

    def again() -> None:
        white.apply()
        bench.model.zero_grad()
        with torch.enable_grad():
            bench.model(input_ids=rows, labels=rows).loss.backward()

    return Moments(before_clip=again)


@fault("writes-nan", "non-finite")
def _nan(bench: Bench) -> Moments:
    """An inverse of a singular factor: NaN in one layer, from the third step on."""
    white, count = Whitening(bench.lora), [0]
    victim = next(iter(bench.lora))

    def write() -> None:
        count[0] += 1
        white.apply()
        if count[0] >= 3 and (grad := bench.lora[victim].grad) is not None:
            grad.fill_(float("nan"))

    return Moments(before_step=write)


@fault("nan-replaced-by-zero", "non-finite", trainers=OPEN_ORDER)
def _nan_dropped(bench: Bench) -> Moments:
    """NaN is written, and replaced by zero before the step."""
    white = Whitening(bench.lora)

    def write() -> None:
        white.apply()
        for p in list(bench.lora.values())[:4]:
            if p.grad is not None:
                p.grad[0, 0] = float("nan")

    return Moments(before_clip=write, before_step=_change(bench, lambda n, p, g: g.nan_to_num()))


@fault("overflow-skipped", "non-finite", trainers=("loop",), optimizers=("adamw", "sgd"), setting={"accumulation": 1})
def _overflow(bench: Bench) -> Moments:
    """Under GradScaler, the preconditioned gradient overflows: the scaler skips every step."""
    bench.options["scaler"] = True
    return Moments(before_clip=_change(bench, lambda n, p, g: g * float("inf")))


@fault("cleared-before-step", "dropped")
def _cleared(bench: Bench) -> Moments:
    """zero_grad is called between preconditioning and the optimizer."""
    white = Whitening(bench.lora)

    def clear() -> None:
        white.apply()
        bench.model.zero_grad(set_to_none=False)

    return Moments(before_step=clear)


@fault("set-to-none", "dropped")
def _none(bench: Bench) -> Moments:
    """The preconditioned gradient goes to an attribute of its own and `.grad` is removed."""
    white = Whitening(bench.lora)

    def move() -> None:
        white.apply()
        for p in bench.lora.values():
            p.natural_grad, p.grad = p.grad, None  # type: ignore[attr-defined]

    return Moments(before_step=move)


@fault("on-micro-steps", "applied-on-micro-steps", setting={"accumulation": 4, "steps": 6})
def _micro(bench: Bench) -> Moments:
    """Preconditions the partial sum after every micro-batch."""
    apply = Whitening(bench.lora).apply
    return Moments(micro=apply, before_step=apply)


@fault("only-on-micro-steps", "applied-on-micro-steps")
def _only_micro(bench: Bench) -> Moments:
    """Preconditions in on_substep_end; the last micro-batch is added raw."""
    return Moments(micro=Whitening(bench.lora).apply)


@fault("applied-twice", "applied-twice", trainers=OPEN_ORDER)
def _twice(bench: Bench) -> Moments:
    """Both the trainer and a callback precondition, with the same factors."""
    white = Whitening(bench.lora)
    matrices: dict[str, Tensor] = {}

    def first() -> None:
        for name, p in bench.lora.items():
            if p.grad is not None:
                matrices[name] = white.matrix(name, p.grad)
                p.grad.copy_(white.product(name, p.grad, matrices[name]))

    second = _change(bench, lambda n, p, g: white.product(n, g, matrices[n]))
    return Moments(before_clip=first, before_step=second)


@fault("other-adapter", "wrong-parameters")
def _other_adapter(bench: Bench) -> Moments:
    """Writes to the gradients of an adapter that is not being trained."""
    from peft import LoraConfig

    bench.model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    others = {n: p for n, p in bench.model.named_parameters() if "lora_" in n and ".other." in n}

    def write() -> None:
        for p in others.values():
            p.grad = torch.randn_like(p)

    return Moments(before_step=write)


@fault("re-created-tensors", "wrong-parameters")
def _recreated(bench: Bench) -> Moments:
    """The model's LoRA tensors are replaced after the optimizer was built: it steps on the old ones."""
    white = Whitening({})

    def replace() -> None:
        for module in bench.model.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                module.weight = nn.Parameter(module.weight.detach().clone())
        white.parameters = bench.lora

    return Moments(ready=replace, before_step=white.apply)


@fault("stale-references", "wrong-parameters")
def _stale_references(bench: Bench) -> Moments:
    """The preconditioner holds the tensors of before a reload and writes its results there."""
    white = Whitening(bench.lora)
    for module in bench.model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.detach().clone())

    def write() -> None:
        for (name, old), p in zip(white.parameters.items(), bench.lora.values(), strict=True):
            if p.grad is not None:
                old.grad = white.result(name, p.grad)

    return Moments(before_step=write)


@fault("not-in-optimizer", "wrong-parameters")
def _not_held(bench: Bench) -> Moments:
    """The optimizer was built from half of the tensors that are preconditioned."""
    bench.make_optimizer = lambda b: b.standard(list(b.lora.values())[::2])
    return Moments(before_step=Whitening(bench.lora).apply)


@fault("one-layer-only", "only-some-layers")
def _one_layer(bench: Bench) -> Moments:
    """Only the modules of the first transformer layer are found."""
    return Moments(before_step=Whitening({n: p for n, p in bench.lora.items() if "layers.0." in n}).apply)


@fault("one-factor-only", "only-one-factor")
def _one_factor(bench: Bench) -> Moments:
    """B's gradients are never preconditioned."""
    return Moments(before_step=Whitening({n: p for n, p in bench.lora.items() if "lora_A" in n}).apply)


@fault("clipped-to-nothing", "clipped-to-nothing", setting={"max_norm": 1e-7})
def _clipped(bench: Bench) -> Moments:
    """max_grad_norm far below any gradient's norm."""
    return Moments(before_step=Whitening(bench.lora).apply)


@fault("learning-rate-zero", "learning-rate-zero", setting={"rate": 0.0})
def _no_rate(bench: Bench) -> Moments:
    """The learning rate is zero."""
    return Moments(before_step=Whitening(bench.lora).apply)


@fault("sign-error", "against-the-gradient")
def _sign(bench: Bench) -> Moments:
    """The preconditioned gradient is subtracted once too often."""
    white = Whitening(bench.lora)
    return Moments(before_step=_change(bench, lambda n, p, g: -white.result(n, g)))


@fault("last-steps-gradient", "stale-gradient")
def _stale(bench: Bench) -> Moments:
    """Writes what was computed from the step before."""
    white = Whitening(bench.lora)
    last: dict[str, Tensor] = {}

    def delayed(name: str, p: nn.Parameter, grad: Tensor) -> Tensor | None:
        old, last[name] = last.get(name), white.result(name, grad)
        return old

    return Moments(before_step=_change(bench, delayed))


@fault("frozen-gradient", "stale-gradient")
def _frozen(bench: Bench) -> Moments:
    """A cache is never refreshed: every step gets the first step's gradient."""
    white = Whitening(bench.lora)
    first: dict[str, Tensor] = {}
    return Moments(before_step=_change(bench, lambda n, p, g: first.setdefault(n, white.result(n, g))))


@fault("layers-mixed-up", "unrelated-gradient")
def _mixed(bench: Bench) -> Moments:
    """The gradient of each tensor is written to another layer's tensor of the same shape."""
    white = Whitening(bench.lora)
    names = list(bench.lora)
    swapped = {n: n.replace("layers.0", "layers.x").replace("layers.1", "layers.0") for n in names}
    swapped = {n: s.replace("layers.x", "layers.1") for n, s in swapped.items()}

    def write() -> None:
        new = {n: white.result(n, p.grad) for n, p in bench.lora.items() if p.grad is not None}
        _change(bench, lambda n, p, g: new.get(swapped[n]))()

    return Moments(before_step=write)


@fault("stops-after-overflow", "stopped", setting={"steps": 9})
def _stops(bench: Bench) -> Moments:
    """One bad step disables the preconditioner for good."""
    white, count = Whitening(bench.lora), [0]

    def write() -> None:
        count[0] += 1
        if count[0] <= 3:
            white.apply()

    return Moments(before_step=write)


@fault("update-undone", "update-undone")
def _undone(bench: Bench) -> Moments:
    """A snapshot of the parameters is restored after every step."""
    before = {n: p.detach().clone() for n, p in bench.lora.items()}

    def restore() -> None:
        for name, p in bench.lora.items():
            p.copy_(before[name])

    return Moments(before_step=Whitening(bench.lora).apply, step_end=restore)


@fault("optimizer-keeps-its-own", "not-consumed", optimizers=("sgd",))
def _own_gradients(bench: Bench) -> Moments:
    """The optimizer reads gradients from buffers filled during backward, not from `.grad`."""
    bench.make_optimizer = lambda b: BufferSGD(list(b.lora.values()), lr=b.rate)
    return Moments(ready=lambda: bench.built.watch(), before_step=Whitening(bench.lora).apply)


@fault("moved-by-someone-else", "update-unexplained", trainers=("loop",), optimizers=("adamw", "sgd"))
def _moved(bench: Bench) -> Moments:
    """Another hook on the optimizer overwrites the parameters during the step."""
    white = Whitening(bench.lora)

    def hook() -> None:
        def jump(*_: Any) -> None:
            with torch.no_grad():
                for p in bench.lora.values():
                    p.add_(torch.randn_like(p), alpha=1e-2)

        bench.built.register_step_post_hook(jump)

    return Moments(ready=hook, before_step=white.apply)


@fault("never-cleared", "accumulated-across-steps", trainers=("loop",), optimizers=("adamw", "sgd"))
def _never_cleared(bench: Bench) -> Moments:
    """zero_grad is missing: preconditioned gradients are added to the next step's."""
    bench.options["keep_gradients"] = True
    return Moments(before_step=Whitening(bench.lora).apply)


@fault("no-torch-optimizer", "no-steps", trainers=("loop",), optimizers=("sgd",))
def _by_hand(bench: Bench) -> Moments:
    """The parameters are moved by hand: no optimizer ever sees them."""
    white = Whitening(bench.lora)
    bench.make_optimizer = lambda b: None

    def step() -> None:
        white.apply()
        for p in bench.lora.values():
            if p.grad is not None:
                p.sub_(p.grad, alpha=bench.rate)

    return Moments(before_step=step)
