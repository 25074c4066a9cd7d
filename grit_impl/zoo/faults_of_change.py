"""Faults in what becomes of a gradient: turned wrongly, or not delivered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.zoo.bench import Bench, Moments, Whitening
from grit_impl.zoo.cases import HUGGING_FACE, TORCH, fault
from grit_impl.zoo.kernels import HookedKFAC
from grit_impl.zoo.optimizers import Lion

# --- turned -------------------------------------------------------------------------------------------------------


@fault("sign-error-for-b", "against-the-gradient")
def _sign_b(bench: Bench) -> Moments:
    """B's preconditioned gradients are subtracted once too often."""
    return _flipped(bench, lambda name: "lora_B" in name)


@fault("sign-error-in-a-layer", "against-the-gradient")
def _sign_layer(bench: Bench) -> Moments:
    """Those of three modules are."""
    return _flipped(bench, lambda name: "layers.0.self_attn" in name and "o_proj" not in name)


def _flipped(bench: Bench, chosen: Callable[[str], bool]) -> Moments:
    white = Whitening(bench.lora)

    def write() -> None:
        white.apply()
        for name, p in bench.lora.items():
            if p.grad is not None and chosen(name):
                p.grad.neg_()

    return Moments(before_step=write)


@fault("scalar-that-changes", "scaled-only", "cancelled-by-optimizer", setting={"max_norm": 0.0})
def _scalars(bench: Bench) -> Moments:
    """Every step has a scalar of its own, another for each tensor."""
    generator = torch.Generator().manual_seed(bench.seed)

    def write() -> None:
        for p in bench.lora.values():
            if p.grad is not None:
                p.grad.mul_(float(1 + 4 * torch.rand((), generator=generator)))

    return Moments(before_step=write)


@fault("lion-divides-it-out", "cancelled-by-optimizer", trainers=("loop", "pure"), optimizers=("adamw",))
def _lion(bench: Bench) -> Moments:
    """A constant positive diagonal in front of a sign-based optimizer."""
    bench.make_optimizer = lambda b: Lion(list(b.lora.values()), lr=b.rate)
    generator = torch.Generator().manual_seed(bench.seed)
    scale = {n: 0.1 + 5 * torch.rand(p.shape, generator=generator) for n, p in bench.lora.items()}

    def write() -> None:
        for name, p in bench.lora.items():
            if p.grad is not None:
                p.grad.mul_(scale[name])

    return Moments(before_step=write)


@fault("blown-up-after-clipping", "blown-up", trainers=("loop", "trainer", "sft"), optimizers=TORCH)
def _blown_up(bench: Bench) -> Moments:
    """An inverse without normalisation, after clipping: a thousand times what clipping left."""
    white = Whitening(bench.lora)

    def write() -> None:
        white.apply()
        for p in bench.lora.values():
            if p.grad is not None:
                p.grad.mul_(1e3)

    bench.max_norm = 0.1
    return Moments(before_step=write)


@fault("steps-twice", "applied-twice", trainers=("loop", *HUGGING_FACE))
def _steps_too(bench: Bench) -> Moments:
    """A callback calls the optimizer's step, and then the training loop does."""
    white = Whitening(bench.lora)

    def step() -> None:
        white.apply()
        bench.built.step()

    return Moments(before_step=step)


@fault("called-twice", "applied-twice", trainers=("loop", *HUGGING_FACE), optimizers=TORCH)
def _called_twice(bench: Bench) -> Moments:
    """The preconditioner is called twice, and the second time takes its own result into its statistics."""
    white = Whitening(bench.lora)

    def both() -> None:
        white.apply()
        white.apply()

    return Moments(before_step=both)


# --- delivered ----------------------------------------------------------------------------------------------------


def _restoring(bench: Bench) -> tuple[Callable[[], None], Callable[..., None]]:
    """A preconditioner, and what puts back the gradients that it found."""
    white = Whitening(bench.lora)
    raw: dict[str, Tensor] = {}

    def write() -> None:
        raw.update({n: p.grad.clone() for n, p in bench.lora.items() if p.grad is not None})
        white.apply()

    def restore(*_: Any) -> None:
        for name, p in bench.lora.items():
            if p.grad is not None:
                p.grad.copy_(raw[name])

    return write, restore


@fault("restored-by-pre-hook", "overwritten", trainers=("loop", *HUGGING_FACE))
def _pre_hook(bench: Bench) -> Moments:
    """A hook on the optimizer's step puts the raw gradients back."""
    write, restore = _restoring(bench)
    return Moments(ready=lambda: bench.built.register_step_pre_hook(restore), before_step=write)


@fault("undone-by-the-next-callback", "overwritten", trainers=HUGGING_FACE)
def _callbacks(bench: Bench) -> Moments:
    """Two callbacks listen to the same event; the second undoes what the first did."""
    write, restore = _restoring(bench)
    bench.options["callbacks"] = [Moments(before_step=restore)]
    return Moments(before_step=write)


@fault("clipped-before-unscaling", "clipped-to-nothing", trainers=("loop",), optimizers=("sgd",))
def _clipped_scaled(bench: Bench) -> Moments:
    """Clipping sees gradients that are 65536 times too large, and unscaling then divides what it left."""
    bench.options |= {"scaler": True, "scale": 2.0**16}
    bench.max_norm = 0.0

    def clip() -> None:
        Whitening(bench.lora).apply()
        torch.nn.utils.clip_grad_norm_(list(bench.lora.values()), 1.0)

    return Moments(before_clip=clip)


@fault("hooks-that-write-nothing", "nothing-written")
def _silent_hooks(bench: Bench) -> Moments:
    """Hooks on peft's LoRA layers take statistics, and what should use them is never called."""
    from peft.tuners.lora import Linear

    sums: dict[Any, Tensor] = {}

    def take(module: Any, inputs: Any, output: Tensor) -> None:
        a = module.lora_A["default"].weight.detach() @ inputs[0].detach().flatten(0, -2).T
        sums[module] = sums.get(module, 0) + a @ a.T

    for module in bench.model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(take)
    return Moments()


@fault("written-to-a-copy-by-hooks", "nothing-written")
def _copies(bench: Bench) -> Moments:
    """A preconditioner that reports on nothing writes to clones."""
    kfac = HookedKFAC(bench.model, bench.lora)
    return Moments(before_step=lambda: kfac.apply(write=False))


# --- what was applied ---------------------------------------------------------------------------------------------


@fault("uninitialised-inverse", "unrelated-gradient", "against-the-gradient")
def _uninitialised(bench: Bench) -> Moments:
    """The inverse was never computed: what stands in its memory is applied."""
    generator = torch.Generator().manual_seed(bench.seed)
    memory = {n: torch.randn(4, 4, generator=generator) for n in bench.lora}

    def write() -> None:
        for name, p in bench.lora.items():
            if p.grad is not None:
                new = memory[name] @ p.grad if "lora_A" in name else p.grad @ memory[name]
                p.grad.copy_(new * p.grad.norm() / new.norm())

    return Moments(before_step=write)


@fault("swapped-factors", "swapped-factors", trainers=("hybrid", "pure"))
def _swapped(bench: Bench) -> Moments:
    """GRIT with the released code's pairing: each factor's inverse on the other side."""
    bench.options["grit"] = GRITConfig(kfac_update_freq=1, kfac_min_samples=4, pairing="released")
    return Moments()


@fault("dead-factor", "only-one-factor", "scaled-only")
def _dead(bench: Bench) -> Moments:
    """B's factor underflows to zero: its inverse is one over the damping, a number."""
    white = Whitening({n: p for n, p in bench.lora.items() if "lora_A" in n})

    def write() -> None:
        white.apply()
        for name, p in bench.lora.items():
            if p.grad is not None and "lora_B" in name:
                p.grad.mul_(1e3)

    bench.max_norm = 0.0
    return Moments(before_step=write)
