"""Faults around a gradient: a tensor is not used, nothing arrives, an update moves nothing or does not stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grit_impl.zoo.bench import Bench, Moments, Whitening, at_step, whitened
from grit_impl.zoo.cases import TORCH, fault

LATE = 4
"""The step in which something happens that was in order until then."""


# --- used ---------------------------------------------------------------------------------------------------------


def _beside_embeddings(bench: Bench) -> Moments:
    """Embeddings are trained, too, so that a loss without adapters still has a gradient."""
    bench.model.get_input_embeddings().weight.requires_grad_(True)
    return whitened(bench)


@fault("adapter-switched", "not-used", setting={"steps": 10})
def _switched(bench: Bench) -> Moments:
    """Another adapter becomes the active one in mid-run; the optimizer holds the first one's tensors."""
    from peft import LoraConfig

    bench.model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    moments = whitened(bench)
    moments.step_end = at_step(LATE, lambda: bench.model.set_adapter("other"))
    return moments


@fault("adapter-merged", "not-used", trainers=("loop",), setting={"steps": 10})
def _merged(bench: Bench) -> Moments:
    """The adapter is merged into the weights in mid-run and never taken out again; something else is still trained."""
    moments = _beside_embeddings(bench)
    moments.step_end = at_step(LATE, bench.model.merge_adapter)
    return moments


@fault("adapter-switched-off", "not-used", trainers=("loop",), setting={"steps": 10})
def _disabled(bench: Bench) -> Moments:
    """Adapters are switched off for an evaluation and not switched on again."""
    moments = _beside_embeddings(bench)
    moments.step_end = at_step(LATE, bench.model.base_model.disable_adapter_layers)
    return moments


@fault("adapter-unloaded", "not-used", trainers=("loop",), setting={"steps": 10})
def _unloaded(bench: Bench) -> Moments:
    """The adapter is merged for good in mid-run."""
    moments = _beside_embeddings(bench)
    moments.step_end = at_step(LATE, bench.model.merge_and_unload)
    return moments


# --- arrived ------------------------------------------------------------------------------------------------------


@fault("no-gradient-below", "no-gradient")
def _detached(bench: Bench) -> Moments:
    """The first transformer layer's output is detached: nothing below it gets a gradient."""
    layer = bench.model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
    return whitened(bench)


@fault("one-tensor-zeroed", "dropped", trainers=("loop",))
def _one_without(bench: Bench) -> Moments:
    """A hook zeroes the gradient of one tensor of 28."""
    victim = list(bench.lora.values())[5]
    victim.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]

    return whitened(bench)


@fault("all-labels-masked", "no-gradient", trainers=("loop",), optimizers=("adamw",))
def _masked(bench: Bench) -> Moments:
    """Every loss is zero: only weight decay moves the weights."""
    bench.options["loss_factor"] = lambda step: 0.0
    bench.make_optimizer = lambda b: torch.optim.AdamW(list(b.lora.values()), lr=b.rate, weight_decay=0.1)
    return whitened(bench)


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

    moments = whitened(bench)
    moments.step_end = at_step(LATE, freeze)
    return moments


# --- moved --------------------------------------------------------------------------------------------------------


@fault("rate-zero-from-a-scheduler", "learning-rate-zero", setting={"steps": 10})
def _schedule(bench: Bench) -> Moments:
    """The scheduler was given half of the steps, and has come to its end."""
    bench.options["schedule"] = lambda step: max(0.0, 1 - step / 5)
    return whitened(bench)


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
    return whitened(bench)


@fault("rounded-away", "no-update", optimizers=("sgd",))
def _rounded(bench: Bench) -> Moments:
    """bfloat16 parameters, and updates too small to change more than a few of their bits."""
    bench.model.to(torch.bfloat16)
    bench.rate = 3e-4
    return whitened(bench)


# --- kept ---------------------------------------------------------------------------------------------------------


@fault("best-model-reloaded", "not-kept", setting={"steps": 10})
def _reloaded(bench: Bench) -> Moments:
    """After the last step the weights of the fourth are loaded."""
    best: dict[str, Tensor] = {}
    keep = at_step(LATE, lambda: best.update({n: p.detach().clone() for n, p in bench.lora.items()}))

    def load() -> None:
        for name, p in bench.lora.items():
            p.copy_(best[name])

    again = at_step(10, load)

    def step_end() -> None:
        keep()
        again()

    moments = whitened(bench)
    moments.step_end = step_end
    return moments


@fault("restarted", "not-kept", setting={"steps": 10})
def _restarted(bench: Bench) -> Moments:
    """The adapter is initialised again in mid-run."""

    def restart() -> None:
        for p in bench.lora.values():
            p.copy_(torch.randn_like(p) * p.std())

    moments = whitened(bench)
    moments.step_end = at_step(LATE, restart)
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
    return Moments(before_step=at_step(1, Whitening(bench.lora).apply))


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
