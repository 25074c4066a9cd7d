"""The ledger: it changes nothing, leaves nothing behind, and its file can be read by anyone."""

from __future__ import annotations

import gzip

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from grit_impl.errors import GRITError
from grit_impl.ledger.findings import facts
from grit_impl.ledger.fingerprints import Fingerprinter
from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.ledger.rows import read_rows
from grit_impl.zoo.bench import Bench, Moments, Whitening

INTERCEPTED = (
    (torch.autograd, "backward"),
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.nn.utils.clip_grad, "clip_grad_norm_"),
    (torch.amp.GradScaler, "step"),
    (torch.optim.Optimizer, "zero_grad"),
    (nn.Module, "zero_grad"),
)


def train(path=None, observed=True, trainer="loop", optimizer="adamw", **options):
    bench = Bench(trainer, optimizer, seed=3, steps=6)
    moments = Moments(before_step=Whitening(bench.lora).apply)
    if not observed:
        bench.train(moments)
        return bench, None
    with gradient_ledger(bench.model, path, **options) as ledger:
        bench.train(moments)
    return bench, ledger


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The ledger file of one run, and the bench it came from."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl.gz"
    return path, train(path)[0]


@pytest.mark.parametrize("trainer", ["loop", "pure"])
def test_training_is_the_same_bit_for_bit(trainer):
    """Oracle: the parameters of the same training without a ledger."""
    plain, _ = train(observed=False, trainer=trainer)
    watched, _ = train(trainer=trainer)
    assert all(torch.equal(p, q) for p, q in zip(plain.lora.values(), watched.lora.values(), strict=True))


def test_nothing_stays_behind():
    """Oracle: the functions before; also after an exception inside the context."""
    before = [getattr(owner, name) for owner, name in INTERCEPTED]
    bench, _ = train()
    assert [getattr(owner, name) for owner, name in INTERCEPTED] == before
    with pytest.raises(RuntimeError), gradient_ledger(bench.model):
        raise RuntimeError
    assert [getattr(owner, name) for owner, name in INTERCEPTED] == before
    assert "grad" not in vars(nn.Parameter)
    assert not _global_optimizer_pre_hooks
    assert not any(p._backward_hooks for p in bench.lora.values())


def test_pandas_reads_it_in_one_line(written):
    """Oracle: pandas; 28 tensors and 6 steps, every tensor's gradient turned before the optimizer."""
    table = pd.read_json(written[0], lines=True)
    tensors = table[table.kind == "tensor"]
    assert len(tensors) == 28 * 6
    assert (tensors.turn > 1e-4).all()
    assert list(table[table.kind == "step"].step) == list(range(1, 7))


def test_numbers_are_the_gradients_own(written):
    """Oracle: the optimizer's state. In one AdamW step from rest, exp_avg = 0.1 x the gradient it was given."""
    bench = Bench("loop", "adamw", seed=3, steps=1)
    with gradient_ledger(bench.model) as ledger:
        bench.train(Moments(before_step=Whitening(bench.lora).apply))
    rows = {r["name"]: r for r in ledger.rows() if r["kind"] == "tensor"}
    for name, p in bench.lora.items():
        assert rows[name]["entry"] == pytest.approx(float(bench.built.state[p]["exp_avg"].norm()) * 10, rel=1e-3)


def test_size_on_disk_for_the_large_model(written):
    """Oracle: bytes per row, extrapolated to 448 tensors and 200 steps: below 20 MB."""
    rows = sum(r["kind"] == "tensor" for r in read_rows(written[0]))
    assert written[0].stat().st_size / rows * 448 * 200 < 20e6


def test_every_third_step(tmp_path):
    """Oracle: counting; the sample is followed at every step, everything at steps 1, 2, 4 and 7."""
    _, ledger = train(tmp_path / "l.jsonl.gz", every=3, sample=4)
    rows = [r for r in ledger.rows() if r["kind"] == "tensor"]
    full = {r["step"] for r in rows if "hash_raw" in r}
    assert full == {1, 2, 4}
    assert {r["step"] for r in rows if "update_turn" in r} == set(range(1, 7))


def test_an_exception_leaves_no_file(tmp_path):
    """Oracle: the directory is empty."""
    bench = Bench()
    with pytest.raises(RuntimeError), gradient_ledger(bench.model, tmp_path / "l.jsonl.gz"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line(tmp_path):
    """Oracle: the message names the thing."""
    with pytest.raises(GRITError, match="every = 0"), gradient_ledger(Bench().model, every=0):
        pass
    with pytest.raises(GRITError, match="no gradient ledger"):
        facts(tmp_path / "missing.jsonl.gz")
    for name, content in {"cut": b'{"kind": "run"}\n{"ki', "other": b'{"a": 1}\n', "list": b"[]\n"}.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(GRITError, match="corrupt gradient ledger"):
            facts(tmp_path / name)
    (tmp_path / "plain").write_bytes(b"hello")
    with pytest.raises(GRITError, match="corrupt gradient ledger"):
        facts(tmp_path / "plain")


def test_any_model_can_be_watched():
    """Oracle: without LoRA tensors, all trainable parameters are watched."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradient_ledger(model) as ledger:
        for _ in range(3):
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ledger.names == ["weight", "bias"]
    assert ledger.steps == 3


@pytest.mark.parametrize("trainer", ["loop", "pure"])
def test_skipped_fingerprints_lose_nothing(trainer, monkeypatch):
    """Oracle: the same training with every fingerprint taken. Most are skipped from the third step on."""
    taken = []
    sketch = Fingerprinter.__call__
    monkeypatch.setattr(Fingerprinter, "__call__", lambda self, *a, **k: taken.append(1) or sketch(self, *a, **k))
    lean = train(trainer=trainer)[1].rows()
    few = len(taken)
    monkeypatch.setattr("grit_impl.ledger.looks.FULL_STEPS", 100)
    assert train(trainer=trainer)[1].rows() == lean
    assert few < 0.75 * (len(taken) - few)


class _LateWriter:
    """From the fourth step on something writes into gradients, through `.data`, which no version counter sees."""

    def __init__(self, lora, write):
        self.lora, self.write, self.calls = lora, write, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls > 3:
            self.write(self.lora)


def _uncounted(lora):
    for p in lora.values():
        p.grad.data.mul_(torch.linspace(-1, 1, p.grad.numel()).view_as(p.grad))


def _counted(lora):
    for p in lora.values():
        p.grad.mul_(torch.linspace(-1, 1, p.grad.numel()).view_as(p.grad))


@pytest.mark.parametrize("write", [_uncounted, _counted])
@pytest.mark.parametrize("moment", ["before_step", "micro"])
def test_a_writer_that_begins_late_is_seen(write, moment):
    """Oracle: its own beginning. The step in which it begins may count as not sampled, and none before or after."""
    bench = Bench("loop", "adamw", seed=3, steps=8)
    with gradient_ledger(bench.model) as ledger:
        bench.train(Moments(**{moment: _LateWriter(bench.lora, write)}))
    rows = [r for r in ledger.rows() if r["kind"] == "tensor" and "hash_raw" in r]
    key = "turns" if moment == "before_step" else "micro"
    seen = {r["step"] for r in rows if key in r}
    assert {r["step"] for r in rows} >= {1, 2, 3, 6, 7, 8}
    assert seen >= {6, 7, 8}
    assert min(seen) >= 4


class _Residual(nn.Module):
    """Ten LoRA-named layers, and a head whose loss leaves them alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lora_A = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(10)])
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.lora_A:
            x = x + layer(x)
        return x


def test_a_gradient_replaced_at_its_old_address_is_seen():
    """Oracle: the writer. The tensors whose hashes would give it away are spared, and the address is used again."""
    model = _Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradient_ledger(model) as ledger:
        written = [layer.weight for i, layer in enumerate(model.lora_A) if i not in ledger._looks._structured]
        for _ in range(6):
            model(torch.randn(4, 8)).square().mean().backward()
            for p in written:
                copy = p.grad.clone()
                p.grad = None
                p.grad = copy.flip(0)
                del copy
            optimizer.step()
            optimizer.zero_grad()
    turned = [r["step"] for r in ledger.rows() if r["kind"] == "tensor" and "turns" in r]
    assert [turned.count(step) for step in range(1, 7)] == [len(written)] * 6


@pytest.mark.parametrize("clip_between", [False, True])
def test_a_pass_that_changes_no_gradient(clip_between, monkeypatch):
    """Oracle: the same training with every fingerprint taken."""

    def rows():
        model = _Residual()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with gradient_ledger(model) as ledger:
            for _ in range(5):
                hidden = model(torch.randn(4, 8))
                hidden.square().mean().backward()
                if clip_between:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
                model.head(hidden.detach()).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        return ledger.rows()

    lean = rows()
    monkeypatch.setattr("grit_impl.ledger.looks.FULL_STEPS", 100)
    assert lean == rows()


def test_steps_that_are_not_sampled_turn_nothing_off():
    """Oracle: nobody wrote anything."""
    bench = Bench("loop", "adamw", seed=3, steps=6)
    with gradient_ledger(bench.model, every=3) as ledger:
        bench.train(Moments())
    assert ledger._looks.lean
