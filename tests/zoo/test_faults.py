"""The fault zoo: every fault named, no sound variant flagged, and every check needed.

Each case runs here once, in one trainer, optimizer and seed; the whole matrix is `python -m grit_impl.zoo.matrix`.
"""

from __future__ import annotations

import functools

import pytest
from click.testing import CliRunner

from grit_impl.errors import GRITError
from grit_impl.ledger.chain import CHECKS
from grit_impl.ledger.verdict import judge_ledger
from grit_impl.zoo.catalogue import FAULTS, SOUND
from grit_impl.zoo.matrix import faults, matrix, rows_of, runs, summarise

# A different trainer for each case, so that all are used; the matrix has them all.
PLACES = [(case, case.trainers[i % len(case.trainers)], case.optimizers[0]) for i, case in enumerate((*FAULTS, *SOUND))]
SHOWN = ("adagrad", "rmsprop", "nadam", "adamax", "amsgrad", "weight-decay")  # one of these will do here
CHOSEN = [p for p in PLACES if not p[0].id.startswith(SHOWN[1:])]


@functools.cache
def ledger_rows(number):
    case, trainer, optimizer = CHOSEN[number]
    return rows_of(case, trainer, optimizer, seed=0)


@pytest.mark.parametrize("number", range(len(CHOSEN)), ids=[f"{c.id}-{t}-{o}" for c, t, o in CHOSEN])
def test_case(number):
    """Oracle: what was done to the run, by construction."""
    case, _, optimizer = CHOSEN[number]
    verdict = judge_ledger(ledger_rows(number))
    assert verdict.cause in case.expected(optimizer), str(verdict)
    assert verdict.fault == (case in FAULTS)


@pytest.mark.parametrize("removed", [check.cause for check in CHECKS])
def test_every_check_is_needed(removed):
    """Oracle: without the check, at least one case gets another verdict (a mutation check of the catalogue)."""
    rest = [check for check in CHECKS if check.cause != removed]
    for number, (case, _, optimizer) in enumerate(CHOSEN):
        expected = case.expected(optimizer)
        if removed in expected and judge_ledger(ledger_rows(number), rest).cause not in expected:
            return
    pytest.fail(f"no case needs the check {removed!r}")


def test_the_zoo_is_large_enough():
    """Oracle: at least 25 of each, in all trainers."""
    assert len({c.id for c in FAULTS}) >= 25
    assert len({c.id for c in SOUND}) >= 25
    assert {t for _, _, t, _, _ in runs(seeds=[0])} == {"loop", "trainer", "sft", "hybrid", "pure"}


def test_matrix_counts_mistakes():
    """Oracle: counting by hand, with one fault mistaken and one sound variant flagged."""
    base = {"trainer": "loop", "optimizer": "sgd", "seed": 0, "summary": ""}
    rows = [
        {**base, "kind": "fault", "case": "a", "expected": ["starved"], "cause": "starved", "right": True},
        {**base, "kind": "fault", "case": "b", "expected": ["starved"], "cause": "effective", "right": False},
        {**base, "kind": "sound", "case": "c", "expected": ["effective"], "cause": "stopped", "right": False},
    ]
    summary = summarise(rows)
    assert (summary["named"], summary["caught"], summary["flagged"], summary["passed"]) == (1, 1, 1, False)
    assert summary["confusion"] == {"starved": {"starved": 1, "effective": 1}, "effective": {"stopped": 1}}


def test_matrix_keeps_known_results():
    """Oracle: a result that is handed in is not computed again."""
    known = matrix(["loop"], ["sgd"], [0], ["plain"])["results"]
    known[0]["summary"] = "as handed in"
    assert matrix(["loop"], ["sgd"], [0], ["plain"], known=known)["results"] == known


def test_command(tmp_path):
    """Oracle: what the terminal shows, and the file."""
    out = tmp_path / "matrix.json"
    arguments = ["--trainers", "loop", "--optimizers", "sgd", "--seeds", "0", "--cases", "late-after-step,plain"]
    result = CliRunner().invoke(faults, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "1 of 1 runs named rightly (100.0%)" in result.output
    assert "0 of 1 runs flagged" in result.output
    assert '"named_share": 1.0' in out.read_text()


def test_command_refuses_the_unknown():
    """Oracle: one line that names the thing."""
    with pytest.raises(GRITError, match="unknown trainer 'boat'"):
        list(runs(trainers=["boat"]))
