"""Stand-ins with the layout of Unsloth's fused LoRA functions: same saved tensors, same order, same products."""

import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from grit_impl.method.capture.sites import SITES

WIDTH, HIDDEN = 12, 20
MODULE, FUNCTIONS = SITES[0].module, [site.name for site in SITES]


def _linear(x, w, a, b, s):
    return x @ w.t() + s * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()


def _turned(x, *adapters):
    """Each adapter, in x's precision and transposed, as Unsloth's backward begins."""
    return [w.to(x.dtype).t() for w in adapters]


def gradients(x, dy, w, at, bt, s):
    """Gradients of `_linear` for x, a and b, by the products that Unsloth takes."""
    da, db = torch.empty_like(at), torch.empty_like(bt)
    inner = dy @ bt.t()
    da.addmm_(x.t(), inner, alpha=s, beta=0)
    db.addmm_(at.t() @ x.t(), dy, alpha=s, beta=0)
    return (dy @ w).addmm_(inner, at.t(), alpha=s), da.t(), db.t()


def gradients_otherwise(x, dy, w, at, bt, s):
    """The same by other products: of s dL/dy, and of x on the left."""
    a, b = at.t(), bt.t()
    inner = s * dy @ b
    return dy @ w + inner @ a, inner.t() @ x, s * dy.t() @ (x @ a.t())


class LoRA_W(torch.autograd.Function):
    """y = x W' + s (x A') B', its backward as unsloth/kernels/fast_lora.py lays it out."""

    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, S):
        ctx.custom_saved_tensors = (W, W_quant, S)
        ctx.save_for_backward(A, B, X)
        return _linear(X, W, A, B, S)

    @staticmethod
    def backward(ctx, dY):
        W, _, S = ctx.custom_saved_tensors
        A, B, X = ctx.saved_tensors
        flat, outer = X.reshape(-1, X.shape[-1]), dY.reshape(-1, dY.shape[-1])
        dX, dA, dB = gradients(flat, outer, W, *_turned(X, A, B), S)
        return dX.view_as(X), None, None, dA, dB, None


class LoRA_QKV(torch.autograd.Function):
    """Three projections of one input; like Unsloth's, the backward overwrites X in place, unless it is compiled."""

    @staticmethod
    def forward(ctx, X, QW, Qq, QA, QB, QS, KW, Kq, KA, KB, KS, VW, Vq, VA, VB, VS, inplace=True):
        ctx.custom_saved_tensors = (QW, Qq, QS, KW, Kq, KS, VW, Vq, VS)
        ctx.save_for_backward(X, QA, QB, KA, KB, VA, VB)
        return _linear(X, QW, QA, QB, QS), _linear(X, KW, KA, KB, KS), _linear(X, VW, VA, VB, VS)

    @staticmethod
    def backward(ctx, dQ, dK, dV):
        QW, _, QS, KW, _, KS, VW, _, VS = ctx.custom_saved_tensors
        X, QA, QB, KA, KB, VA, VB = ctx.saved_tensors
        flat = X.reshape(-1, X.shape[-1])
        found = [
            gradients(flat, dy.reshape(-1, dy.shape[-1]), w, *_turned(X, a, b), s)
            for dy, w, a, b, s in ((dQ, QW, QA, QB, QS), (dK, KW, KA, KB, KS), (dV, VW, VA, VB, VS))
        ]
        dX = sum(f[0] for f in found).view_as(X)
        if not torch.compiler.is_compiling():
            with torch.no_grad():
                X.fill_(float("nan"))
        (_, qa, qb), (_, ka, kb), (_, va, vb) = found
        return dX, None, None, qa, qb, None, None, None, ka, kb, None, None, None, va, vb, None, None


def _swiglu(e, g):
    return nn.functional.silu(e) * g


def _swiglu_backward(DW, e, g):
    """(h, gradient at up's output, gradient at gate's output), as Unsloth's kernel returns them."""
    sigmoid = torch.sigmoid(e)
    f = e * sigmoid
    return f * g, DW * f, DW * g * sigmoid * (1 + e * (1 - sigmoid))


class LoRA_MLP(torch.autograd.Function):
    """down(silu(gate(x)) up(x)); the gradients at gate and up exist only inside the kernel that is passed in."""

    @staticmethod
    def forward(ctx, X, gW, gq, gA, gB, gS, uW, uq, uA, uB, uS, dW, dq, dA, dB, dS, forward_kernel, backward_kernel):
        e, g = _linear(X, gW, gA, gB, gS), _linear(X, uW, uA, uB, uS)
        ctx.custom_saved_tensors = (gW, gq, gS, uW, uq, uS, dW, dq, dS, backward_kernel)
        ctx.save_for_backward(gA, gB, uA, uB, dA, dB, X, e, g)
        return _linear(forward_kernel(e, g), dW, dA, dB, dS)

    @staticmethod
    def backward(ctx, dY):
        gW, _, gS, uW, _, uS, dW, _, dS, kernel = ctx.custom_saved_tensors
        gA, gB, uA, uB, dA, dB, X, e, g = ctx.saved_tensors
        X2, dY2 = X.reshape(-1, X.shape[-1]), dY.reshape(-1, dY.shape[-1])
        gA, gB, uA, uB, dA, dB = _turned(X, gA, gB, uA, uB, dA, dB)
        DW = dY2 @ dW + dS * (dY2 @ dB.t()) @ dA.t()
        h, df, de = kernel(DW, e.reshape(-1, e.shape[-1]), g.reshape(-1, g.shape[-1]))
        _, downA, downB = gradients(h, dY2, dW, dA, dB, dS)
        x_up, upA, upB = gradients(X2, df, uW, uA, uB, uS)
        x_gate, gateA, gateB = gradients(X2, de, gW, gA, gB, gS)
        nones = (None, None)
        return (
            (x_up + x_gate).view_as(X),
            *nones,
            gateA,
            gateB,
            None,
            *nones,
            upA,
            upB,
            None,
            *nones,
            downA,
            downB,
        ) + (None,) * 3


class Layer(nn.Module):
    """One attention-like and one MLP-like block, through the modules or through the fused functions."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x, fused):
        if fused:
            module = sys.modules[MODULE]
            q, k, v = module.LoRA_QKV.apply(
                x.clone(), *weights_of(self.q_proj), *weights_of(self.k_proj), *weights_of(self.v_proj)
            )
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        mixed = torch.tanh(q) * k + v
        if fused:
            out = module.LoRA_W.apply(mixed, *weights_of(self.o_proj))
            names = ("gate_proj", "up_proj", "down_proj")
            weights = [each for name in names for each in weights_of(getattr(self, name))]
            return out + module.LoRA_MLP.apply(out, *weights, _swiglu, _swiglu_backward)
        out = self.o_proj(mixed)
        return out + self.down_proj(_swiglu(self.gate_proj(out), self.up_proj(out)))


class Decoder(nn.Module):
    """Such layers, with an embedding and a loss; `checkpointing` is None, "reentrant" or "not reentrant"."""

    def __init__(self, layers=1):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.embed = nn.Embedding(30, WIDTH)
        self.fused = False
        self.checkpointing = None

    def forward(self, input_ids, attention_mask=None, labels=None):
        out = self.embed(input_ids)
        for layer in self.layers:
            if self.checkpointing is None:
                out = layer(out, self.fused)
            else:
                out = checkpoint(layer, out, self.fused, use_reentrant=self.checkpointing == "reentrant")
        real = (labels[:, 1:] != -100).unsqueeze(-1)
        return {"loss": (out[:, :-1].pow(2).sum(-1, keepdim=True) * real).sum() / real.sum()}


def weights_of(layer):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer.weight, None, a, b, layer.scaling["default"]
