"""What the ledger keeps of the gradients while a step is under way: a look is as large as all of them."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from grit_impl import gradient_ledger
from grit_impl.ledger.fingerprints import Fingerprinter, Look
from grit_impl.ledger.looks import Looks
from grit_impl.zoo.bench import Bench, Whitening

STEPS = 6
AT_ONCE = 6
"""Of the gradients: as backward left them, the last, this one; of the weights: the first, the last, this one."""


class Twice(torch.optim.SGD):
    """Evaluates its closure twice, as a line search does, and steps on what the second left."""

    def step(self, closure: Any) -> float:  # type: ignore[override]
        with torch.enable_grad():
            closure()
            loss: float = closure()
        super().step()
        return loss


def train(writes: int, closure: bool = False) -> list[dict[str, Any]]:
    """The rows of a run whose loop turns and clips all gradients so many times a step."""
    bench = Bench("loop", "adamw", seed=3)
    parameters = list(bench.lora.values())
    white = Whitening(bench.lora)
    optimizer: Any = Twice(parameters, lr=1e-2) if closure else torch.optim.AdamW(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(4)
    with gradient_ledger(bench.model) as ledger:
        for batch in torch.randint(0, 64, (STEPS, 2, 24), generator=generator):

            def backward(rows: torch.Tensor = batch) -> float:
                optimizer.zero_grad()
                loss = bench.model(input_ids=rows, labels=rows).loss
                loss.backward()
                for _ in range(writes):
                    white.apply()
                    torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
                return float(loss.detach())

            if closure:
                backward()
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
    return ledger.rows()


@pytest.mark.parametrize("writes", [1, 8])
def test_a_step_with_many_writes_keeps_no_more_looks_than_one_with_few(
    monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Oracle: weak references to all looks of this run: those that somebody still holds, with their values."""
    made, alive, take = weakref.WeakSet[Look](), [], Fingerprinter.__call__

    def counted(self: Fingerprinter, *args: Any, **options: Any) -> Look:
        look = take(self, *args, **options)
        made.add(look)
        alive.append(sum(bool(found.stacks) for found in made))
        return look

    monkeypatch.setattr(Fingerprinter, "__call__", counted)
    train(writes)
    assert len(alive) > STEPS * writes
    assert max(alive) <= AT_ONCE


@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
@pytest.mark.parametrize("writes", [0, 1, 3])
def test_rows_are_those_of_a_ledger_that_keeps_everything(
    monkeypatch: pytest.MonkeyPatch, writes: int, closure: bool
) -> None:
    """Oracle: the same run, nothing freed before the step is over."""
    rows, kept, take = train(writes, closure), {}, Looks._take

    def whole(self: Looks, grads: Any, before: Any) -> Look:
        if before is not None and before.look is None:
            before.look = kept.get(id(before.table))
        look = take(self, grads, before)
        kept[id(look.table)] = look
        return look

    monkeypatch.setattr(Looks, "_take", whole)
    assert rows == train(writes, closure)
    assert len(kept) > STEPS
