"""What was applied is told from the gradients and the ledger's own statistics, and `grit verdict` says it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.ledger.applied import Explainer
from grit_impl.ledger.chain.table import LinkRow
from grit_impl.ledger.commands import verdict as command
from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.ledger.structure import RankOperator
from grit_impl.ledger.verdict import Verdict, judge_ledger, table_text
from grit_impl.zoo.bench import Bench, Moments, Whitening
from grit_impl.zoo.kernels import HookedKFAC

RANK = 8


def covariance(seed: int) -> Any:
    x = np.random.default_rng(seed).normal(size=(RANK, 40)) * np.geomspace(1, 5, RANK)[:, None]
    return x @ x.T


def power(matrix: Any, p: float) -> Any:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**p) @ vectors.T


FACTORS = {"one": {"a": covariance(1), "g": covariance(2)}, "two": {"a": covariance(3), "g": covariance(4)}}
GRADIENT = covariance(5)
EYE = np.eye(RANK)


@pytest.mark.parametrize(
    ("matrix", "residual", "name"),
    [
        (np.linalg.inv(FACTORS["one"]["g"] + 9 * EYE), 0.0, "the inverse of its own factor"),
        (3e5 * np.linalg.inv(FACTORS["one"]["g"] + 0.1 * EYE), 0.0, "the inverse of its own factor"),
        (np.linalg.inv(FACTORS["one"]["a"] + 9 * EYE), 0.0, "the inverse of the other side's factor"),
        (np.linalg.inv(FACTORS["two"]["g"] + 9 * EYE), 0.0, "the inverse of another layer's factor"),
        (np.linalg.inv(GRADIENT + 9 * EYE), 0.0, "the inverse of its gradient's second moment"),
        (power(FACTORS["one"]["g"] + 9 * EYE, -0.5), 0.0, "the inverse root of its own factor"),
        (power(FACTORS["one"]["g"] + 9 * EYE, -2.0), 0.0, "the inverse square of its own factor"),
        (covariance(6), 0.0, "a matrix that no statistic explains"),
        (7.0 * EYE, 0.0, "a number"),
        (np.diag(np.geomspace(1, 9, RANK)), 0.0, "a diagonal"),
        (EYE, 0.31, "no matrix of the rank's size"),
    ],
)
def test_matrices_are_named(matrix: Any, residual: float, name: str) -> None:
    """Oracle: how the matrix was made; damping and scale do not matter."""
    explainer = Explainer()
    explainer.see(FACTORS, {"one.lora_A.w": GRADIENT})
    assert explainer.explain("one.lora_A.w", "one", "A", RankOperator(matrix, residual)) == name


def test_a_frozen_factor_is_told() -> None:
    """Oracle: the inverse of the first step's factor, forty steps later."""
    explainer = Explainer()
    explainer.see(FACTORS, {})
    for seed in range(40):
        explainer.see({"one": {"a": covariance(50 + seed), "g": covariance(100 + seed % 7)}}, {})
    frozen = RankOperator(np.linalg.inv(FACTORS["one"]["g"] + 9 * EYE), 0.0)
    assert explainer.explain("one.lora_A.w", "one", "A", frozen) == "the inverse of its own factor of the first step"


def judged(trainer: str, moment: Any = None, **grit: Any) -> Verdict:
    bench = Bench(trainer, "adamw", 0)
    if grit:
        bench.options["grit"] = GRITConfig(kfac_update_freq=1, kfac_min_samples=4, **grit)
    with gradient_ledger(bench.model) as ledger:
        bench.train(moment(bench) if moment else Moments())
    return judge_ledger(ledger)


@pytest.mark.parametrize(
    ("trainer", "moment", "grit", "cause", "applied"),
    [
        ("pure", None, {"pairing": "fisher"}, "effective", "the inverse of its own factor"),
        ("pure", None, {"pairing": "released"}, "swapped-factors", "the inverse of the other side's factor"),
        ("loop", lambda b: Moments(before_step=HookedKFAC(b.model, b.lora).apply), {}, "effective", "its own factor"),
        (
            "loop",
            lambda b: Moments(before_step=Whitening(b.lora).apply),
            {},
            "effective",
            "its gradient's second moment",
        ),
    ],
    ids=["grit", "released-pairing", "kfac", "whitening"],
)
def test_runs_say_what_was_applied(trainer: str, moment: Any, grit: Any, cause: str, applied: str) -> None:
    """Oracle: what the run's modifier is."""
    found = judged(trainer, moment, **grit)
    assert found.cause == cause
    assert len(found.applied) == 2
    assert all(applied in text for text in found.applied), found.applied


def test_verdict_command(tmp_path: Any) -> None:
    """Oracle: one sentence first, then the chain; the same as JSON; one line for what is no ledger."""
    bench, path = Bench("loop", "adamw", 0), tmp_path / "ledger.jsonl.gz"
    with gradient_ledger(bench.model, path):
        bench.train(Moments(before_step=Whitening(bench.lora).apply))
    done = CliRunner().invoke(command, [str(path)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Yes: in 8 of 8 steps, all 28 tensors; updates turned by 31 degrees; every link was")
    assert "consumed" in done.output
    told = json.loads(CliRunner().invoke(command, [str(path), "--json"]).output)
    assert (told["cause"], told["effective"], told["link"]) == ("effective", True, None)
    assert [row["link"] for row in told["chain"]][-1] == "throughout"
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(GRITError):
            CliRunner().invoke(command, [str(missing)], catch_exceptions=False)


def test_verdict_command_on_a_fault(tmp_path: Any) -> None:
    """Oracle: exit status 1, No, and the link that broke is marked."""
    bench, path = Bench("loop", "adamw", 0), tmp_path / "ledger.jsonl.gz"
    with gradient_ledger(bench.model, path):
        bench.train(Moments(after_step=Whitening(bench.lora).apply))
    done = CliRunner().invoke(command, [str(path)])
    assert done.exit_code == 1
    assert done.output.startswith("No: training loop changed gradients after the optimizer step, in 8 of 8 steps")
    (line,) = (line for line in done.output.splitlines() if "<- broke" in line)
    assert line.startswith("delivered")


@pytest.mark.parametrize(("held", "mark"), [(108, "<- the cause"), (100, "<- broke"), (0, "<- broke")])
def test_the_link_that_decided_is_marked_as_what_it_is(held: int, mark: str) -> None:
    """A link that held at every look did not break: its updates follow, and an optimizer made nothing of the change."""
    row = LinkRow("consumed", held, 108, None, "")
    table = table_text(Verdict("cancelled-by-optimizer", False, "No", link="consumed", chain=(row,)))
    assert table.splitlines()[-1].split() == ["consumed", str(held), "of", "108", *mark.split()]


def test_a_ledger_that_is_not_there_is_named_once(tmp_path: Any) -> None:
    """Oracle: the reader's own message, in no other one."""
    with pytest.raises(GRITError, match=r"\Ano gradient ledger at "):
        CliRunner().invoke(command, [str(tmp_path / "nothing")], catch_exceptions=False)
