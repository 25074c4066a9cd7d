"""Rank-space statistics of LoRA layers, one outer product per real token.

For y = W0 x + s B A x, the output of `lora_A` carries both statistics: its value is a = A x, and the gradient of the
loss at it is g = s B' dL/dy, each r numbers per token. The factors are S_a = E[a a'] and S_g = E[g g'] (K-FAC,
Martens & Grosse 2015, in the coordinates of the adapter's rank), so that no d x d matrix is ever formed.

Gradients are taken per token: whatever the loss was divided by (tokens, accumulation, a loss scale) is multiplied
back in, so that S_g does not depend on batch size, accumulation or mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit_impl.errors import GRITError


@dataclass
class ForwardContext:
    """What one forward pass of the model knows about its tokens.

    Attributes:
        mask: (batch, length) 1 for real tokens, 0 for padding; None: all tokens are real.
        tokens_per_unit: 0-dim tensor; what a gradient is multiplied by to become the gradient of one token's
            loss. None until the backward pass has reached the loss.
    """

    mask: Tensor | None
    tokens_per_unit: Tensor | None = None


class RankStatistics:
    """Sums over tokens for all layers, each kind in one stacked float32 tensor.

    Args:
        layers: Number of layers, L.
        rank: Largest rank r; layers of smaller rank use the leading rows and columns.
        device: Where the adapters are.

    Attributes:
        sum_a: (L, r, r), the sum of a a' over the tokens since the last `reset`.
        sum_g: (L, r, r), the sum of g g'.
        cross: (L, r, r), the sum of (raw) g a'; only while `check_completeness`.
        tokens: (L,), the number of tokens.
    """

    def __init__(self, layers: int, rank: int, device: torch.device) -> None:
        zeros = torch.zeros(3, layers, rank, rank, device=device)
        self.sum_a, self.sum_g, self.cross = zeros[0], zeros[1], zeros[2]
        self.tokens = torch.zeros(layers, device=device)
        self.check_completeness = False
        self.collecting = True

    @torch.no_grad()
    def add(self, layer: int, a: Tensor, g: Tensor, context: ForwardContext) -> None:
        """Add one call of a layer.

        Args:
            layer: Index of the layer.
            a: (..., r) output of lora_A, any dtype.
            g: (..., r) gradient of the (scaled, averaged) loss at that output.
            context: The forward pass that the call belongs to.

        Raises:
            GRITError: the loss was not seen, or the tokens do not match the attention mask.
        """
        if context.tokens_per_unit is None:
            raise GRITError(
                "GRIT cannot tell how the loss averages over tokens: pass labels to the model's forward so that it "
                "returns a loss, or set manager.loss_tokens to the number of tokens the loss is averaged over"
            )
        rank = a.shape[-1]
        with torch.autocast(device_type=a.device.type, enabled=False):
            a = a.reshape(-1, rank).float()
            raw = g.reshape(-1, rank).float()
            if context.mask is None:
                self.tokens[layer] += a.shape[0]
            else:
                real = context.mask.reshape(-1, 1)
                if real.shape[0] != a.shape[0]:
                    raise GRITError(
                        f"a LoRA layer saw {a.shape[0]} tokens where the attention mask has {real.shape[0]}: GRIT "
                        "supports layers that see every token once (no expert routing)"
                    )
                a, raw = a * real, raw * real
                self.tokens[layer] += real.sum()
            g = raw * context.tokens_per_unit
            self.sum_a[layer, :rank, :rank].addmm_(a.T, a)
            self.sum_g[layer, :rank, :rank].addmm_(g.T, g)
            if self.check_completeness:
                self.cross[layer, :rank, :rank].addmm_(raw.T, a)

    def reset(self) -> None:
        """Forget the sums."""
        for tensor in (self.sum_a, self.sum_g, self.cross, self.tokens):
            tensor.zero_()


class LossTap:
    """Learns from the model's own forward which tokens are real and how the loss averages over them.

    The divisor is read from the arguments (`num_items_in_batch`, or the labels that are not -100) and everything
    that is done to the loss afterwards (accumulation, a loss scale, the number of processes) from the gradient that
    arrives at it. transformers' models return `loss`; TRL 1.16 takes `log_probs` and averages outside.
    """

    def __init__(self, model: nn.Module, on_window: Callable[[], None]) -> None:
        self.context: ForwardContext | None = None
        self.loss_tokens: float | None = None
        self._on_window = on_window
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            self.context = None
            return
        self._on_window()
        self.context = ForwardContext(_real_tokens(kwargs.get("attention_mask")))
        if self.loss_tokens is not None:
            self.context.tokens_per_unit = torch.tensor(float(self.loss_tokens))

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        context = self.context
        if context is None or self.loss_tokens is not None:
            return
        log_probs, loss = _field(output, "log_probs"), _field(output, "loss")
        if isinstance(log_probs, Tensor) and log_probs.requires_grad:
            # Each supervised token's log-probability enters the loss with the same weight.
            def from_log_probs(grad: Tensor) -> None:
                context.tokens_per_unit = 1.0 / grad.detach().abs().amax().float()

            log_probs.register_hook(from_log_probs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            divisor = _loss_divisor(kwargs)
            if divisor is None:
                return

            def from_loss(grad: Tensor) -> None:
                context.tokens_per_unit = divisor / grad.detach().float()

            loss.register_hook(from_loss)


class ModuleTap:
    """Statistics from peft's modules: a hook on each `lora_A`, and one on the gradient of its output.

    A token is counted when its gradient arrives, hence once: reentrant checkpointing runs the first forward without
    gradients, non-reentrant back-propagates through one of its two forwards, and DoRA's call of `lora_A` on an
    identity matrix is detached.
    """

    def __init__(self, lora_a: list[nn.Module], statistics: RankStatistics, loss: LossTap) -> None:
        self._statistics, self._loss = statistics, loss
        self._handles = [module.register_forward_hook(self._hook(i)) for i, module in enumerate(lora_a)]

    def remove(self) -> None:
        """Detach from the modules."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        statistics, loss = self._statistics, self._loss

        def forward_hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            context = loss.context
            if context is None or not (statistics.collecting and output.requires_grad):
                return
            a = output.detach()
            output.register_hook(lambda g: statistics.add(layer, a, g, context))

        return forward_hook


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _real_tokens(mask: Any) -> Tensor | None:
    """(batch, length) float mask of real tokens, from a padding mask or the diagonal of a (b, 1, q, k) mask."""
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:
        # A token that may not attend to itself is padding; additive masks hold 0 where attention is allowed.
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return diagonal.float() if mask.dtype == torch.bool else (diagonal == 0).float()
    return mask.float() if mask.dim() == 2 else None


def _loss_divisor(kwargs: dict[str, Any]) -> Tensor | float | None:
    """The number of tokens that the model's own loss is averaged over; None without labels."""
    items = kwargs.get("num_items_in_batch")
    if items is not None:
        return items.float() if isinstance(items, Tensor) else float(items)
    labels = kwargs.get("shift_labels")
    if labels is None and isinstance(kwargs.get("labels"), Tensor):
        labels = kwargs["labels"][..., 1:]
    return (labels != -100).sum().float() if isinstance(labels, Tensor) else None
