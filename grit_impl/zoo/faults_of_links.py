"""More faults, by the link of the chain that they break: kinds that a list of patterns had missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grit_impl.config import GRITConfig
from grit_impl.zoo.bench import Bench, Moments, Whitening
from grit_impl.zoo.cases import fault
from grit_impl.zoo.kernels import HookedKFAC
from grit_impl.zoo.optimizers import Lion

TORCH = ("adamw", "sgd")
HUGGING_FACE = ("trainer", "sft")
LATE = 4


def _white(bench: Bench) -> Moments:
    return Moments(before_step=Whitening(bench.lora).apply)


def _at(step: int, action: Callable[[], Any]) -> Callable[[], None]:
    """Do something once, when called for the step-th time."""
    count = [0]

    def run() -> None:
        count[0] += 1
        if count[0] == step:
            action()

    return run


# --- used ---------------------------------------------------------------------------------------------------------


@fault("adapter-switched", "not-used", setting={"steps": 10})
def _switched(bench: Bench) -> Moments:
    """Another adapter becomes the active one in mid-run; the optimizer holds the first one's tensors."""
    from peft import LoraConfig

    bench.model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    moments = _white(bench)
    moments.step_end = _at(LATE, lambda: bench.model.set_adapter("other"))
    return moments


@fault("adapter-merged", "not-used", trainers=("loop",), setting={"steps": 10})
def _merged(bench: Bench) -> Moments:
    """The adapter is merged into the weights in mid-run and never taken out again; something else is still trained."""
    bench.model.get_input_embeddings().weight.requires_grad_(True)
    moments = _white(bench)
    moments.step_end = _at(LATE, bench.model.merge_adapter)
    return moments


@fault("adapter-switched-off", "not-used", trainers=("loop",), setting={"steps": 10})
def _disabled(bench: Bench) -> Moments:
    """Adapters are switched off for an evaluation and not switched on again."""
    bench.model.get_input_embeddings().weight.requires_grad_(True)
    moments = _white(bench)
    moments.step_end = _at(LATE, bench.model.base_model.disable_adapter_layers)
    return moments


@fault("adapter-unloaded", "not-used", trainers=("loop",), setting={"steps": 10})
def _unloaded(bench: Bench) -> Moments:
    """The adapter is merged for good in mid-run."""
    bench.model.get_input_embeddings().weight.requires_grad_(True)
    moments = _white(bench)
    moments.step_end = _at(LATE, bench.model.merge_and_unload)
    return moments


# --- arrived ------------------------------------------------------------------------------------------------------


@fault("no-gradient-below", "no-gradient")
def _detached(bench: Bench) -> Moments:
    """The first transformer layer's output is detached: nothing below it gets a gradient."""
    layer = bench.model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
    return _white(bench)


@fault("one-tensor-zeroed", "dropped", trainers=("loop",))
def _one_without(bench: Bench) -> Moments:
    """A hook zeroes the gradient of one tensor of 28."""
    victim = list(bench.lora.values())[5]
    victim.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]

    return _white(bench)


@fault("all-labels-masked", "no-gradient", trainers=("loop",), optimizers=("adamw",))
def _masked(bench: Bench) -> Moments:
    """Every loss is zero: only weight decay moves the weights."""
    bench.options["loss_factor"] = lambda step: 0.0
    bench.make_optimizer = lambda b: torch.optim.AdamW(list(b.lora.values()), lr=b.rate, weight_decay=0.1)
    return _white(bench)


@fault("loss-not-finite", "non-finite", trainers=("loop",), optimizers=TORCH, setting={"steps": 10})
def _loss_nan(bench: Bench) -> Moments:
    """From the fifth step on the loss is NaN, whatever the preconditioner does."""
    bench.options["loss_factor"] = lambda step: float("nan") if step >= LATE else 1.0
    return Moments()


@fault("frozen-in-mid-run", "no-gradient", setting={"steps": 10})
def _frozen(bench: Bench) -> Moments:
    """A callback freezes half of the layers after the fourth step."""

    def freeze() -> None:
        for name, p in bench.lora.items():
            if "layers.0." in name:
                p.requires_grad_(False)

    moments = _white(bench)
    moments.step_end = _at(LATE, freeze)
    return moments


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


# --- moved --------------------------------------------------------------------------------------------------------


@fault("rate-zero-from-a-scheduler", "learning-rate-zero", setting={"steps": 10})
def _schedule(bench: Bench) -> Moments:
    """The scheduler was given half of the steps, and has come to its end."""
    bench.options["schedule"] = lambda step: max(0.0, 1 - step / 5)
    return _white(bench)


@fault("rate-zero-for-b", "learning-rate-zero", trainers=("loop",))
def _rate_b(bench: Bench) -> Moments:
    """B's parameter group has a learning rate of zero."""
    return _without_rate(bench, lambda name: "lora_B" in name)


@fault("rate-zero-for-a-layer", "learning-rate-zero", trainers=("loop",))
def _rate_layer(bench: Bench) -> Moments:
    """One module's has."""
    return _without_rate(bench, lambda name: "layers.1.mlp.up_proj" in name)


def _without_rate(bench: Bench, chosen: Callable[[str], bool]) -> Moments:
    def make(b: Bench) -> Any:
        rest = {"params": [p for n, p in b.lora.items() if not chosen(n)]}
        return b.standard([rest, {"params": [p for n, p in b.lora.items() if chosen(n)], "lr": 0.0}])

    bench.make_optimizer = make
    return _white(bench)


@fault("rounded-away", "no-update", optimizers=("sgd",))
def _rounded(bench: Bench) -> Moments:
    """bfloat16 parameters, and updates too small to change more than a few of their bits."""
    bench.model.to(torch.bfloat16)
    bench.rate = 3e-4
    return _white(bench)


# --- kept ---------------------------------------------------------------------------------------------------------


@fault("best-model-reloaded", "not-kept", setting={"steps": 10})
def _reloaded(bench: Bench) -> Moments:
    """After the last step the weights of the fourth are loaded."""
    best: dict[str, Tensor] = {}
    keep = _at(LATE, lambda: best.update({n: p.detach().clone() for n, p in bench.lora.items()}))

    def load() -> None:
        for name, p in bench.lora.items():
            p.copy_(best[name])

    again = _at(10, load)

    def step_end() -> None:
        keep()
        again()

    moments = _white(bench)
    moments.step_end = step_end
    return moments


@fault("restarted", "not-kept", setting={"steps": 10})
def _restarted(bench: Bench) -> Moments:
    """The adapter is initialised again in mid-run."""

    def restart() -> None:
        for p in bench.lora.values():
            p.copy_(torch.randn_like(p) * p.std())

    moments = _white(bench)
    moments.step_end = _at(LATE, restart)
    return moments


@fault("tied-a-turned-per-name", "applied-twice", trainers=("loop",), optimizers=TORCH)
def _tied(bench: Bench) -> Moments:
    """One A serves two layers, and is preconditioned under each of its names."""
    first, second = (layer.self_attn.q_proj.lora_A for layer in bench.model.get_base_model().model.layers[:2])
    second["default"].weight = first["default"].weight
    named = bench.model.named_parameters(remove_duplicate=False)
    return Moments(before_step=Whitening({n: p for n, p in named if "lora_" in n}).apply)


# --- throughout ---------------------------------------------------------------------------------------------------


@fault("stops-after-the-first", "stopped", setting={"steps": 30, "accumulation": 1})
def _first_only(bench: Bench) -> Moments:
    """Only the first step is preconditioned."""
    return Moments(before_step=_at(1, Whitening(bench.lora).apply))


@fault("every-second-step", "only-some-steps", setting={"steps": 10})
def _every_second(bench: Bench) -> Moments:
    """Every second step's gradients are left as they are."""
    white, count = Whitening(bench.lora), [0]

    def apply() -> None:
        count[0] += 1
        if count[0] % 2:
            white.apply()

    return Moments(before_step=apply)


@fault("one-tensor-left-out", "only-some-layers")
def _left_out(bench: Bench) -> Moments:
    """One of 28 tensors is not in the preconditioner's list."""
    return Moments(before_step=Whitening(dict(list(bench.lora.items())[1:])).apply)


@fault("damping-drowns-the-statistics", "scaled-only", setting={"max_norm": 0.0})
def _drowned(bench: Bench) -> Moments:
    """The damping is a million times the statistics: the matrix is a number."""
    white = Whitening(bench.lora, damping=1e7)
    return Moments(before_step=white.apply)


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
