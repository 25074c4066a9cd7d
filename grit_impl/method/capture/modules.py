"""Rank-space statistics of LoRA layers, one outer product per real token.

For y = W0 x + s B A x, the output of `lora_A` carries both statistics: its value is a = A x, and the gradient of the
loss at it is g = s B' dL/dy, each r numbers per token. The factors are S_a = E[a a'] and S_g = E[g g'] (K-FAC,
Martens & Grosse 2015, in the coordinates of the adapter's rank), so that no d x d matrix is ever formed.

Gradients are taken per token: whatever the loss was divided by (tokens, accumulation, a loss scale) is multiplied
back in, so that S_g does not depend on batch size, accumulation or mixed precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grit_impl.errors import GRITError
from grit_impl.method.capture import compiled
from grit_impl.method.capture.rank_statistics import ForwardContext, RankStatistics


class LossTap:
    """Learns from the model's own forward which tokens are real and how the loss averages over them.

    The divisor is read from the arguments (`num_items_in_batch`, or the labels that are not -100) and everything
    that is done to the loss afterwards (accumulation, a loss scale, the number of processes) from the gradient that
    arrives at it. transformers' models return `loss`; TRL 1.16 takes `log_probs` and averages outside.

    Attributes:
        context: The current forward pass's. When a backward reaches what a forward returned, that forward's context
            is current again, whatever has run since.
    """

    def __init__(self, model: nn.Module, on_window: Callable[[], None], on_backward: Callable[[], None]) -> None:
        self.context: ForwardContext | None = None
        self.loss_tokens: float | None = None
        self._on_window, self._on_backward = on_window, on_backward
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
                self._on_backward()

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

    The modules' `forward` is replaced. A forward hook would send every call the long way through nn.Module: on a fast
    GPU, where the host sets the pace, hooks made a third of what GRIT costs. Code that sets `forward` back to what it
    was before this tap came removes the tap with it.
    """

    def __init__(self, lora_a: list[nn.Module], statistics: RankStatistics, loss: LossTap) -> None:
        self.statistics, self.loss, self._modules = statistics, loss, list(lora_a)
        # Of each layer [number of this tap, index of the layer]: all that compiled code is told.
        self._places = [torch.tensor([0, layer]) for layer in range(len(lora_a))]
        self._register()
        for layer, (module, place) in enumerate(zip(lora_a, self._places, strict=True)):
            own = vars(module)
            if not {"forward", "_grit_taps"} <= own.keys():
                # A bound method: a deep copy is bound to the copied module, and a compiler sees one function for all.
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
            # Recomputed inside the backward, whose gradient will go to the output of the forward pass.
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


# pickle stores a bound method by its name: a module that is loaded has its class's `forward`, without GRIT.
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
