"""Models of which something is compiled: compilers trace backward passes with tensors that have no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from grit_impl import gradient_ledger, judge
from grit_impl.zoo.bench import Bench, Whitening

STEPS = 6
Loss = Callable[[Bench, Tensor], Tensor]


def the_model(bench: Bench) -> Loss:
    model = torch.compile(bench.model, backend="aot_eager")
    return lambda _, rows: model(input_ids=rows, labels=rows).loss


def its_layers(bench: Bench) -> Loss:
    for layer in bench.model.get_base_model().model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    return lambda bench, rows: bench.model(input_ids=rows, labels=rows).loss


def the_loss(bench: Bench) -> Loss:
    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    compiled = torch.compile(loss, backend="aot_eager")
    return lambda bench, rows: compiled(bench.model(input_ids=rows).logits, rows)


def the_shape_changes(bench: Bench) -> Loss:
    """Compiled anew in mid-run, where the length of the rows changes."""
    model, steps = torch.compile(bench.model, backend="aot_eager", dynamic=False), iter(range(STEPS))
    return lambda _, rows: (lambda x: model(input_ids=x, labels=x).loss)(rows[:, : 24 if next(steps) < 3 else 16])


@pytest.fixture(autouse=True)
def _as_if_nothing_was_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    yield
    torch._dynamo.reset()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("turned", [False, True], ids=["plain", "turned"])
@pytest.mark.parametrize("compiled", [the_model, its_layers, the_loss, the_shape_changes])
def test_is_judged_as_if_nothing_was_compiled(compiled: Callable[[Bench], Loss], turned: bool) -> None:
    """Oracle: whether gradients are turned; every step is seen."""
    bench = Bench("loop", "adamw", seed=3)
    parameters = list(bench.lora.values())
    optimizer, white = torch.optim.AdamW(parameters, lr=1e-2), Whitening(bench.lora)
    loss = compiled(bench)
    generator = torch.Generator().manual_seed(4)
    with gradient_ledger(bench.model) as ledger:
        for rows in torch.randint(0, 64, (STEPS, 4, 24), generator=generator):
            loss(bench, rows).backward()
            if turned:
                white.apply()
            optimizer.step()
            optimizer.zero_grad()
    assert ledger.problem is None
    assert ledger.steps == STEPS
    assert judge(ledger).cause == ("effective" if turned else "no-modifier")
