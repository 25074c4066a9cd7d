"""More sound variants: loops, hooks and optimizers that are in order and look unusual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grit_impl.zoo.bench import Bench, Moments, Whitening, whitened
from grit_impl.zoo.cases import TORCH, sound
from grit_impl.zoo.optimizers import NormalisedSGD, ScheduleFree, StochasticRounding

LOOP = {"trainers": ("loop",), "optimizers": ("adamw",)}


def _rows(bench: Bench) -> list[Tensor]:
    """One batch per step."""
    data = [row["input_ids"] for row in bench.batches()]
    return [torch.tensor(data[2 * step : 2 * step + 2]) for step in range(bench.steps)]


@sound("adafactor-without-rate", "effective", **LOOP)
def _adafactor(bench: Bench) -> Moments:
    """transformers' Adafactor makes its own learning rate: the group's is None."""
    from transformers.optimization import Adafactor

    bench.make_optimizer = lambda b: Adafactor(list(b.lora.values()))  # type: ignore[no-untyped-call]
    bench.options["loop"] = _without_scheduler
    return whitened(bench)


def _without_scheduler(bench: Bench, moments: Moments) -> None:
    optimizer = bench.build_optimizer()
    for rows in _rows(bench):
        bench.model(input_ids=rows, labels=rows).loss.backward()
        moments.at("before_step")
        optimizer.step()
        moments.at("after_step")
        optimizer.zero_grad()


def _inside(bench: Bench, moments: Moments) -> None:
    optimizers = {p: bench.standard([p]) for p in bench.lora.values()}

    def hook(p: Any) -> None:
        moments.at("before_step")
        optimizers[p].step()
        optimizers[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(hook) for p in bench.lora.values()]  # type: ignore[no-untyped-call]
    for rows in _rows(bench):
        bench.model(input_ids=rows, labels=rows).loss.backward()
    for handle in handles:
        handle.remove()


@sound("steps-inside-backward", "no-modifier", trainers=("loop",), optimizers=TORCH)
def _inside_plain(bench: Bench) -> Moments:
    """Each tensor's optimizer steps as soon as its gradient is there, and clears it."""
    bench.options["loop"] = _inside
    return Moments()


@sound("steps-inside-backward-effective", "effective", trainers=("loop",), optimizers=TORCH)
def _inside_effective(bench: Bench) -> Moments:
    """The same with a preconditioner in front of each."""
    bench.options["loop"] = _inside
    return whitened(bench)


def _manual(bench: Bench, moments: Moments) -> None:
    optimizer, parameters = bench.build_optimizer(), list(bench.lora.values())
    for rows in _rows(bench):
        halves: list[Any] = [
            torch.autograd.grad(bench.model(input_ids=half, labels=half).loss / 2, parameters)
            for half in (rows[:1], rows[1:])
        ]
        for p, *grads in zip(parameters, *halves, strict=True):
            p.grad = sum(grads)
        moments.at("before_step")
        optimizer.step()
        moments.at("after_step")


@sound("gradients-by-hand", "no-modifier", trainers=("loop",), optimizers=TORCH)
def _manual_plain(bench: Bench) -> Moments:
    """torch.autograd.grad instead of backward."""
    bench.options["loop"] = _manual
    return Moments()


@sound("gradients-by-hand-effective", "effective", trainers=("loop",), optimizers=TORCH)
def _manual_effective(bench: Bench) -> Moments:
    """The same with a preconditioner."""
    bench.options["loop"] = _manual
    return whitened(bench)


@sound("pre-hook", "effective", trainers=("loop", "trainer"))
def _pre_hook(bench: Bench) -> Moments:
    """A preconditioner as a hook on the optimizer's step."""
    white = Whitening(bench.lora)
    return Moments(ready=lambda: bench.built.register_step_pre_hook(lambda *_: white.apply()))


@sound("global-pre-hook", "effective", trainers=("loop",))
def _global_hook(bench: Bench) -> Moments:
    """The same as a hook on every optimizer's step."""
    white = Whitening(bench.lora)
    handle: list[Any] = []

    def hook(optimizer: Any, *_: Any) -> None:
        if optimizer is bench.built:
            white.apply()

    steps = [0]

    def count() -> None:
        steps[0] += 1
        if steps[0] == bench.steps:
            handle[0].remove()

    return Moments(ready=lambda: handle.append(register_optimizer_step_pre_hook(hook)), after_step=count)


def _with_masters(bench: Bench, moments: Moments) -> None:
    bench.model.to(torch.bfloat16)
    parameters = list(bench.lora.values())
    copies = [nn.Parameter(p.detach().float()) for p in parameters]
    optimizer = bench.standard(copies)
    for rows in _rows(bench):
        bench.model(input_ids=rows, labels=rows).loss.backward()
        moments.at("before_step")
        for p, copy in zip(parameters, copies, strict=True):
            copy.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for p, copy in zip(parameters, copies, strict=True):
                p.copy_(copy)
        bench.model.zero_grad()


@sound("float32-masters", "no-modifier", trainers=("loop",), optimizers=TORCH)
def _masters_plain(bench: Bench) -> Moments:
    """bfloat16 parameters; the optimizer holds float32 copies."""
    bench.options["loop"] = _with_masters
    return Moments()


@sound("float32-masters-effective", "effective", trainers=("loop",), optimizers=TORCH)
def _masters(bench: Bench) -> Moments:
    """The same with a preconditioner."""
    bench.options["loop"] = _with_masters
    return whitened(bench)


@sound("turned-in-copies", "effective", trainers=("loop",), optimizers=TORCH)
def _turned_in_copies(bench: Bench) -> Moments:
    """The optimizer holds copies, to which gradients are copied and in which they are turned."""

    def loop(b: Bench, moments: Moments) -> None:
        copies = {n: nn.Parameter(p.detach().clone()) for n, p in b.lora.items()}
        optimizer, white = b.standard(list(copies.values())), Whitening(copies)
        for rows in _rows(b):
            b.model.zero_grad()
            b.model(input_ids=rows, labels=rows).loss.backward()
            for name, p in b.lora.items():
                copies[name].grad = None if p.grad is None else p.grad.clone()
            white.apply()
            optimizer.step()
            with torch.no_grad():
                for name, p in b.lora.items():
                    p.copy_(copies[name])

    bench.options["loop"] = loop
    return Moments()


@sound("flat-buffer", "effective", trainers=("loop",), optimizers=TORCH)
def _flat(bench: Bench) -> Moments:
    """The optimizer holds one long tensor, of which weights and gradients are parts."""

    def loop(b: Bench, moments: Moments) -> None:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in b.lora.values()]))
        flat.grad, sizes = torch.zeros_like(flat), [p.numel() for p in b.lora.values()]
        for p, value, grad in zip(
            b.lora.values(), torch.split(flat.data, sizes), torch.split(flat.grad, sizes), strict=True
        ):
            p.data, p.grad = value.view_as(p), grad.view_as(p)
        optimizer = b.standard([flat])
        for rows in _rows(b):
            flat.grad.zero_()
            b.model(input_ids=rows, labels=rows).loss.backward()
            moments.at("before_step")
            optimizer.step()

    bench.options["loop"] = loop
    return whitened(bench)


@sound("functional-gradients", "effective", trainers=("loop",), optimizers=TORCH)
def _functional(bench: Bench) -> Moments:
    """torch.func.grad of a functional call with the parameters' values."""

    def loop(b: Bench, moments: Moments) -> None:
        optimizer, forward = b.build_optimizer(), torch.func.functional_call

        def objective(weights: Any, rows: Tensor) -> Any:
            return forward(b.model, weights, (), {"input_ids": rows, "labels": rows}).loss

        for rows in _rows(b):
            weights = {n: p.detach() for n, p in b.lora.items()}
            for name, grad in torch.func.grad(objective)(weights, rows).items():
                b.lora[name].grad = grad
            moments.at("before_step")
            optimizer.step()

    bench.options["loop"] = loop
    return whitened(bench)


def _lbfgs_loop(bench: Bench, moments: Moments) -> None:
    optimizer = torch.optim.LBFGS(list(bench.lora.values()), lr=0.1, max_iter=4)
    for rows in _rows(bench):

        def closure(rows: Tensor = rows) -> Any:
            optimizer.zero_grad()
            loss = bench.model(input_ids=rows, labels=rows).loss
            loss.backward()
            moments.at("before_step")
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]


@sound("lbfgs", "effective", **LOOP)
def _lbfgs(bench: Bench) -> Moments:
    """LBFGS calls its closure several times a step, and the closure preconditions."""
    bench.options["loop"] = _lbfgs_loop
    return whitened(bench)


@sound("critic", "effective", trainers=("loop",), optimizers=TORCH)
def _critic(bench: Bench) -> Moments:
    """Another model's backward pass between the preconditioner and the step."""
    critic, white = nn.Linear(4, 1), Whitening(bench.lora)

    def both() -> None:
        white.apply()
        with torch.enable_grad():
            critic(torch.ones(2, 4)).sum().backward()

    return Moments(before_clip=both)


@sound("schedule-free", "effective", **LOOP)
def _schedule_free(bench: Bench) -> Moments:
    """A schedule-free optimizer: its weights are swapped for their average at the end."""

    def loop(b: Bench, moments: Moments) -> None:
        optimizer = ScheduleFree(list(b.lora.values()), lr=b.rate)
        for rows in _rows(b):
            b.model(input_ids=rows, labels=rows).loss.backward()
            moments.at("before_step")
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()

    bench.options["loop"] = loop
    return whitened(bench)


@sound("normalised-descent", "no-modifier", trainers=("loop",), optimizers=TORCH)
def _normalised(bench: Bench) -> Moments:
    """Every step's gradient is divided by its norm."""

    def divide() -> None:
        grads = [p.grad for p in bench.lora.values() if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for grad in grads:
            grad.div_(norm)

    bench.max_norm = 0.0
    return Moments(before_step=divide)


@sound("normalised-in-the-optimizer", "effective", **LOOP)
def _normalised_inside(bench: Bench) -> Moments:
    """The optimizer divides by the norm of all gradients: a sample of tensors cannot be replayed exactly."""
    bench.make_optimizer = lambda b: NormalisedSGD(list(b.lora.values()), lr=b.rate)
    return whitened(bench)


@sound("stochastic-rounding", "effective", **LOOP)
def _stochastic(bench: Bench) -> Moments:
    """bfloat16 parameters whose optimizer rounds at random."""
    bench.model.to(torch.bfloat16)
    bench.make_optimizer = lambda b: StochasticRounding(list(b.lora.values()), lr=0.3)
    return whitened(bench)


@sound("averaged-weights-at-the-end", "effective")
def _ema(bench: Bench) -> Moments:
    """After the last step the weights are replaced by their running average."""
    average = {n: p.detach().clone() for n, p in bench.lora.items()}
    steps = [0]

    def follow() -> None:
        steps[0] += 1
        for name, p in bench.lora.items():
            average[name].lerp_(p, 0.3)
            if steps[0] == bench.steps:
                p.copy_(average[name])

    return Moments(before_step=Whitening(bench.lora).apply, step_end=follow)


@sound("merged-for-an-evaluation", "effective", trainers=("loop",), optimizers=TORCH)
def _evaluated(bench: Bench) -> Moments:
    """The adapter is merged between steps, and taken out again."""

    def evaluate() -> None:
        bench.model.merge_adapter()
        bench.model.unmerge_adapter()

    return Moments(before_step=Whitening(bench.lora).apply, step_end=evaluate)
