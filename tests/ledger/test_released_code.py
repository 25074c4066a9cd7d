"""The released code's ways of going wrong, under the ledger, are named by their causes.

`suites/benchmarks/released.py` has its loop over layers; here it trains with the mistakes that the code was found with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.ledger.verdict import Verdict, judge_ledger
from grit_impl.zoo.bench import Bench, Moments

RELEASED = Path(__file__).parents[2] / "suites/benchmarks/released.py"


def per_layer(bench: Bench, swapped: bool = True, half: bool = False) -> Any:
    """The released loop, hooked to the bench's layers: its pairing, and its statistics of mean losses in float16."""
    spec = importlib.util.spec_from_file_location("released", RELEASED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers = [m for m in bench.model.modules() if "lora_A" in dict(m.named_children()) and len(m.lora_A)]
    pairs = [(m.lora_A["default"], m.lora_B["default"]) for m in layers]

    class Released(module.PerLayer):  # type: ignore[name-defined,misc]
        def _update(self, key: Any, values: Any) -> None:
            super()._update(key, values)
            if half and key[1] == "g":
                self.cov[key] = self.cov[key].half().float()

        def precondition(self) -> None:
            if not swapped:
                super().precondition()
                return
            for i, (a, b) in enumerate(self.layers):
                for side in "ag":
                    eye = torch.eye(len(self.cov[i, side]))
                    self.inverse[i, side] = torch.linalg.inv(self.cov[i, side] + self.damping * eye)
                a.weight.grad.copy_(self.inverse[i, "a"] @ a.weight.grad)
                b.weight.grad.copy_(b.weight.grad @ self.inverse[i, "g"])

    made = Released(pairs, every=1, damping=1e-3 if half else 1e-13)
    made.attach()
    return made


def judged(build: Callable[[Bench], Moments], optimizer: str = "adamw", **setting: Any) -> Verdict:
    bench = Bench("trainer", optimizer, 0, **setting)
    moments = build(bench)
    with gradient_ledger(bench.model) as ledger:
        bench.train(moments)
    assert ledger.problem is None
    return judge_ledger(ledger)


def test_swapped_factors() -> None:
    """Oracle: the pairing that was planted; A's matrix is the inverse of S_a, B's that of S_g."""
    found = judged(lambda bench: Moments(before_step=per_layer(bench).precondition), max_norm=0.0)
    assert found.cause == "swapped-factors", str(found)
    assert all("the other side's factor" in text for text in found.applied), found.applied


def test_the_right_pairing_is_not_blamed() -> None:
    """Oracle: the same loop with the right pairing: the factor is its own, and S_g of mean losses being about 1e-9, so
    are the gradients a billion times as large, which is another fault."""
    found = judged(lambda bench: Moments(before_step=per_layer(bench, swapped=False).precondition), max_norm=0.0)
    assert found.cause == "blown-up", str(found)
    assert all("its own factor" in text for text in found.applied), found.applied


def test_a_dead_half_precision_factor() -> None:
    """Oracle: S_g of mean losses is about 1e-9: in float16 it is zero, and its inverse is 1/damping, a number, which B
    is multiplied by; A is turned by the other side's factor."""
    found = judged(lambda bench: Moments(before_step=per_layer(bench, half=True).precondition), max_norm=0.0)
    assert found.cause == "swapped-factors", str(found)
    assert "dead factor" in dict(found.also).get("only-one-factor", ""), (
        str(found),
        found.also,
        found.applied,
        found.per_group,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_clipping_before_preconditioning(optimizer: str) -> None:
    """Oracle: the event comes after transformers' clipping; what reaches the optimizer passes the limit many times."""

    def build(bench: Bench) -> Moments:
        return Moments(before_step=per_layer(bench, swapped=False).precondition)

    found = judged(build, optimizer, max_norm=0.1)
    causes = [found.cause, *(cause for cause, _ in found.also)]
    assert "blown-up" in causes, (str(found), found.also)


def test_hooks_that_write_nothing() -> None:
    """Oracle: the wrapper is never installed (transformers 5): hooks collect, and nobody preconditions."""

    def build(bench: Bench) -> Moments:
        per_layer(bench)
        return Moments()

    found = judged(build)
    assert found.cause == "nothing-written", str(found)
