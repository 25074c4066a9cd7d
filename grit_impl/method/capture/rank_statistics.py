"""Sums over tokens of a a' and g g', all layers together; `modules.py` says what a and g are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grit_impl.errors import GRITError


@dataclass
class ForwardContext:
    """What one forward pass of the model knows about its tokens.

    Attributes:
        mask: (batch, length) true for real tokens, false for padding; None: all tokens are real.
        tokens: Number of tokens with padding, batch x length; None: unknown.
        tokens_per_unit: 0-dim tensor; what a gradient is multiplied by to become the gradient of one token's
            loss. None until the backward pass has reached the loss.
        count: 0-dim tensor, the number of real tokens by the mask. Summed once, not once per layer.
        pending: Indices of the layers whose gradient was asked for in the forward pass itself.
        rerun: Layers that ran without gradients, as all do in the forward pass under reentrant checkpointing.
    """

    mask: Tensor | None
    tokens: int | None = None
    tokens_per_unit: Tensor | None = None
    count: Tensor | int = field(init=False)
    pending: set[int] = field(init=False, default_factory=set)
    rerun: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.count = 0 if self.mask is None else self.mask.sum()


class _Call(NamedTuple):
    """What was noted of one call: of a layer, or of several that follow one another.

    Attributes:
        layer: The first one's index.
        layers: How many.
        rank: Theirs.
        turned: a is (r, tokens), not (tokens, r).
        values: a and g of one layer, or of all together (2, layers, r * tokens).
    """

    layer: int
    layers: int
    rank: int
    turned: bool
    values: tuple[Tensor, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind can be stacked."""
        a = self.values[0]
        return len(self.values), self.rank, self.turned, a.shape if len(self.values) > 1 else a.shape[2]


class RankStatistics:
    """Sums over tokens for all layers, each kind in one stacked tensor.

    A call of a layer is only noted; the products of many calls are taken together, in one batched multiplication,
    when the pass is over, when the sums are read, or when more than `CHUNK` bytes have been noted.

    Args:
        layers: Number of layers, L.
        rank: Largest rank r; layers of smaller rank use the leading rows and columns.
        device: Where the adapters are.
        dtype: float32, or float64 for a model in double precision.

    Attributes:
        sums: (2, L, r, r), the sums of a a' (0) and g g' (1) over the tokens since the last `reset`.
        cross: (L, r, r), the sum of (raw) g a'; only while `check_completeness`.
        energy: (L,), the sum of |raw g|^2; only while `check_completeness`.
        tokens: (L,), the number of tokens.
    """

    CHUNK = 1 << 24

    def __init__(self, layers: int, rank: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        square = layers * rank * rank
        # One buffer, so that one call clears it.
        self._buffer = torch.zeros(3 * square + 2 * layers, device=device, dtype=dtype)
        sums, cross, self._tokens, self._energy = torch.split(self._buffer, [2 * square, square, layers, layers])
        self._sums, self._cross = sums.view(2, layers, rank, rank), cross.view(layers, rank, rank)
        self._noted: list[_Call] = []
        self._bytes = 0
        self._context: ForwardContext | None = None
        self.check_completeness = False
        self.collecting = True

    @property
    def sums(self) -> Tensor:
        self.flush()
        return self._sums

    @property
    def sum_a(self) -> Tensor:
        """(L, r, r), the sum of a a'."""
        return self.sums[0]

    @property
    def sum_g(self) -> Tensor:
        """(L, r, r), the sum of g g'."""
        return self.sums[1]

    @property
    def cross(self) -> Tensor:
        self.flush()
        return self._cross

    @property
    def energy(self) -> Tensor:
        self.flush()
        return self._energy

    @property
    def tokens(self) -> Tensor:
        self.flush()
        return self._tokens

    def add(self, layer: int, a: Tensor, g: Tensor, context: ForwardContext, *, turned: bool = False) -> None:
        """Add one call of a layer.

        Args:
            layer: Index of the layer.
            a: (..., r) output of lora_A, any dtype; nobody may write to it afterwards.
            g: (..., r) gradient of the (scaled, averaged) loss at that output; the same.
            context: The forward pass that the call belongs to.
            turned: a is (r, tokens) instead, and g (tokens, r).

        Raises:
            GRITError: the loss was not seen, or the layer saw other tokens than the model was given.
        """
        self._note(_Call(layer, 1, g.shape[-1], turned, (a, g)), g.numel(), context)

    def add_together(self, layers: Sequence[int], values: Tensor, rank: int, context: ForwardContext) -> None:
        """Add one call of several layers.

        Args:
            layers: Their indices.
            values: (2, layers, r * tokens): of each a (r, tokens), then of each g (tokens, r). Nobody may write to it
                afterwards.
            rank: r.
            context: As for `add`.

        Raises:
            GRITError: as for `add`.
        """
        numbers, first, n = values.shape[2], layers[0], len(layers)
        if list(layers) == list(range(first, first + n)):
            self._note(_Call(first, n, rank, True, (values,)), numbers, context)
            return
        for i, layer in enumerate(layers):
            self.add_together([layer], values[:, i : i + 1], rank, context)

    def _note(self, call: _Call, numbers: int, context: ForwardContext) -> None:
        """Note a call that has so many numbers a, and g, per layer."""
        if context is not self._context:
            self._begin(context)
        if context.tokens is not None and numbers != context.tokens * call.rank:
            raise GRITError(
                f"a LoRA layer saw {numbers // call.rank} tokens where the model was given {context.tokens}: GRIT "
                "supports layers that see every token once (no expert routing, no part of a sequence)"
            )
        self._noted.append(call)
        self._bytes += 2 * numbers * call.layers * call.values[0].element_size()
        if self._bytes > self.CHUNK:
            self.flush()

    def _begin(self, context: ForwardContext) -> None:
        if context.tokens_per_unit is None:
            raise GRITError(
                "GRIT cannot tell how the loss averages over tokens: pass labels to the model's forward so that it "
                "returns a loss, or set manager.loss_tokens to the number of tokens the loss is averaged over"
            )
        self.flush()
        self._context = context

    @torch.no_grad()
    def flush(self) -> None:
        """Add what was noted to the sums."""
        noted, context = sorted(self._noted, key=lambda call: call.layer), self._context
        self._noted, self._bytes = [], 0
        if not noted or context is None:
            return
        # Neighbours of one shape: their sums are one slice, so that no index has to travel to the device.
        runs: list[list[_Call]] = []
        for call in noted:
            last = runs[-1][-1] if runs else None
            if last is None or call.layer != last.layer + last.layers or call.kind != last.kind:
                runs.append([])
            runs[-1].append(call)
        with torch.autocast(device_type=self._buffer.device.type, enabled=False):
            for run in runs:
                self._add_run(run, context)

    def _add_run(self, run: list[_Call], context: ForwardContext) -> None:
        """Layers i, i + 1, ... of one shape."""
        assert context.tokens_per_unit is not None
        first, rank, dtype, n = run[0].layer, run[0].rank, self._buffer.dtype, sum(call.layers for call in run)
        layers = slice(first, first + n)
        if len(run[0].values) == 1:
            a, raw = torch.cat([call.values[0] for call in run], 1).to(dtype)
        else:
            a, raw = (torch.stack(each).to(dtype) for each in zip(*(call.values for call in run), strict=True))
        raw = raw.reshape(n, -1, rank)  # (n, tokens, r), as a
        a = a.reshape(n, rank, -1).mT if run[0].turned else a.reshape(raw.shape)
        if context.mask is None:
            self._tokens[layers] += raw.shape[1]
        else:
            # Bits are cleared, because what padding computes may be NaN; a third of the time of masked_fill_ on a CPU.
            bits = torch.int64 if dtype == torch.float64 else torch.int32
            real = -context.mask.reshape(-1, 1).to(bits)
            for values in (a, raw):
                values.view(bits).bitwise_and_(real)
            self._tokens[layers] += context.count
        if self.check_completeness:
            self._cross[layers, :rank, :rank] += raw.mT @ a
            self._energy[layers] += raw.square().sum((1, 2))
        raw *= context.tokens_per_unit
        for sums, values in zip(self._sums, (a, raw), strict=True):
            sums[layers, :rank, :rank] += values.mT @ values

    def reset(self) -> None:
        """Forget the sums."""
        self._noted, self._bytes = [], 0
        self._buffer.zero_()
