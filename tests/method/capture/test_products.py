"""The operands that stand for adapters in a fused function, and what they note."""

from __future__ import annotations

import torch

from grit_impl.method.capture.products import Products


def test_dropout_makes_x_inside_the_function():
    """Oracle: by hand: x is not what A is multiplied by then, so that nothing can be noted, whatever was before."""
    products = Products([torch.zeros(3, 5), torch.zeros(4, 3)])
    for complete, without in ((None, (True, True)), (True, (True, False)), (False, (False, True))):
        products.complete = complete
        assert products.begin((None,), [1, 2]) == without
        assert products.begin((torch.ones(2, 5),), [1, 2]) == (False, True)


def test_an_operand_is_its_adapter():
    """Oracle: the plain tensor. Only the expected product is noted."""
    a, b, x, dy = torch.randn(3, 5), torch.randn(4, 3), torch.randn(2, 5), torch.randn(2, 4)
    products = Products([a, b])
    products.begin((), [x.data_ptr(), dy.data_ptr()])
    for plain, operand in zip((a, b), products.operands, strict=True):
        for do in (
            torch.empty_like,
            torch.Tensor.numel,
            lambda w: w.shape,
            lambda w: w.t() @ torch.ones(w.shape[0], 2),
            lambda w: w @ torch.ones(w.shape[1], 2),
            lambda w: torch.ones(2, w.shape[0]) @ w,
            lambda w: torch.zeros(2, w.shape[1]).addmm_(torch.ones(2, w.shape[0]), w, alpha=2.0),
            lambda w: torch.cat([w, w]),
            lambda w: torch.nn.functional.linear(torch.ones(2, w.shape[1]), w),
            lambda w: 2 * w + w,
            lambda w: w.to(torch.float64),
            lambda w: w.to(torch.float32).t().t(),
            lambda w: w.t().to(torch.float32).contiguous(),
            lambda w: w.mT,
        ):
            ours, truth = do(operand), do(plain)
            if do is torch.empty_like:
                ours, truth = ours.shape, truth.shape
            assert torch.equal(ours, truth) if isinstance(truth, torch.Tensor) else ours == truth
    assert products.found == [None, None]
    operand_a, operand_b = products.operands
    assert torch.equal(operand_a.t().t() @ x.t(), a @ x.t())
    assert torch.equal(torch.matmul(dy, operand_b.t().t()), dy @ b)
    assert torch.equal(products.found[0], a @ x.t())
    assert torch.equal(products.found[1], dy @ b)
    # There is nothing more to note: from here on the function has the adapters themselves.
    assert operand_a.t().t() is a
    assert products.end()[1] is not None
    assert products.complete
