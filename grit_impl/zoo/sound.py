"""The sound variants: runs in order, which must not be flagged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grit_impl.config import GRITConfig
from grit_impl.zoo.bench import Bench, Moments, Whitening, whitened
from grit_impl.zoo.cases import OPEN_ORDER, SOUND, Case, sound
from grit_impl.zoo.kernels import HookedKFAC, fuse
from grit_impl.zoo.optimizers import Lion

PLAIN, EFFECTIVE = ("no-modifier",), ("effective",)
CONFIG = GRITConfig(kfac_update_freq=1, kfac_min_samples=4)


def _register(id: str, causes: tuple[str, ...], text: str, build: Callable[[Bench], Moments], **options: Any) -> None:
    SOUND.append(Case(id, causes, text, build, **options))


def _plain(_: Bench) -> Moments:
    return Moments()


def _options(inner: Callable[[Bench], Moments], **options: Any) -> Callable[[Bench], Moments]:
    def build(bench: Bench) -> Moments:
        bench.options |= options
        return inner(bench)

    return build


def _optimizer(inner: Callable[[Bench], Moments], make: Callable[[Bench], Any]) -> Callable[[Bench], Moments]:
    def build(bench: Bench) -> Moments:
        bench.make_optimizer = make
        return inner(bench)

    return build


_register("plain", PLAIN, "Plain LoRA.", _plain)
_register("plain-unclipped", PLAIN, "Clipping off.", _plain, setting={"max_norm": 0.0}, trainers=OPEN_ORDER)
_register("plain-tight-clipping", PLAIN, "Clipping at every step.", _plain, setting={"max_norm": 1e-3})
_register("plain-no-accumulation", PLAIN, "One micro-batch a step.", _plain, setting={"accumulation": 1})
_register("plain-accumulation-8", PLAIN, "Eight micro-batches a step.", _plain, setting={"accumulation": 8, "steps": 4})
_register("plain-warm-up", PLAIN, "The first step's learning rate is zero.", _plain, setting={"warmup": 3})
_register("effective", EFFECTIVE, "A preconditioner at the right moment.", whitened)
_register("effective-unclipped", EFFECTIVE, "The same without clipping.", whitened, setting={"max_norm": 0.0})
_register(
    "effective-tight-clipping", EFFECTIVE, "The same, clipped at every step.", whitened, setting={"max_norm": 1e-2}
)
_register("effective-no-accumulation", EFFECTIVE, "One micro-batch a step.", whitened, setting={"accumulation": 1})
_register("effective-accumulation-4", EFFECTIVE, "Four.", whitened, setting={"accumulation": 4, "steps": 6})
_register("effective-accumulation-8", EFFECTIVE, "Eight.", whitened, setting={"accumulation": 8, "steps": 4})
_register("effective-warm-up", EFFECTIVE, "With warm-up.", whitened, setting={"warmup": 3})
_register("effective-sampled", EFFECTIVE, "The ledger looks at every third step.", whitened, ledger={"every": 3})
_register("effective-small-sample", EFFECTIVE, "Only four tensors are shadowed.", whitened, ledger={"sample": 4})

_register(
    "grad-scaler",
    PLAIN,
    "bf16 autocast with GradScaler.",
    _options(_plain, scaler=True),
    trainers=("loop",),
    optimizers=("adamw", "sgd"),
)
_register(
    "grad-scaler-effective",
    EFFECTIVE,
    "The same with a preconditioner after unscaling.",
    _options(whitened, scaler=True),
    trainers=("loop",),
    optimizers=("adamw", "sgd"),
)
_register(
    "gradients-zeroed-in-place",
    EFFECTIVE,
    "zero_grad(set_to_none=False).",
    _options(whitened, set_to_none=False),
    trainers=("loop",),
)
_register(
    "clipped-by-value",
    PLAIN,
    "Element-wise clipping.",
    _options(_plain, clip=lambda p, m: torch.nn.utils.clip_grad_value_(p, 1e-4)),
    trainers=("loop",),
)
_register(
    "clipped-by-hand",
    PLAIN,
    "Norm clipping written out in the loop.",
    _options(_plain, clip=lambda p, m: _clip_by_hand(p, 1e-3)),
    trainers=("loop",),
)
for _name, _make in {
    "adagrad": lambda b: torch.optim.Adagrad(list(b.lora.values()), lr=b.rate),
    "rmsprop": lambda b: torch.optim.RMSprop(list(b.lora.values()), lr=b.rate),
    "nadam": lambda b: torch.optim.NAdam(list(b.lora.values()), lr=b.rate),
    "adamax": lambda b: torch.optim.Adamax(list(b.lora.values()), lr=b.rate),
    "weight-decay": lambda b: torch.optim.AdamW(list(b.lora.values()), lr=b.rate, weight_decay=0.1),
    "adafactor": lambda b: torch.optim.Adafactor(list(b.lora.values()), lr=b.rate),
    "amsgrad": lambda b: torch.optim.AdamW(list(b.lora.values()), lr=b.rate, amsgrad=True, foreach=False),
    "someone-elses-optimizer": lambda b: Lion(list(b.lora.values()), lr=b.rate),
    "lora-plus-groups": lambda b: torch.optim.AdamW(_loraplus(b), lr=b.rate),
}.items():
    _register(
        f"{_name}-effective",
        EFFECTIVE,
        "Another optimizer.",
        _optimizer(whitened, _make),
        optimizers=("adamw",),
        trainers=("loop", "pure"),
    )
    _register(
        f"{_name}-plain", PLAIN, "The same.", _optimizer(_plain, _make), optimizers=("adamw",), trainers=("loop",)
    )


@sound("checkpointing", *EFFECTIVE)
def _checkpointing(bench: Bench) -> Moments:
    """Gradient checkpointing, not reentrant."""
    bench.model.gradient_checkpointing_enable({"use_reentrant": False})
    bench.model.enable_input_require_grads()
    bench.model.train()
    return whitened(bench)


@sound("checkpointing-reentrant", *EFFECTIVE)
def _reentrant(bench: Bench) -> Moments:
    """Reentrant checkpointing: backward passes inside the backward pass."""
    bench.options["arguments"] = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    bench.model.gradient_checkpointing_enable({"use_reentrant": True})
    bench.model.enable_input_require_grads()
    bench.model.train()
    return whitened(bench)


@sound("before-clipping", *EFFECTIVE, trainers=OPEN_ORDER)
def _before_clipping(bench: Bench) -> Moments:
    """Preconditions in an overridden training_step, before clipping."""
    return Moments(before_clip=Whitening(bench.lora).apply)


@sound("statistics-on-micro-steps", *EFFECTIVE)
def _micro_statistics(bench: Bench) -> Moments:
    """Reads, but does not write, the gradients after every micro-batch."""
    white = Whitening(bench.lora)

    def read() -> None:
        for name, p in bench.lora.items():
            if p.grad is not None:
                white.matrix(name, p.grad)

    return Moments(micro=read, before_step=white.apply)


@sound("observers", *PLAIN)
def _observers(bench: Bench) -> Moments:
    """Callbacks that log gradient norms before and after the step."""
    norms: list[float] = []

    def log() -> None:
        norms.extend(float(p.grad.norm()) for p in bench.lora.values() if p.grad is not None)

    return Moments(micro=log, before_step=log, after_step=log, step_end=log)


@sound("effective-with-observers", *EFFECTIVE)
def _observed(bench: Bench) -> Moments:
    """The same beside a preconditioner."""
    moments = _observers(bench)
    moments.before_step = Whitening(bench.lora).apply
    return moments


@sound("tensor-hooks", *EFFECTIVE)
def _tensor_hooks(bench: Bench) -> Moments:
    """A fixed preconditioner in tensor hooks: linear, so it may run on every micro-batch."""
    generator = torch.Generator().manual_seed(bench.seed)
    for name, p in bench.lora.items():
        root = torch.randn(4, 4, generator=generator)
        matrix = root @ root.T + 0.1 * torch.eye(4)
        p.register_hook(lambda g, n=name, m=matrix: m @ g if "lora_A" in n else g @ m)  # type: ignore[no-untyped-call]
    return Moments()


@sound("post-accumulate-hooks", *EFFECTIVE, setting={"accumulation": 1})
def _post_accumulate(bench: Bench) -> Moments:
    """A preconditioner in post-accumulate hooks, without accumulation."""
    white = Whitening(bench.lora)

    def hook(name: str) -> Callable[[Tensor], None]:
        def write(p: Tensor) -> None:
            if p.grad is not None:
                p.grad.copy_(white.result(name, p.grad))

        return write

    for name, p in bench.lora.items():
        p.register_post_accumulate_grad_hook(hook(name))  # type: ignore[no-untyped-call]
    return Moments()


@sound("frozen-layers", *EFFECTIVE)
def _frozen(bench: Bench) -> Moments:
    """One transformer layer is frozen on purpose."""
    for name, p in bench.lora.items():
        if "layers.0." in name:
            p.requires_grad_(False)
    return whitened(bench)


@sound("frozen-factor", *EFFECTIVE)
def _frozen_a(bench: Bench) -> Moments:
    """LoRA-FA: A is frozen on purpose."""
    for name, p in bench.lora.items():
        if "lora_A" in name:
            p.requires_grad_(False)
    return whitened(bench)


@sound("two-adapters", *EFFECTIVE)
def _two_adapters(bench: Bench) -> Moments:
    """A second adapter is loaded and left alone."""
    from peft import LoraConfig

    bench.model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    return whitened(bench)


@sound("bf16-parameters", *EFFECTIVE, optimizers=("adamw", "sgd"))
def _bf16(bench: Bench) -> Moments:
    """Everything in bfloat16."""
    bench.rate = 1.0 if bench.optimizer == "sgd" else 1e-2  # smaller steps of SGD round to nothing
    bench.model.to(torch.bfloat16)
    return whitened(bench)


@sound("weights-bounded", *PLAIN)
def _bounded(bench: Bench) -> Moments:
    """A constraint on the weights after every step."""

    def bound() -> None:
        for p in bench.lora.values():
            p.copy_(torch.renorm(p, 2, 0, 0.5))

    return Moments(after_step=bound)


@sound("weights-averaged", *EFFECTIVE)
def _averaged(bench: Bench) -> Moments:
    """An average of the weights is kept beside them."""
    average = {n: p.detach().clone() for n, p in bench.lora.items()}

    def follow() -> None:
        for name, p in bench.lora.items():
            average[name].lerp_(p, 0.1)

    return Moments(before_step=Whitening(bench.lora).apply, after_step=follow)


@sound("two-modifiers", *EFFECTIVE, trainers=OPEN_ORDER)
def _two(bench: Bench) -> Moments:
    """A preconditioner, then gradient noise: two different changes in one step."""

    def noise() -> None:
        for p in bench.lora.values():
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p.grad) * p.grad.std() * 0.3)

    return Moments(before_clip=Whitening(bench.lora).apply, before_step=noise)


@sound("starts-late", *EFFECTIVE)
def _starts_late(bench: Bench) -> Moments:
    """The factors become ready in the fourth step."""
    kfac = HookedKFAC(bench.model, bench.lora, min_samples=BATCHES_UNTIL_READY)
    bench.model._grit_manager = kfac
    return Moments(before_step=kfac.apply)


@sound("fused-with-capture", *EFFECTIVE)
def _fused(bench: Bench) -> Moments:
    """Fused kernels, and a preconditioner that needs no hooks."""
    fuse(bench.model)
    return whitened(bench)


@sound("resumed", *EFFECTIVE, optimizers=("adamw", "sgd"))
def _resumed(bench: Bench) -> Moments:
    """The optimizer starts from a checkpoint's state."""

    def make(b: Bench) -> Any:
        first = Bench("loop", b.optimizer, b.seed, steps=3)
        first.train(whitened(first))
        state = copy.deepcopy(first.built.state_dict())
        for name, p in b.lora.items():
            p.data.copy_(first.lora[name].data)
        optimizer = b.standard(list(b.lora.values()))
        optimizer.load_state_dict(state)
        return optimizer

    bench.make_optimizer = make
    return whitened(bench)


@sound("two-optimizers", *EFFECTIVE, trainers=("loop",), optimizers=("adamw", "sgd"))
def _two_optimizers(bench: Bench) -> Moments:
    """A and B have an optimizer each."""
    bench.make_optimizer = lambda b: b.standard([p for n, p in b.lora.items() if "lora_A" in n])
    second = bench.standard([p for n, p in bench.lora.items() if "lora_B" in n])

    def step() -> None:
        Whitening(bench.lora).apply()
        second.step()

    return Moments(before_step=step)


@sound("closure", *EFFECTIVE, trainers=("loop",), optimizers=("adamw", "sgd"))
def _closure(bench: Bench) -> Moments:
    """The optimizer calls a closure that runs backward and preconditions."""
    white = Whitening(bench.lora)
    rows = torch.tensor([row["input_ids"] for row in bench.batches()[:2]])

    class WithClosure(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            bench.model.zero_grad()
            with torch.enable_grad():
                bench.model(input_ids=rows, labels=rows).loss.backward()
            white.apply()
            return super().step()

    bench.make_optimizer = lambda b: WithClosure(list(b.lora.values()), lr=b.rate)
    return Moments()


def _grit(id: str, config: GRITConfig, text: str) -> None:
    """GRIT itself, pure and hybrid."""

    def build(bench: Bench) -> Moments:
        bench.options["grit"] = config
        return Moments()

    _register(id, EFFECTIVE, text, build, trainers=("hybrid", "pure"))


_grit("grit", CONFIG, "GRIT as it is.")
_grit(
    "grit-reprojection", GRITConfig(kfac_update_freq=1, kfac_min_samples=4, reprojection_freq=3, reprojection_k=3), ""
)
_grit("grit-regularised", GRITConfig(kfac_update_freq=1, kfac_min_samples=4, lambda_kfac=1e-3), "With its regulariser.")
_grit("grit-not-renormalised", GRITConfig(kfac_update_freq=1, kfac_min_samples=4, renormalise="none"), "Norms change.")

BATCHES_UNTIL_READY = 3 * 2 * 2 * 24


def _loraplus(bench: Bench) -> list[dict[str, Any]]:
    a = [p for n, p in bench.lora.items() if "lora_A" in n]
    b = [p for n, p in bench.lora.items() if "lora_B" in n]
    return [{"params": a}, {"params": b, "lr": 16 * bench.rate}]


def _clip_by_hand(parameters: list[nn.Parameter], limit: float) -> None:
    grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    for grad in grads:
        grad.mul_(min(1.0, limit / float(norm)))
