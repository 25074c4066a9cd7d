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
# |u|, |u_raw|, cos(u, u_raw), |u - u_replay| / |u|, |u_replay - u_other| / |u| where other gradients were tried.
COLUMNS = 5
TRIALS = 5


class Shadows:
    """Both shadows, for parameters given by position.

    Args:
        sample: Position -> parameter.

    Attributes:
        problem: Why there are none (an optimizer that cannot be copied), or None.
    """

    def __init__(self, sample: dict[int, nn.Parameter]) -> None:
        self.sample = sample
        self.problem: str | None = None
        self._trials = 0
        self._nested = False
        self._raw_state: dict[int, dict[str, Any]] = {}
        self._entry: dict[int, tuple[Tensor, Tensor | None, dict[str, Any], int]] = {}

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """At the optimizer's entry: keep the sampled parameters, their gradients and their state."""
        self._entry = {}
        groups = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for index, p in self.sample.items():
            if id(p) in groups:
                grad = None if p.grad is None else p.grad.detach().clone()
                state = _copy_state(optimizer.state[p]) if p in optimizer.state else {}
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
            (len(sample), 5) on the parameters' device, or None; rows of parameters that it does not hold are NaN.
        """
        if self.problem or not self._entry:
            return None
        self._nested = nested
        written = {i: e[1] for i, e in self._entry.items() if e[1] is not None}
        unmodified = {i: g for i, g in raw.items() if i in self._entry}
        if clip_value is not None:
            unmodified = {i: g.clamp(-clip_value, clip_value) for i, g in unmodified.items()}
        try:
            with _fenced(optimizer, self.sample):
                replay, _ = self._run(optimizer, written, {i: _copy_state(e[2]) for i, e in self._entry.items()})
                other = replay
                if self._trials < TRIALS:
                    other, _ = self._run(
                        optimizer, {i: -g for i, g in written.items()}, {i: e[2] for i, e in self._entry.items()}
                    )
                states = {i: self._raw_state.get(i) or _copy_state(e[2]) for i, e in self._entry.items()}
                shadow, new = self._run(optimizer, unmodified, states)
        except Exception as error:  # an observer must not stop the training it observes
            self.problem = f"{type(optimizer).__name__} cannot be shadowed: {error}"
            return None
        self._raw_state.update(new)
        device = next(iter(self._entry.values()))[0].device
        out = torch.full((len(self.sample), COLUMNS), torch.nan, dtype=torch.float64, device=device)
        for row, (index, p) in enumerate(self.sample.items()):
            if index in replay and index in shadow:
                start = self._entry[index][0].float()
                u, ur, us, uo = (x.float() - start for x in (p, replay[index], shadow[index], other[index]))
                n, ns = u.norm(), us.norm()
                values = (n, ns, (u * us).sum() / (n * ns), (u - ur).norm() / n, (ur - uo).norm() / n)
                out[row] = torch.stack(values).double()
        if self._trials >= TRIALS:
            out[:, 4] = torch.nan
        self._trials += 1
        return out

    def _run(
        self, optimizer: Optimizer, grads: dict[int, Tensor], states: dict[int, dict[str, Any]]
    ) -> tuple[dict[int, Tensor], dict[int, dict[str, Any]]]:
        ghost = _ghost(optimizer, _base(type(optimizer)) if self._nested else type(optimizer))
        clones = {i: nn.Parameter(self._entry[i][0].clone()) for i in grads}
        ghost.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
        ghost.state = defaultdict(dict)
        for i, clone in clones.items():
            clone.grad = grads[i].to(clone.dtype).clone()
            ghost.param_groups[self._entry[i][3]]["params"].append(clone)
            if states[i]:
                ghost.state[clone] = states[i]
        ghost.step()
        return ({i: c.detach() for i, c in clones.items()}, {i: ghost.state[c] for i, c in clones.items()})


def _copy_state(state: Any) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}


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
def _fenced(optimizer: Optimizer, sample: dict[int, nn.Parameter]) -> Iterator[None]:
    """Keep the random stream: optimizers with stochastic rounding draw from it."""
    if type(optimizer).__module__.startswith("torch.optim"):
        yield
        return
    devices = sorted({p.device.index or 0 for p in sample.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
