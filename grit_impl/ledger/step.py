"""What the ledger has seen of one optimizer step: on the device while it runs, on the host when it is written."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grit_impl.ledger.structure import Grams, gram
from grit_impl.ledger.timeline import AUTOGRAD, NORM, PREVIOUS, Probe, StepData, empty_table

Stamp = tuple["weakref.ref[Tensor]", int]


@dataclass(eq=False)
class Step:
    """What has been seen since the last optimizer step.

    Attributes:
        full: Fingerprints are taken in this step.
        structured: What is applied is looked into, for a few tensors.
        pending: The last backward pass, whose fingerprints wait for the next look.
        stamps: (weak reference, version) of every gradient at the last look.
        check: Hashes of a few gradients at that look.
        checks: Pairs of such hashes that have to agree, because the versions did.
        lean: Some fingerprints were not taken, because of versions that agreed.
        lost: Something was written where none were taken: the step counts as not sampled.
        mistaken: Versions agreed where hashes differ.
        before_pass: (weak reference, version) of every gradient before the backward pass under way.
        passes: Backward passes, also those that touched no watched gradient.
        manual: Gradients that `torch.autograd.grad` returned, added up: they are nobody's `.grad` yet.
        hooked: j -> by position, the gradient after j hooks of others; 0: as autograd made it.
        read: Foreign reads of gradients are looks, too.
        again: Positions of gradients that one piece of code has written to in two passes.
        kept: By tensor, see `watches/kept.py`.
        before_closure: How many probes there were when the optimizer called its closure for the first time.
        inside: Position -> (unmodified gradient, gradient, parameter) where an optimizer stepped during backward.
        inside_after: Position -> the parameter after that.
        restart: A closure began: what it finds replaces what was seen before.
        left: Fingerprints of the parameters as the step before left them.
        foreign: An optimizer stepped that is not torch's or one that is known to be replayed tensor by tensor.
        witness: By layer, the ledger's own statistics.
        stepped_on: How often an optimizer stepped on each gradient.
        rate_zero: Whose group's learning rate was 0.
        why: Position of a tensor that takes no part in the forward pass -> why.
        previous: Earlier unmodified gradients of the tensors whose structure is looked at, see `structure.Memory`.
        grams: Inner products of theirs (see structure.py), with the probes that they belong to.
    """

    full: bool
    entry: NDArray[np.int64]
    stepped_on: NDArray[np.int64]
    rate_zero: NDArray[np.bool_]
    expected: NDArray[np.bool_]
    probes: list[Probe] = field(default_factory=list)
    raw: list[int] = field(default_factory=list)
    raw_sample: dict[int, Tensor] = field(default_factory=dict)
    raw_norm: Tensor | None = None
    raw_look: Any = None
    hooked: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    moved: list[tuple[Any, Any, Any]] = field(default_factory=list)
    shadows: list[Any] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    structured: bool = True
    pending: Probe | None = None
    stamps: list[Stamp | None] = field(default_factory=list)
    check: Any = None
    checks: list[tuple[Any, Any]] = field(default_factory=list)
    lean: bool = False
    lost: bool = False
    mistaken: bool = False
    stepped: bool = False
    skipped: bool = False
    leftover: bool = False
    foreign: bool = False
    max_norm: float | None = None
    clip_value: float | None = None
    unscale: Tensor | None = None
    late_reads: dict[str, int] = field(default_factory=dict)
    number: int = 0
    read: bool = False
    again: list[int] = field(default_factory=list)
    kept: Tensor | None = None
    before_closure: int = 0
    before_pass: list[Stamp | None] = field(default_factory=list)
    passes: int = 0
    manual: dict[int, Tensor] = field(default_factory=dict)
    inside: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    inside_after: dict[int, Tensor] = field(default_factory=dict)
    restart: bool = False
    why: dict[int, str] = field(default_factory=dict)
    left: Tensor | None = None
    witness: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    fetched: Any = None
    previous: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    grams: dict[int, tuple[Any, dict[int, int]]] = field(default_factory=dict)

    @property
    def unhooked(self) -> dict[int, Tensor]:
        """Gradients that hooks of others have seen, as autograd made them."""
        return self.hooked.get(0, {})

    @property
    def over(self) -> bool:
        """Whether the optimizer has run, or was skipped."""
        return self.stepped or self.skipped

    def fetch(self, *, cuda: bool) -> None:
        """Begin to copy to the host, without waiting."""
        for probe in self.probes:
            probe.table, probe.look = _to_host(probe.table), None
        self.raw_look = None
        self._multiply()
        self.moved = [(held, _to_host(b), _to_host(a)) for held, b, a in self.moved]
        self.left, self.kept = _to_host(self.left), _to_host(self.kept)
        self.witness = {name: {k: _to_host(v) for k, v in sides.items()} for name, sides in self.witness.items()}
        self.shadows = [_to_host(r) for r in self.shadows]
        self.checks = [(_to_host(a), _to_host(b)) for a, b in self.checks]
        if cuda:
            self.fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.fetched.record()

    def raw_samples(self) -> dict[int, Tensor]:
        """The unmodified gradients of the tensors whose structure is looked at."""
        if not self.raw:
            return {}
        probe = self.probes[self.raw[-1]]
        return (probe.like or probe).samples

    def _multiply(self) -> None:
        """Inner products of what was sampled, on the device."""
        for i, raw in self.raw_samples().items():
            # What has another shape by then (a rank that was cut) is no multiple of the raw gradient.
            found = {j: probe.samples[i] for j, probe in enumerate(self.probes) if i in probe.samples}
            found |= self.previous.get(i, {})
            found = {j: gradient for j, gradient in found.items() if gradient.shape == raw.shape}
            self.grams[i] = (_to_host(gram(list(found.values()))), {j: place for place, j in enumerate(found)})
        for probe in self.probes:
            probe.samples = {}

    def data(self, n: int, sample: list[int]) -> StepData:
        """On the host, for `timeline.rows`; waits for the copies.

        Args:
            n: Watched tensors.
            sample: Those that are shadowed.
        """
        if self.fetched is not None:
            self.fetched.synchronize()
        self.mistaken = any(a is not None and not torch.equal(a, b) for a, b in self.checks)
        self.lost = self.lost or (self.mistaken and self.lean)
        self._read_probes(n)
        before, after = empty_table(n), empty_table(n)
        for held, b, a in self.moved:
            first = held & np.isnan(before[:, NORM])  # stepped twice: from the first entry to the last exit
            if b is not None and a is not None:
                before[first, : PREVIOUS + 1], after[held, : PREVIOUS + 1] = b.numpy()[first], a.numpy()[held]
        shadow = {
            i: values
            for result in self.shadows
            for i, values in zip(sample, result.tolist(), strict=True)
            if np.isfinite(values[0])
        }
        probes = self.probes if self.full and not self.lost else []
        if self.leftover and probes and self.raw and self.raw[0] > 0:
            found, left = probes[self.raw[0] - 1], probes[self.raw[0]]
            self.facts["leftover"] = int(((found.norm > 0) & (found.hash != left.hash)).sum())
        moved = (before, after) if self.moved else None
        grams = {i: Grams(blocks.numpy()) for i, (blocks, _) in self.grams.items()}
        return StepData(
            self.number,
            probes,
            self.raw,
            self.entry,
            self.stepped_on,
            self.expected,
            self.rate_zero,
            self.why,
            moved,
            None if self.left is None else self.left.numpy(),
            None if self.kept is None else self.kept.numpy(),
            shadow,
            self.facts,
            grams,
            self._places() if grams else {},
            {name: {k: v.double().numpy() for k, v in sides.items()} for name, sides in self.witness.items()},
        )

    def _places(self) -> dict[int, dict[int, int]]:
        """By tensor, the place of each probe's gradient; a probe without one of its own shares another's."""
        numbers = {id(probe): j for j, probe in enumerate(self.probes)}
        own = {}
        for j, probe in enumerate(self.probes):
            while probe.like is not None:
                probe = probe.like
            own[j] = numbers[id(probe)]
        return {
            i: {j: place for j, place in places.items() if j < 0} | known
            for i, (_, places) in self.grams.items()
            for known in [{j: places[k] for j, k in own.items() if k in places}]
        }

    def _read_probes(self, n: int) -> None:
        for probe, after in itertools.pairwise(self.probes):
            if probe.who == AUTOGRAD and probe.table is None and not probe.missing.all():
                probe.like = after  # postponed, and the next pass came: nothing had changed
        for probe in self.probes:
            if probe.like is None:
                probe.table = probe.table.numpy() if probe.table is not None else empty_table(n)
        for probe in reversed(self.probes):  # the later ones first: a postponed one may be like another
            if probe.like is not None:
                probe.table = probe.like.table


def stamps(grads: Sequence[Tensor | None]) -> list[Stamp | None]:
    """What tells whether a gradient is the tensor it was, and was not written to."""
    return [None if g is None else (weakref.ref(g), g._version) for g in grads]


def same_stamps(before: list[Stamp | None], now: list[Stamp | None]) -> bool:
    """Whether every gradient is the same tensor in the same version.

    A tensor has one weak reference, which may outlive it: unlike an address, no later tensor gets it again.
    """
    return all(
        a is b if a is None or b is None else a[0] is b[0] and a[1] == b[1] for a, b in zip(before, now, strict=True)
    )


def _to_host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("cpu", non_blocking=True)
