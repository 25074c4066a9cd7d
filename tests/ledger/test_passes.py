"""Steps of several tasks, whose gradients a loop takes one after another and puts together itself."""

from __future__ import annotations

import pytest
import torch

from grit_impl import gradient_ledger, judge
from grit_impl.ledger.watches import access
from grit_impl.zoo.bench import Bench, Whitening

STEPS = 20  # from the ninth on, matrices are looked into in some steps only


def without_conflict(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """The sum, less what of the second task's gradient goes against the first's (arXiv 2001.06782)."""
    return one + two - min(0.0, float((one * two).sum())) * one / (one.norm() ** 2 + 1e-9)


@pytest.mark.parametrize(
    ("writes", "cause"),
    [
        (("sum",), "no-modifier"),
        (("sum", "without conflict"), "no-modifier"),
        (("sum", "turn"), "effective"),
        (("without conflict", "turn"), "effective"),
        (("sum", "turn", "without conflict"), "overwritten"),
    ],
    ids=lambda value: "+".join(value).replace(" ", "-") if isinstance(value, tuple) else value,
)
def test_what_a_loop_makes_of_its_tasks(monkeypatch: pytest.MonkeyPatch, writes: tuple[str, ...], cause: str) -> None:
    """Oracle: which of the writes is a preconditioner's, and whether it is the last."""
    # After another test has compiled something, the ledger would not look between writes of one loop.
    monkeypatch.setattr(access, "compiled", lambda: False)
    bench = Bench("loop", "adamw", seed=3)
    parameters = list(bench.lora.values())
    optimizer, white = torch.optim.AdamW(parameters, lr=1e-2), Whitening(bench.lora)
    generator = torch.Generator().manual_seed(4)
    with gradient_ledger(bench.model) as ledger:
        for batch in torch.randint(0, 64, (STEPS, 4, 24), generator=generator):
            tasks = []
            for rows in (batch[:2], batch[2:]):
                optimizer.zero_grad()
                bench.model(input_ids=rows, labels=rows).loss.backward()
                tasks.append([p.grad.clone() for p in parameters])
            for write in writes:
                if write == "turn":
                    white.apply()
                    continue
                for p, one, two in zip(parameters, *tasks, strict=True):
                    p.grad = one + two if write == "sum" else without_conflict(one, two)
            optimizer.step()
    assert judge(ledger).cause == cause


def test_one_step_of_two_passes_says_nothing_of_the_others() -> None:
    """Oracle: one step has two tasks, whose sum nobody turns; in every other step gradients are turned as usual."""
    bench = Bench("loop", "adamw", seed=3)
    parameters = list(bench.lora.values())
    optimizer, white = torch.optim.AdamW(parameters, lr=1e-2), Whitening(bench.lora)
    generator = torch.Generator().manual_seed(4)
    with gradient_ledger(bench.model) as ledger:
        for number, batch in enumerate(torch.randint(0, 64, (STEPS, 4, 24), generator=generator)):
            tasks = []
            for rows in (batch[:2], batch[2:]) if number == 3 else (batch,):
                optimizer.zero_grad()
                bench.model(input_ids=rows, labels=rows).loss.backward()
                tasks.append([p.grad.clone() for p in parameters])
            if len(tasks) == 1:
                white.apply()
            else:
                for p, one, two in zip(parameters, *tasks, strict=True):
                    p.grad = one + two
            optimizer.step()
    assert judge(ledger).cause == "effective"
