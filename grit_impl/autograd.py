"""Rank-space statistics of LoRA layers, one outer product per real token.

For y = W0 x + s B A x, the output of `lora_A` carries both statistics: its value is a = A x, and the gradient of the
loss at it is g = s B' dL/dy, each r numbers per token. The factors are S_a = E[a a'] and S_g = E[g g'] (K-FAC,
Martens & Grosse 2015, in the coordinates of the adapter's rank), so that no d x d matrix is ever formed.

Gradients are taken per token: whatever the loss was divided by (tokens, accumulation, a loss scale) is multiplied
back in, so that S_g does not depend on batch size, accumulation or mixed precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_impl import compiled
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
        rerun: Layers that were seen without gradients: under reentrant checkpointing, if in the forward pass itself.
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


class LossTap:
    """Learns from the model's own forward which tokens are real and how the loss averages over them.

    The divisor is read from the arguments (`num_items_in_batch`, or the labels that are not -100) and everything
    that is done to the loss afterwards (accumulation, a loss scale, the number of processes) from the gradient that
    arrives at it. transformers' models return `loss`; TRL 1.16 takes `log_probs` and averages outside.

    Attributes:
        context: Of the forward pass under way, or of the one whose backward is: a backward that enters what a forward
            returned brings that forward's context back, whatever has been run since.
    """

    def __init__(self, model: nn.Module, on_window: Callable[[], None]) -> None:
        self.context: ForwardContext | None = None
        self.loss_tokens: float | None = None
        self._on_window = on_window
        self._names = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Detach from the model; whoever still asks for the context is told that there is none."""
        for handle in self._handles:
            handle.remove()
        self.context = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A forward without gradients (evaluation, a reference model) leaves the context to the backward under way.
        if not torch.is_grad_enabled():
            return
        self._on_window()
        inputs = self._by_name(args, kwargs)
        self.context = ForwardContext(_real_tokens(inputs.get("attention_mask")), _tokens(inputs))
        if self.loss_tokens is not None:
            self.context.tokens_per_unit = torch.tensor(float(self.loss_tokens))

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        context = self.context
        if context is None or not torch.is_grad_enabled():
            return

        def enter(grad: Tensor | None) -> None:
            if self.context is not None:
                self.context = context

        for value in _tensors(output):
            if value.grad_fn is not None:  # a parameter would keep the hook
                value.register_hook(enter)  # type: ignore[no-untyped-call]
        if self.loss_tokens is not None:
            return
        log_probs, loss = _field(output, "log_probs"), _field(output, "loss")
        if isinstance(log_probs, Tensor) and log_probs.requires_grad:
            # Each supervised token's log-probability enters the loss with the same weight.
            def from_log_probs(grad: Tensor | None) -> None:
                if grad is not None:  # a compiled model's outputs have hooks called that nobody used
                    context.tokens_per_unit = 1.0 / grad.detach().abs().amax().float()

            log_probs.register_hook(from_log_probs)  # type: ignore[no-untyped-call]
        if isinstance(loss, Tensor) and loss.requires_grad:
            divisor = _loss_divisor(self._by_name(args, kwargs))
            if divisor is None:
                return

            def from_loss(grad: Tensor | None) -> None:
                if grad is not None:
                    context.tokens_per_unit = divisor / grad.detach().float()

            loss.register_hook(from_loss)  # type: ignore[no-untyped-call]

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        # Dynamo of torch 2.8 and 2.9 fails at a zip that is told `strict=False`.
        return {**dict(zip(self._names, args)), **kwargs}  # noqa: B905


class ModuleTap:
    """Statistics from peft's modules: from what `lora_A` returns, and from the gradient of it.

    A token is counted when its gradient arrives, hence once: reentrant checkpointing runs the first forward without
    gradients, non-reentrant back-propagates through the first of two, and DoRA's call of `lora_A` on an identity matrix
    is detached.

    The modules' `forward` is replaced, because a forward hook sends every call the long way through nn.Module: on a
    fast GPU, where the host sets the pace, hooks made a third of what GRIT costs. Whoever restores a `forward` that was
    wrapped before takes ours away with it.
    """

    def __init__(self, lora_a: list[nn.Module], statistics: RankStatistics, loss: LossTap) -> None:
        self.statistics, self.loss, self._modules = statistics, loss, list(lora_a)
        # What compiled code is told of a layer, as a tensor.
        self._places = [torch.tensor([0, layer]) for layer in range(len(lora_a))]
        self._register()
        for layer, (module, place) in enumerate(zip(lora_a, self._places, strict=True)):
            own = vars(module)
            if not {"forward", "_grit_taps"} <= own.keys():
                # A method is copied with its module, and to a compiler one function is the same in all layers.
                own.update(_grit_before=own.get("forward"), _grit_taps=[], _grit_places=[])
                own["forward"] = MethodType(_forward, module)
            own["_grit_taps"].append((self, layer))
            own["_grit_places"].append(place)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()  # a copy is another tap

    def _register(self) -> None:
        number = compiled.register(self)
        for place in self._places:
            place[0] = number

    def remove(self) -> None:
        """Give the modules their own `forward` back; where somebody has wrapped ours, it stays and notes nothing."""
        for module, place in zip(self._modules, self._places, strict=True):
            own = vars(module)
            i = next(i for i, mine in enumerate(own["_grit_places"]) if mine is place)
            del own["_grit_taps"][i], own["_grit_places"][i]
            if not own["_grit_taps"] and getattr(own.get("forward"), "__func__", None) is _forward:
                before = own.pop("_grit_before")
                del own["_grit_taps"], own["_grit_places"], own["forward"]
                if before is not None:
                    own["forward"] = before
        self._modules, self._places = [], []

    def note(self, layer: int, output: Tensor) -> None:
        """Note what a layer's `lora_A` has returned, and ask for its gradient."""
        context, statistics = self.loss.context, self.statistics
        if context is None:
            return
        if not output.requires_grad:
            context.rerun.add(layer)
            return
        if not statistics.collecting:
            return
        if torch._C._current_graph_task_id() == -1:
            context.pending.add(layer)
        elif layer in context.pending and layer not in context.rerun:
            # Recomputed inside the backward: the gradient will go to the first output.
            return
        a = output.detach()
        output.register_hook(lambda g: statistics.add(layer, a, g, context))  # type: ignore[no-untyped-call]


def _forward(module: Any, *inputs: Any, **named: Any) -> Tensor:
    """The forward of a `lora_A` that taps have been put on."""
    before = module._grit_before
    output: Tensor = type(module).forward(module, *inputs, **named) if before is None else before(*inputs, **named)
    if torch.compiler.is_dynamo_compiling():
        for place in module._grit_places:
            output = compiled.note(output, place)
    elif not torch.compiler.is_compiling():  # an exported program is without GRIT
        for tap, layer in module._grit_taps:
            tap.note(layer, output)
    return output


# Pickled by its name; a module that is loaded has its class's: without GRIT.
_forward.__name__ = "forward"


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in what a model returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        yield from _tensors(list(vars(output).values()))


def _tokens(inputs: dict[str, Any]) -> int | None:
    """batch x length of the model's input; None where it is not a batch of sequences."""
    ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.numel()
    return embeddings.shape[:-1].numel() if isinstance(embeddings, Tensor) else None


def _real_tokens(mask: Any) -> Tensor | None:
    """(batch, length) true for real tokens, from a padding mask or the diagonal of a (b, 1, q, k) mask.

    Raises:
        GRITError: the mask has another form, so that padding could not be told from tokens.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    if isinstance(mask, Tensor) and mask.dim() == 4:
        # A token that may not attend to itself is padding; additive masks hold 0 where attention is allowed.
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return diagonal if mask.dtype == torch.bool else diagonal == 0
    form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise GRITError(f"GRIT cannot read the attention mask ({form}): pass a padding mask (batch, length)")


def _loss_divisor(inputs: dict[str, Any]) -> Tensor | float | None:
    """The number of tokens that the model's own loss is averaged over; None without labels."""
    items = inputs.get("num_items_in_batch")
    if items is not None:
        return items.float() if isinstance(items, Tensor) else float(items)
    labels = inputs.get("shift_labels")
    if labels is None and isinstance(inputs.get("labels"), Tensor):
        # A label per sequence (classification) is not shifted; one per token is.
        labels = inputs["labels"] if inputs["labels"].dim() < 2 else inputs["labels"][..., 1:]
    return (labels != -100).sum().float() if isinstance(labels, Tensor) else None
