"""Oracle a and e of the method: the factors against the exact Fisher, summed outer product by outer product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

# float64 sums of some hundred terms of order one: 1e-15 each, amplified by condition numbers below 1e3.
EXACT = 1e-11
# An exact identity is off by rounding; a wrong one by its size. Where K-FAC is not exact the error is of order one.
WRONG = 1e-2


def whitened(n: int, d: int) -> Tensor:
    """(n, d) float64 rows with E[x x'] = I."""
    return torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q * n**0.5


def pairs(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Every x with every dy: x and dy are independent, exactly."""
    return x.repeat_interleave(len(dy), 0), dy.repeat(len(x), 1)


def data(case: str, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients for which K-FAC's approximation is an identity (or, for `dependent`, is not)."""
    x, dy = torch.randn(7, d_in, dtype=torch.float64), torch.randn(9, d_out, dtype=torch.float64)
    if case == "one-datum":
        return x[:1], dy[:1]
    if case == "constant-x":
        return x[:1].expand(9, -1).contiguous(), dy
    if case == "independent":
        return pairs(x, dy)
    if case == "linear-mse":
        # Labels sampled from the Gaussian model have residuals with E[e e'] = I, whatever x is.
        basis = torch.eye(d_out, dtype=torch.float64) * d_out**0.5
        return pairs(x, torch.cat((basis, -basis)))
    return x, dy[:7] + x @ torch.randn(d_in, d_out, dtype=torch.float64)


def fisher_blocks(model: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tokens of vec(grad) vec(grad)' for A and for B: one backward pass per token, nothing approximated."""
    weights = [p for p in model.parameters() if p.requires_grad]
    blocks = [torch.zeros(w.numel(), w.numel(), dtype=w.dtype) for w in weights]
    for i in range(len(x)):
        grads = torch.autograd.grad(model(x=x[i : i + 1], dy=dy[i : i + 1])["loss"], weights)
        for block, grad in zip(blocks, grads, strict=True):
            block += torch.outer(grad.flatten(), grad.flatten()) / len(x)
    return blocks[0], blocks[1]


@pytest.mark.parametrize("case", ["one-datum", "constant-x", "independent", "linear-mse"])
def test_kfac_is_the_exact_fisher_block(case: str, linear: Any, fit: Any, relative: Any) -> None:
    """Oracle a: explicit float64 Fisher of A is S_g (x) E[x x'], and that of B is E[dy dy'] (x) s^2 S_a."""
    model = linear()
    x, dy = data(case, 5, 6)
    manager = fit(model, x, dy)
    manager.precondition()
    s_a, s_g = manager.factors.covariances()[:, 0]
    block_a, block_b = fisher_blocks(model, x, dy)
    scaling = manager.layers[0].module.scaling["default"]
    assert relative(torch.kron(s_g, x.T @ x / len(x)), block_a) < EXACT
    assert relative(torch.kron(dy.T @ dy / len(x), scaling**2 * s_a), block_b) < EXACT


def test_kfac_is_not_exact_where_it_should_not_be(linear: Any, fit: Any, relative: Any) -> None:
    """Oracle a, control: with x and dy dependent the same comparison fails, so it can fail."""
    model = linear()
    x, dy = data("dependent", 5, 6)
    manager = fit(model, x, dy)
    manager.precondition()
    block_a, _ = fisher_blocks(model, x, dy)
    assert relative(torch.kron(manager.factors.covariances()[1, 0], x.T @ x / len(x)), block_a) > WRONG


def test_preconditioning_is_the_natural_gradient(linear: Any, fit: Any, relative: Any) -> None:
    """Oracle a: where x (for A) and dy (for B) are white and independent, F^-1 vec(grad) solved densely."""
    model = linear()
    x, dy = pairs(whitened(8, 5), whitened(11, 6))
    manager = fit(model, x, dy)
    layer = manager.layers[0]
    raw = [layer.a.grad.clone(), layer.b.grad.clone()]
    manager.precondition()
    manager.detach()
    blocks = fisher_blocks(model, x, dy)
    for block, grad, new in zip(blocks, raw, (layer.a.grad, layer.b.grad), strict=True):
        natural = torch.linalg.solve(block, grad.flatten()).view_as(grad)
        scale = layer.module.scaling["default"] ** 2 if grad is raw[1] else 1.0
        assert relative(new / scale, natural) < EXACT


def test_statistics_are_the_weights_images_of_the_outer_ones(linear: Any, fit: Any, relative: Any) -> None:
    """Oracle e: S_a = A S_x A' and S_g = s^2 B' S_dy B, computed from the weights."""
    model = linear()
    x, dy = data("dependent", 5, 6)
    manager = fit(model, x, dy)
    layer = manager.layers[0]
    a, b, s = layer.a.detach(), layer.b.detach(), layer.module.scaling["default"]
    manager.precondition()
    s_a, s_g = manager.factors.covariances()[:, 0]
    assert relative(s_a, a @ (x.T @ x / len(x)) @ a.T) < EXACT
    assert relative(s_g, s**2 * b.T @ (dy.T @ dy / len(x)) @ b) < EXACT


def test_white_data_gives_riemannian_lora(linear: Any, fit: Any, relative: Any) -> None:
    """Oracle e: for white x and dy, dA <- (B'B)^-1 dA / s^2 and dB <- dB (AA')^-1 (scaled gradient descent)."""
    model = linear()
    x, dy = pairs(whitened(8, 5), whitened(11, 6))
    manager = fit(model, x, dy)
    layer = manager.layers[0]
    a, b, s = layer.a.detach(), layer.b.detach(), layer.module.scaling["default"]
    raw_a, raw_b = layer.a.grad.clone(), layer.b.grad.clone()
    manager.precondition()
    assert relative(layer.a.grad, torch.linalg.solve(b.T @ b, raw_a) / s**2) < EXACT
    assert relative(layer.b.grad, torch.linalg.solve(a @ a.T, raw_b, left=False)) < EXACT


def test_exponential_average_weighs_tokens_not_steps(linear: Any, fit: Any, relative: Any) -> None:
    """Oracle: two steps of 3 and 5 tokens give sum(d^k outer) / sum(d^k n); no bias of the first steps is left."""
    decay = 0.5
    model = linear()
    x, dy = data("dependent", 5, 6)
    manager = fit(model, x[:3], dy[:3], factor_decay=decay)
    manager.precondition()
    model.zero_grad()
    manager.loss_tokens = 4
    model(x=x[3:], dy=dy[3:])["loss"].backward()
    manager.precondition()
    a = x @ manager.layers[0].a.detach().T
    expected = (decay * a[:3].T @ a[:3] + a[3:].T @ a[3:]) / (decay * 3 + 4)
    assert relative(manager.factors.covariances()[0, 0], expected) < EXACT


def test_damping_is_relative_to_the_trace_or_absolute(linear: Any, fit: Any, relative: Any) -> None:
    """Oracle: (S + d I)^-1 by dense inversion, d = damping * trace(S) / r or d = damping."""
    x, dy = data("dependent", 5, 6)
    for mode, damping in (("relative", 0.3), ("absolute", 0.7)):
        manager = fit(linear(), x, dy, kfac_damping=damping, damping_mode=mode)
        manager.precondition()
        for side in (0, 1):
            s = manager.factors.covariances()[side, 0]
            d = damping * s.trace() / 3 if mode == "relative" else damping
            assert relative(manager.factors.inverse[side, 0], torch.linalg.inv(s + d * torch.eye(3).double())) < EXACT
