"""What the ledger sees of others' hooks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from grit_impl.ledger.fingerprints import Fingerprinter
from grit_impl.ledger.shadow import _orthogonal
from grit_impl.ledger.watches import HookWatch, MemoryWatch, access
from grit_impl.ledger.watches.kept import KeptWatch


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.base = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_A(x)


@pytest.mark.parametrize("how", ["forward hook", "forward of its own", "none"])
def test_hooked_modules_are_counted_when_called(how: str) -> None:
    """Oracle: by hand: whoever listens to lora_A, by a hook or a forward in its place, is seen, and each call is."""
    model = Layer()
    if how == "forward hook":
        model.lora_A.register_forward_hook(lambda *_: None)
    elif how == "forward of its own":
        model.lora_A.forward = partial(nn.Linear.forward, model.lora_A)  # type: ignore[method-assign]
    watch = HookWatch(model)
    watch.look([], dict)
    assert watch.facts() == ({} if how == "none" else {"hooked_modules": 1, "module_calls": 0})
    model(torch.zeros(1, 3))
    model(torch.zeros(1, 3))
    assert watch.facts() == ({} if how == "none" else {"hooked_modules": 1, "module_calls": 2})
    watch.remove()


def test_the_share_of_the_way_that_is_kept() -> None:
    """Oracle: by hand, two weights: half of the way taken back, a move across it, and nothing."""
    look, watch = Fingerprinter(2), KeptWatch(3)
    begin = [torch.zeros(2), torch.zeros(2), torch.zeros(2)]
    left = [torch.tensor([2.0, 0.0]), torch.tensor([2.0, 0.0]), torch.ones(2)]
    now = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, 5.0]), torch.ones(2)]
    assert watch.look(look(begin), None) is None
    found = watch.look(look(now), look(left))
    assert found is not None
    torch.testing.assert_close(found[:2], torch.tensor([[0.5, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert found[2].isnan().all()
    # Whoever wrote begins anew: all of the way since then is taken back.
    again = watch.look(look([now[0]] * 3), look([torch.tensor([1.0, 3.0])] * 3))
    assert again is not None
    torch.testing.assert_close(again[0], torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_each_of_several_hooks_is_seen_apart() -> None:
    """Oracle: by hand: 1 as autograd made it, 2 after the first hook, 6 after the second; each hook runs once."""
    p, kept = nn.Parameter(torch.zeros(1)), {}
    watch = HookWatch(Layer())
    p.register_hook(lambda g: 2 * g)
    p.register_hook(lambda g: 3 * g)
    watch.look([p], lambda j: kept.setdefault(j, {}))
    p.sum().backward()
    assert (float(kept[0][0]), float(kept[1][0]), float(p.grad)) == (1.0, 2.0, 6.0)
    assert watch.repeated == set()
    watch.remove()
    assert len(p._backward_hooks) == 2


@pytest.mark.parametrize("same", [True, False])
def test_one_hook_registered_twice(same: bool) -> None:
    """Oracle: one function with one argument is one hook, however often it is wrapped; with another it is not."""
    p, watch = nn.Parameter(torch.zeros(1)), HookWatch(Layer())

    def scale(by: list[float], grad: torch.Tensor) -> torch.Tensor:
        return by[0] * grad

    by = [2.0]
    for _ in range(2):
        p.register_hook(partial(scale, by if same else [2.0]))
    watch.look([p], lambda j: {})
    assert watch.repeated == ({0} if same else set())


@pytest.mark.parametrize("asks", ["another model's", "this one's", "this one's, through its gradients", "garbage"])
def test_hooks_left_behind(asks: str) -> None:
    """Oracle: whose hooks they are: those of another model's adapter say nothing about this one."""

    class Reader:
        def __init__(self, *known: nn.Module) -> None:
            self.known = known
            for part in known:
                getattr(part, "lora_A", part).register_forward_hook(lambda *_: self)

    model, old = Layer(), Layer()
    watch, left = MemoryWatch(model), old.lora_A
    Reader(model, left) if asks == "this one's" else Reader(left)
    if asks == "this one's, through its gradients":
        watch.read[id(left.weight)] = left.weight
    del old
    if asks == "garbage":
        del left
    watch.look(2, set(), [model.lora_A.weight])
    assert watch.dead_hooks == asks.startswith("this one's")


def test_cosine_of_orthogonal_factors() -> None:
    """Oracle: by hand: one rotation but for singular values; a rotation by 60 degrees; SGD; what is not finite."""
    turned = torch.tensor([[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]])
    eye, raw = torch.eye(2), torch.diag(torch.tensor([5.0, 0.1]))
    assert float(_orthogonal(torch.diag(torch.tensor([0.7, 1.2])), eye, raw)) == pytest.approx(1)
    assert float(_orthogonal(turned, eye, raw)) == pytest.approx(0.5)
    assert _orthogonal(eye, raw, raw).isnan()
    assert _orthogonal(eye, eye, raw.flatten()).isnan()
    for value in (float("inf"), float("nan"), 0.0):
        assert _orthogonal(torch.full((2, 2), value), torch.full((2, 2), value), raw).isnan()


def test_reads_and_assignments_are_heard() -> None:
    """Oracle: what was read and written, and torch's own attribute afterwards."""
    p, heard = nn.Parameter(torch.zeros(1)), []

    def listener(parameter: nn.Parameter, grad: torch.Tensor | None, assigned: bool) -> None:
        heard.append((parameter is p, None if grad is None else float(grad), assigned))

    access.listen(listener)
    p.grad = torch.ones(1)
    assert float(p.grad) == 1.0
    access.ignore(listener)
    assert float(p.grad) == 1.0
    assert heard == [(True, None, True), (True, 1.0, False)]
    assert "grad" not in vars(nn.Parameter)
