"""Shadows of an optimizer: what the same optimizer would have done with other gradients.

Two, for a sample of parameters, whose parameters and hyperparameters follow the real ones at every step:
* the *replay* starts each step from the real state and takes the gradient found at the optimizer's entry. Its update
  must equal the real one; if it does not, something else moved the parameters.
* the *raw shadow* keeps a state of its own and takes the unmodified gradient, clipped and unscaled as that gradient
  would have been. If its update has the real one's direction, the modification was cancelled by the optimizer.

In the first few steps the replay is repeated with the negated gradient: an optimizer whose update stays the same does
not read `.grad` at all.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

GHOST = "_ledger_ghost"
# |u|, |u_raw|, cos(u, u_raw), |u - u_replay| / |u|, cos(u, u_replay); where they were tried: |u_replay - u_other| / |u|
# with other gradients, |u_replay - u_again| / |u| for optimizers that draw random numbers; <u, U> / |U|^2, where U is
# the replay in float32 of a 16-bit parameter; cos(-u, g) and cos(-u, raw g), see `_along`; in the same steps
# cos(u, u_raw) of orthogonal factors, see `_orthogonal`.
COLUMNS = 11
TRIALS = 5
FLAT, LARGEST_RANK = 0.8, 128
"""How far the squares of an orthogonal update's singular values may lie from their mean, relative to it."""


class Shadows:
    """Both shadows, for parameters given by position.

    Args:
        sample: Position -> parameter.

    Attributes:
        running: A replay is under way.
        followed: Positions of those that are followed at present.
        problem: Why there are none (an optimizer that cannot be copied), or None.
    """

    def __init__(self, sample: dict[int, nn.Parameter]) -> None:
        self.sample: dict[int, Tensor] = dict(sample)
        self.followed = list(sample)
        self.problem: str | None = None
        self.running = False
        self._trials = 0
        self._nested = False
        self._last: dict[int, Tensor] = {}
        self._raw_state: dict[int, dict[str, Any]] = {}
        self._entry: dict[int, tuple[Tensor, Tensor | None, dict[str, Any], int]] = {}
        self._groups: list[dict[str, Any]] = []
        self._fields: dict[str, Any] = {}

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """At the optimizer's entry: keep the sampled parameters, their gradients and their state."""
        self._entry = {}
        # As they are now: some optimizers count their steps there.
        self._groups = [{k: _copied(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self._fields = {k: v for k, v in vars(optimizer).items() if isinstance(v, int | float)}
        groups = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for index, p in self.sample.items():
            if id(p) in groups and index in self.followed:
                grad = None if p.grad is None else p.grad.detach().clone()
                state = {} if self.problem or p not in optimizer.state else _copy_state(optimizer.state[p])
                self._entry[index] = (p.detach().clone(), grad, state, groups[id(p)])

    @torch.no_grad()
    def after(
        self, optimizer: Optimizer, raw: dict[int, Tensor], clip_value: float | None, nested: bool = False
    ) -> Tensor | None:
        """After the step: run both shadows and compare.

        Args:
            optimizer: The one given to `before`; it must be the innermost.
            raw: Position -> unmodified gradient.
            clip_value: Bound of element-wise clipping, or None.
            nested: This was a call of the base class's `step` from a subclass's `step`.

        Returns:
            (len(sample), COLUMNS) on the parameters' device, or None; rows of parameters that it does not hold are NaN.
        """
        if not self._entry:
            return None
        self._nested = nested
        written = {i: e[1] for i, e in self._entry.items() if e[1] is not None}
        unmodified = {i: g for i, g in raw.items() if i in self._entry}
        if clip_value is not None:
            unmodified = {i: g.clamp(-clip_value, clip_value) for i, g in unmodified.items()}
        runs = None if self.problem else self._all_runs(optimizer, written, unmodified)
        device = next(iter(self._entry.values()))[0].device
        out = torch.full((len(self.sample), COLUMNS), torch.nan, dtype=torch.float64, device=device)
        for row, (index, p) in enumerate(self.sample.items()):
            if index in written:
                start = self._entry[index][0].float()
                u = p.float() - start
                values = self._compared(u, start, index, runs)
                last = self._last.get(index)
                values += [_along(u, g, last) for g in (written[index], unmodified.get(index))]
                self._last[index] = u
                early = runs is not None and index in runs[2] and index in runs[1]
                us = runs[1][index].float() - start if runs is not None and early else None
                values.append(_orthogonal(u, us, unmodified.get(index)))
                out[row] = torch.stack(values).double()
        return out

    def _all_runs(
        self, optimizer: Optimizer, written: dict[int, Tensor], unmodified: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], ...] | None:
        """Parameters after the replay, the raw shadow, a replay with other gradients, another, and one in float32."""
        self.running = True
        try:
            with _fenced(optimizer, self.sample):
                replay, _ = self._replay(optimizer, written)
                other: dict[int, Tensor] = {}
                again, coarse = other, other
                if self._trials < TRIALS:
                    other, _ = self._replay(optimizer, {i: -g for i, g in written.items()})
                    if foreign(optimizer):
                        again, _ = self._replay(optimizer, written)
                short = {i: g for i, g in written.items() if self._entry[i][0].element_size() == 2}
                with contextlib.suppress(Exception):  # one that insists on its own type
                    coarse, _ = self._replay(optimizer, short, torch.float32) if short else ({}, {})
                states = {i: self._raw_state.get(i) or _copy_state(e[2]) for i, e in self._entry.items()}
                shadow, new = self._run(optimizer, unmodified, states)
        except Exception as error:  # an observer must not stop the training it observes
            self.problem = f"{type(optimizer).__name__} cannot be shadowed: {error}".replace("\n", " ")
            return None
        finally:
            self.running = False
        self._raw_state.update(new)
        self._trials += 1
        return replay, shadow, other, again, coarse

    @staticmethod
    def _compared(u: Tensor, start: Tensor, index: int, runs: tuple[dict[int, Tensor], ...] | None) -> list[Tensor]:
        """The first eight columns for one update."""
        n, nothing = u.norm(), torch.full((), torch.nan, device=u.device)
        if runs is None or index not in runs[0] or index not in runs[1]:
            return [n] + [nothing] * 7
        replay, shadow, other, again, coarse = (run.get(index) for run in runs)
        ur, us = ((x.float() if x is not None else start) - start for x in (replay, shadow))
        ns, nr = us.norm(), ur.norm()
        values = [n, ns, (u * us).sum() / (n * ns), (u - ur).norm() / n, (u * ur).sum() / (n * nr)]
        for tried in (other, again):
            values.append(nothing if tried is None else (ur + start - tried.float()).norm() / n)
        whole = None if coarse is None else coarse.float() - start
        values.append(nothing if whole is None else (u * whole).sum() / whole.square().sum())
        return values

    def _replay(
        self, optimizer: Optimizer, grads: dict[int, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[dict[int, Tensor], dict[int, dict[str, Any]]]:
        states = {i: _copy_state(self._entry[i][2]) for i in grads}
        if dtype is not None:
            for state in states.values():
                coarse = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.element_size() == 2}
                state |= {k: v.to(dtype) for k, v in coarse.items() if v.is_floating_point()}
        return self._run(optimizer, grads, states, dtype)

    def _run(
        self,
        optimizer: Optimizer,
        grads: dict[int, Tensor],
        states: dict[int, dict[str, Any]],
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[int, Tensor], dict[int, dict[str, Any]]]:
        ghost = _ghost(optimizer, _base(type(optimizer)) if self._nested else type(optimizer))
        ghost.__dict__.update(self._fields)
        clones = {i: nn.Parameter(self._entry[i][0].to(dtype or self._entry[i][0].dtype, copy=True)) for i in grads}
        ghost.param_groups = [{**{k: _copied(v) for k, v in group.items()}, "params": []} for group in self._groups]
        ghost.state = defaultdict(dict)
        for i, clone in clones.items():
            clone.grad = grads[i].to(clone.dtype).clone()
            ghost.param_groups[self._entry[i][3]]["params"].append(clone)
            if states[i]:
                ghost.state[clone] = states[i]
        ghost.step()
        return ({i: c.detach() for i, c in clones.items()}, {i: ghost.state[c] for i, c in clones.items()})


def _along(update: Tensor, gradient: Tensor | None, last: Tensor | None) -> Tensor:
    """Cosine of an update and a gradient, negated, in what is at right angles to the last update: momentum apart."""
    u, g = -update.flatten(), None if gradient is None else gradient.flatten().float()
    if g is None or g.shape != u.shape:
        return torch.full((), torch.nan, device=u.device)
    if last is not None and last.numel() == u.numel():
        unit = last.flatten() / last.norm().clamp(min=1e-30)
        u, g = u - (u @ unit) * unit, g - (g @ unit) * unit
    cosine: Tensor = (u @ g) / (u.norm() * g.norm())
    return cosine


def _orthogonal(update: Tensor, of_raw: Tensor | None, raw: Tensor | None) -> Tensor:
    """Cosine of two updates' orthogonal factors, if they are what the optimizer made of a gradient that is not so.

    An iteration leaves singular values between 0.7 and 1.2; what a matrix does to those alone is its error.
    """
    nothing = torch.full((), torch.nan, device=update.device)
    if of_raw is None or raw is None or update.ndim != 2 or min(update.shape) > LARGEST_RANK:
        return nothing
    if not update.shape == of_raw.shape == raw.shape:
        return nothing
    finite = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (update, of_raw, raw))
    u, v, g = (x if x.shape[0] <= x.shape[1] else x.mT for x in finite)
    squares, vectors = torch.linalg.eigh(torch.stack([x @ x.mT for x in (u, v, g)]))
    spread = (squares / squares.mean(-1, keepdim=True) - 1).square().mean(-1).sqrt()
    roots = (vectors * squares.clamp(min=1e-300).rsqrt().unsqueeze(-2)) @ vectors.mT
    cosine = (roots[0] @ u @ v.mT @ roots[1]).trace() / len(u)
    made = (spread[:2] < FLAT).all() & (spread[1] < spread[2] / 2)
    return torch.where(made, cosine, nothing)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _copy_state(state: Any) -> dict[str, Any]:
    return {k: _copied(v) for k, v in state.items()}


def foreign(optimizer: Optimizer) -> bool:
    """Whether an optimizer may draw random numbers, or couple tensors that a replay of a sample does not see."""
    return not type(optimizer).__module__.startswith(("torch.optim", "bitsandbytes"))


def _base(kind: type[Optimizer]) -> type[Optimizer]:
    """The class whose `step` a subclass's `step` calls: running the subclass's again might run a closure again."""
    steps = [c for c in kind.__mro__ if "step" in vars(c) and c is not Optimizer]
    return steps[1] if len(steps) > 1 else kind


def _ghost(optimizer: Optimizer, kind: type[Optimizer]) -> Optimizer:
    """A copy of the optimizer without parameters, hooks or patched methods; anything it may write to is copied."""
    ghost: Optimizer = object.__new__(kind)
    for name, value in vars(optimizer).items():
        if isinstance(value, (Optimizer, nn.Module)):
            raise TypeError(f"it holds a {type(value).__name__}")
        if name in ("param_groups", "state") or callable(value):
            continue  # schedulers and accelerate patch `step` on the instance
        if name.endswith("_hooks"):
            ghost.__dict__[name] = OrderedDict()
        elif type(value).__module__.startswith("bitsandbytes"):
            ghost.__dict__[name] = value  # its global registry of overrides, which steps only read
        else:
            ghost.__dict__[name] = copy.deepcopy(value)
    ghost.__dict__[GHOST] = True
    return ghost


@contextlib.contextmanager
def _fenced(optimizer: Optimizer, sample: dict[int, Tensor]) -> Iterator[None]:
    """Keep the random stream: optimizers with stochastic rounding draw from it."""
    if type(optimizer).__module__.startswith("torch.optim"):
        yield
        return
    devices = sorted({p.device.index or 0 for p in sample.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
