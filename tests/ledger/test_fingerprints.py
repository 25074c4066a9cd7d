"""Fingerprints, rank operators and optimizer shadows, each against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grit_impl.ledger.fingerprints import Fingerprinter, hashes
from grit_impl.ledger.shadow import Shadows
from grit_impl.ledger.structure import Grams, gram
from grit_impl.ledger.timeline import turn


def fingerprints(*tensors):
    table = Fingerprinter(max(t.numel() for t in tensors if t is not None))(list(tensors)).table
    return table, hashes(table)


def test_norm_is_exact_and_none_is_nan():
    """Oracle: torch.linalg.vector_norm."""
    a, b = torch.randn(7, 30), torch.randn(50, 3)
    table, _ = fingerprints(a, None, b)
    torch.testing.assert_close(table[[0, 2], 1], torch.stack([a.double().norm(), b.double().norm()]))
    assert table[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hash_sees_one_bit(dtype):
    """Oracle: bits. Equal tensors have equal hashes in any position; the smallest change of any one element is seen."""
    x = torch.randn(5, 40, dtype=dtype)
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    for index in (0, 17, 199):
        changed = x.clone()
        changed.view(bits.dtype).view(-1)[index] ^= 1
        _, h = fingerprints(x, changed, x.clone())
        assert h[0] == h[2] != h[1]


def test_hash_sees_order_and_sign():
    """Oracle: norms cannot tell these apart."""
    x = torch.randn(300)
    _, h = fingerprints(x, -x, x.flip(0))
    assert len(set(h.tolist())) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hash_sees_signs(dtype):
    """Oracle: 2,000 gradients clipped by value to one size, no two with the same signs, have 2,000 hashes."""
    signs = torch.randint(0, 2, (2000, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert len(set(map(tuple, signs.tolist()))) == 2000
    _, h = fingerprints(*(1e-10 * signs).to(dtype))
    assert len(set(h.tolist())) == 2000


def test_size_does_not_matter():
    """Oracle: the same tensors, looked at one by one with room for larger ones."""
    tensors = [torch.randn(4, 32) for _ in range(9)]
    together = Fingerprinter(128)(tensors).table
    alone = torch.cat([Fingerprinter(70_000)([t]).table for t in tensors])
    torch.testing.assert_close(together[:, 1:], alone[:, 1:], rtol=1e-12, atol=0)
    assert torch.equal(hashes(together), hashes(alone))


@pytest.mark.parametrize("angle", [1e-3, 1e-2, 0.3, 1.5, 3.0])
def test_angles_are_exact(angle):
    """Oracle: the angle by construction, to the rounding of float32; a scalar turns nothing, in bfloat16 neither."""
    x, z = torch.randn(20, 512), torch.randn(20, 512)
    z -= (z * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True) * x
    z *= x.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True)
    take = Fingerprinter(512)
    first = take(list(x))
    then = take(list(np.cos(angle) * x + np.sin(angle) * z), first)
    found = turn(then.table[:, 2].numpy(), first.table[:, 1].numpy(), then.table[:, 1].numpy())
    np.testing.assert_allclose(found, 1 - np.cos(angle), atol=1e-6)
    coarse = take(list(x.bfloat16()))
    scaled = take(list(x.bfloat16() * 0.37), coarse)
    assert turn(scaled.table[:, 2].numpy(), coarse.table[:, 1].numpy(), scaled.table[:, 1].numpy()).max() < 2e-5


def test_distances_and_missing_tensors():
    """Oracle: torch.dist, of a difference a million times smaller than the tensors; NaN where one was not there, or
    had another size; a shape's neighbours do not matter."""
    x = [torch.randn(4, 6), None, torch.randn(4, 6), torch.randn(9)]
    take = Fingerprinter(24)
    first = take(x)
    moved = [x[0] + 1e-6, torch.randn(4, 6), x[2] - 1e-6, torch.randn(8)]
    found = take(moved, first, distances=True).table[:, 2]
    expected = torch.stack([torch.dist(moved[i].double(), x[i].double()) for i in (0, 2)])
    torch.testing.assert_close(found[[0, 2]], expected, rtol=1e-5, atol=0)
    assert found[[1, 3]].isnan().all()


# Residuals come from inner products in float64: the square root of what cancels there.
EXACT = 1e-7


def grams(*gradients):
    """Inner products of gradients given as arrays."""
    return Grams(gram([torch.as_tensor(g) for g in gradients]).numpy())


@pytest.mark.parametrize("side", ["A", "B"])
def test_rank_operator_is_recovered(side):
    """Oracle: the matrix that made the gradient; a second, different change is not explained by it."""
    rng = np.random.default_rng(0)
    p, g = rng.normal(size=(4, 4)), rng.normal(size=(4, 30))
    noisy, other = p @ g + 0.3 * rng.normal(size=g.shape), rng.normal(size=g.shape)
    made = [g, p @ g, 3 * p @ p @ g, noisy, other]
    found = grams(*(made if side == "A" else [np.ascontiguousarray(x.T) for x in made]))
    operator = found.fit(0, 1)
    np.testing.assert_allclose(operator.matrix, p, atol=1e-10)
    assert operator.residual < EXACT
    assert found.scaling_residual(1, 2, operator.matrix) < EXACT
    assert found.scaling_residual(1, 3, operator.matrix) > 0.1
    assert found.fit(0, 4).residual > 0.5
    assert grams(4 * np.eye(4), 4 * np.eye(4)).fit(0, 1).identity_distance < 1e-12


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_inner_products_give_the_least_squares_solution(condition):
    """Oracle: numpy's least squares on the gradients themselves, and residuals of the plain definition."""
    rng = np.random.default_rng(1)
    spread = np.diag(np.geomspace(1, 1 / condition, 16))
    raw = spread @ rng.normal(size=(16, 700))
    written = rng.normal(size=(16, 16)) @ raw + 0.1 * rng.normal(size=raw.shape)
    matrix = np.linalg.lstsq(raw.T, written.T, rcond=None)[0].T
    found = grams(raw, written)
    operator = found.fit(0, 1)
    np.testing.assert_allclose(operator.matrix, matrix, rtol=1e-6, atol=1e-6 * np.abs(matrix).max())
    expected = np.linalg.norm(matrix @ raw - written) / np.linalg.norm(written)
    assert operator.residual == pytest.approx(expected, rel=1e-6)
    c = (raw * written).sum() / (raw**2).sum()
    scaled = np.linalg.norm(written - c * raw) / np.linalg.norm(written)
    assert found.scaling_residual(0, 1) == pytest.approx(scaled, rel=1e-6)


def test_no_operator_where_the_gradient_does_not_determine_it():
    """Oracle: zero, not finite; nothing written. Short of rank: the residual of numpy's least squares."""
    rng = np.random.default_rng(2)
    g = rng.normal(size=(4, 30))
    short, infinite = g.copy(), g.copy()
    short[3] = short[2]
    infinite[1, 1] = np.inf
    found = grams(g, short, infinite, 0 * g)
    assert found.fit(0, 1) is not None
    fitted = short.T @ np.linalg.lstsq(short.T, g.T, rcond=1e-9)[0]
    operator = found.fit(1, 0)
    assert not operator.determined
    assert operator.residual == pytest.approx(np.linalg.norm(fitted.T - g) / np.linalg.norm(g), rel=1e-6)
    for raw, written in ((2, 0), (0, 2), (3, 0), (0, 3)):
        assert found.fit(raw, written) is None, (raw, written)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shadows_against_real_optimizers(name):
    """Oracle: two real optimizers, one given the written gradients and one the raw ones.

    The replay must give the first one's update exactly. The raw shadow must give the second one's, whose parameters
    are put on the first one's before each step.
    """
    torch.manual_seed(0)
    p = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 4))]
    q = [nn.Parameter(x.detach().clone()) for x in p]
    real, other = OPTIMIZERS[name](p), OPTIMIZERS[name](q)
    shadows = Shadows(dict(enumerate(p)))
    for _ in range(5):
        raw = [torch.randn_like(x) for x in p]
        for x, y, g in zip(p, q, raw, strict=True):
            x.grad, y.grad = g.abs() * g, g.clone()
            y.data.copy_(x.data)
        start = [x.detach().clone() for x in p]
        shadows.before(real)
        real.step()
        other.step()
        found = shadows.after(real, dict(enumerate(raw)), None)
        for row, x, y, s in zip(found, p, q, start, strict=True):
            u, v = (x - s).flatten(), (y - s).flatten()
            assert float(row[0]) == pytest.approx(float(u.norm()), rel=1e-4)
            assert float(row[1]) == pytest.approx(float(v.norm()), rel=1e-4)
            assert float(row[2]) == pytest.approx(float(torch.cosine_similarity(u, v, 0)), abs=1e-4)
            assert float(row[3]) < 1e-6
            assert float(row[4]) == pytest.approx(1, abs=1e-6)
            assert float(row[5]) > 0.01
    assert shadows.problem is None


def test_an_optimizer_that_cannot_be_copied_is_reported():
    """Oracle: LBFGS needs a closure; the observer must say so and stay silent."""
    p = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.LBFGS([p])
    p.grad = torch.ones(3)
    shadows = Shadows({0: p})
    shadows.before(optimizer)
    assert shadows.after(optimizer, {0: p.grad}, None)[:, 1:].isnan().all()
    assert "LBFGS" in shadows.problem
