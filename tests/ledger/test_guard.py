"""The ledger never ends or changes a training, whatever goes wrong inside it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grit_impl.errors import GRITError
from grit_impl.ledger.interception import Listener
from grit_impl.ledger.looks import Looks
from grit_impl.ledger.recorder import GradientLedger, gradient_ledger
from grit_impl.ledger.rows import RowWriter, read_rows
from grit_impl.ledger.shadow import Shadows
from grit_impl.ledger.verdict import judge_ledger
from grit_impl.ledger.watches import HookWatch, LayerWatch, MemoryWatch
from grit_impl.ledger.watches.kept import KeptWatch
from grit_impl.zoo.bench import Bench, Moments, Whitening, at_step

REPORTS = [name for name in vars(Listener) if not name.startswith("_")]
HOOKS = [
    "_optimizer_entry",
    "_optimizer_ready",
    "_optimizer_exit",
    "_leave",
    "_accessed",
    "_install",
    "_closure_begins",
    "_closure_ended",
    "_flush",
    "_finish",
]
INSIDE = [
    (Looks, "look"),
    (Looks, "raw"),
    (LayerWatch, "absent"),
    (LayerWatch, "_ask"),
    (KeptWatch, "look"),
    (HookWatch, "look"),
    (MemoryWatch, "look"),
    (Shadows, "before"),
    (Shadows, "after"),
    (RowWriter, "write"),
    (RowWriter, "flush"),
    (RowWriter, "close"),
    (GradientLedger, "_rows"),
]


def broken(*_: Any, **__: Any) -> None:
    raise ValueError("planted")


def train(ledger: GradientLedger | None = None, trainer: str = "loop") -> tuple[list[Tensor], GradientLedger | None]:
    """A training in which each of the ledger's moments comes, and its last weights."""
    bench = Bench(trainer, "adamw", seed=3, steps=4)
    bench.options["scaler"] = trainer == "loop"
    white, other = Whitening(bench.lora), next(iter(bench.lora.values()))
    closures = torch.optim.SGD([other], lr=1e-3)
    closures.register_step_post_hook(lambda *_: None)

    def after_step() -> None:
        with torch.enable_grad():
            closures.step(lambda: (other.square().sum() * 1e-3).backward())
            torch.autograd.grad(other.square().sum(), [other])
        torch.nn.utils.clip_grad_value_([other], 1.0)
        if ledger is not None:
            ledger.flush()

    if trainer == "loop":
        other.register_hook(lambda grad: None)  # type: ignore[no-untyped-call]
    moments = Moments(before_step=white.apply, after_step=after_step)
    if ledger is None:
        bench.train(moments)
    else:
        ledger.__init__(bench.model, ledger.path)  # type: ignore[misc]
        with ledger:
            bench.train(moments)
    return [p.detach().clone() for p in bench.lora.values()], ledger


@pytest.fixture(scope="module")
def unobserved() -> dict[str, list[Tensor]]:
    return {trainer: train(trainer=trainer)[0] for trainer in ("loop", "trainer")}


@pytest.mark.parametrize(
    ("owner", "name"), [(GradientLedger, name) for name in (*REPORTS, *HOOKS)] + INSIDE, ids=lambda part: str(part)
)
def test_whatever_raises_the_training_goes_on(owner: Any, name: str, unobserved: Any, monkeypatch: Any, tmp_path: Any):
    """Oracle: the same training without a ledger, bit for bit; and the ledger says that it failed, where, and why."""
    trainer = "trainer" if name.startswith("event") else "loop"
    path = tmp_path / "ledger.jsonl.gz"
    ledger = GradientLedger(Bench().model, path)
    called: list[str] = []
    with monkeypatch.context() as patch:
        if owner is RowWriter and name == "write":  # the header is written before the training begins
            writes = RowWriter.write

            def later(self: Any, rows: Any) -> None:
                if rows and rows[0]["kind"] != "run":
                    called.append(name)
                    broken()
                writes(self, rows)

            patch.setattr(owner, name, later)
        else:
            patch.setattr(owner, name, lambda *a, **k: called.append(name) or broken())
        weights, _ = train(ledger, trainer)
    assert called, f"{name} never came"
    assert all(torch.equal(a, b) for a, b in zip(weights, unobserved[trainer], strict=True))
    assert ledger.problem is not None
    assert "planted" in ledger.problem
    verdict = judge_ledger(ledger)
    assert (verdict.cause, verdict.effective) == ("undecided", None)
    assert "ValueError: planted" in verdict.summary
    if path.is_file():
        assert [row["kind"] for row in read_rows(path)].count("problem") == 1


def test_gradient_and_module_hooks_are_guarded(monkeypatch: Any) -> None:
    """Oracle: as above, for the hooks that stand in the model itself."""
    bench = Bench("loop", "adamw", seed=3, steps=4)
    plain = Bench("loop", "adamw", seed=3, steps=4)
    for each in (bench, plain):
        for module in each.model.modules():
            if "lora_A" in dict(module.named_children()):
                module.lora_A["default"].register_forward_hook(lambda *_: None)
        for p in each.lora.values():
            p.register_hook(lambda grad: None)  # type: ignore[no-untyped-call]
    monkeypatch.setattr(HookWatch, "_counter", lambda self, name: self._protect(broken, "module hook"))
    with gradient_ledger(bench.model) as ledger:
        bench.train(Moments())
    plain.train(Moments())
    assert all(torch.equal(p, q) for p, q in zip(plain.lora.values(), bench.lora.values(), strict=True))
    assert "module hook: ValueError: planted" in str(ledger.problem)


def test_a_path_that_cannot_be_written_is_refused_before_the_training(tmp_path: Any) -> None:
    """Oracle: one line, at the start."""
    (tmp_path / "file").write_text("")
    with pytest.raises(GRITError, match="cannot write"), gradient_ledger(Bench().model, tmp_path / "file" / "l.gz"):
        pass


def test_a_replay_touches_nothing() -> None:
    """Oracle: the same training without a ledger, bit for bit, and the number of calls. The optimizer's step clears the
    gradients, computes new ones and moves the parameters by those: to run it again would be to train twice."""

    class Computes(torch.optim.Optimizer):
        compute: Any = None

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 1e-2})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            Computes.compute()
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"])

    def weights(observed: bool) -> list[Tensor]:
        bench, calls = Bench("loop", "sgd", seed=3, steps=4), [0]
        rows = torch.tensor([row["input_ids"] for row in bench.batches()[:2]])

        def compute() -> None:
            calls[0] += 1
            bench.model.zero_grad()
            bench.model(input_ids=rows, labels=rows).loss.backward()

        Computes.compute = staticmethod(compute)
        bench.make_optimizer = lambda b: Computes(list(b.lora.values()))
        if observed:
            with gradient_ledger(bench.model) as ledger:
                bench.train(Moments())
            assert ledger.problem is None
            assert "its step runs backward passes of its own" in str(ledger._shadows.problem)
        else:
            bench.train(Moments())
        assert calls == [4]
        return [p.detach().clone() for p in bench.lora.values()]

    assert all(torch.equal(a, b) for a, b in zip(weights(observed=True), weights(observed=False), strict=True))


class Unshaped(nn.Module):
    """A model that has not seen its data yet: its tensors have no shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2)


MODELS = {
    "nothing to train": lambda: nn.Linear(3, 3).requires_grad_(False),
    "no parameters": nn.Identity,
    "no shapes": Unshaped,
    "no memory": lambda: nn.Linear(3, 3, device="meta"),
}
SAID = {"nothing to train": ("no-gradient", "no-steps")}


@pytest.mark.parametrize("name", MODELS)
def test_any_model_can_be_observed(name: str) -> None:
    """Oracle: nothing is raised, the training beside it moves its weight, and the verdict says what was not seen."""
    model, other = MODELS[name](), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    start = other.weight.detach().clone()
    with gradient_ledger(model) as ledger:
        for _ in range(4):
            other(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(other.weight, start)
    assert judge_ledger(ledger).cause in SAID.get(name, ("undecided", "no-steps", "no-gradient"))
    assert "grad" not in vars(nn.Parameter)


def test_sharded_in_the_course_of_a_training() -> None:
    """Oracle: the training goes on, and the verdict says why nothing can be said."""
    bench = Bench("loop", "sgd", seed=3, steps=4)
    layer = next(m for n, m in bench.model.named_modules() if n.endswith("lora_A.default"))

    def shard() -> None:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.weight.ds_id = 3

    with gradient_ledger(bench.model) as ledger:
        bench.train(Moments(ready=shard))
    verdict = judge_ledger(ledger)
    assert verdict.cause == "undecided"
    assert "the parameters were sharded (DeepSpeed ZeRO-3)" in verdict.summary


def test_reads_are_seen_for_a_while_and_leave_nothing() -> None:
    """Oracle: `.grad` is torch's own in steps that are not looked into, and after a failure."""
    bench, seen = Bench("loop", "sgd", seed=3, steps=12), []
    with gradient_ledger(bench.model) as ledger:
        bench.train(Moments(before_step=lambda: seen.append("grad" in vars(nn.Parameter))))
    assert seen == [True] * 8 + [False, False, True, False]
    with gradient_ledger(bench.model) as ledger:
        bench.train(Moments(before_clip=lambda: ledger.fail("here", ValueError("planted"))))
        assert "grad" not in vars(nn.Parameter)
    assert judge_ledger(ledger).cause == "undecided"


def test_a_model_can_be_copied_and_pickled_meanwhile() -> None:
    """Oracle: as without a ledger; the copy computes the same, and nothing of the ledger is in it."""
    bench = Bench("loop", "sgd", seed=3, steps=4)
    rows, copies = torch.zeros(1, 4, dtype=torch.long), []

    def copied() -> None:
        copies.extend([copy.deepcopy(bench.model), pickle.loads(pickle.dumps(bench.model))])

    with gradient_ledger(bench.model) as ledger:
        bench.train(Moments(step_end=at_step(4, copied)))
    assert ledger.problem is None
    expected = bench.model(input_ids=rows).logits
    for other in copies:
        assert torch.equal(other(input_ids=rows).logits, expected)
