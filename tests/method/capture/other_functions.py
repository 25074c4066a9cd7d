"""A stand-in of a fused LoRA function that is not Unsloth's: another module, another order, other products."""

import sys

import torch
from fused_functions import WIDTH, Decoder
from torch import nn

MODULE = "another_library.ops.lora"


class LoRAPair(torch.autograd.Function):
    """Two LoRA layers of one x, which comes last; B stands before A, saved tensors are in no order of layers."""

    @staticmethod
    def forward(ctx, W1, W2, B1, A1, B2, A2, scale, x):
        ctx.save_for_backward(W2, W1, B2, x, A1, A2, B1)
        ctx.scale = scale
        return x @ W1.t() + scale * x @ A1.t() @ B1.t(), x @ W2.t() + scale * x @ A2.t() @ B2.t()

    @staticmethod
    def backward(ctx, dy1, dy2):
        W2, W1, B2, x, A1, A2, B1 = ctx.saved_tensors
        flat, found, dx = x.flatten(0, -2), [], 0
        for dy, W, A, B in ((dy1.flatten(0, -2), W1, A1, B1), (dy2.flatten(0, -2), W2, A2, B2)):
            inner = ctx.scale * dy @ B
            found += [ctx.scale * dy.t() @ (flat @ A.t()), inner.t() @ flat]
            dx = dx + dy @ W + inner @ A
        return None, None, *found, None, dx.view_as(x)


class Pair(nn.Module):
    """Through the modules or through the fused function."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, fused):
        if not fused:
            return torch.tanh(self.left(x)) * self.right(x)
        weights = [layer.base_layer.weight for layer in (self.left, self.right)]
        for layer in (self.left, self.right):
            weights += [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
        left, right = sys.modules[MODULE].LoRAPair.apply(*weights, self.left.scaling["default"], x)
        return torch.tanh(left) * right


def decoder():
    """Two such layers, an embedding and a loss."""
    made = Decoder(0)
    made.layers.extend(Pair() for _ in range(2))
    return made
