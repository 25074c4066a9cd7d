"""Checks and verdicts on ledgers written by hand: each side of every threshold, and the sentences people read."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases_applied
import cases_change
import cases_effect
import cases_unmodified
import pytest
from ledgers import BENT, NAMES, STEPS, Rows, bent, find, ledger, some, statuses

from grit_impl.errors import GRITError
from grit_impl.ledger.chain.table import chain_of, custody
from grit_impl.ledger.findings import facts
from grit_impl.ledger.verdict import assert_effective, judge_ledger, judge_pair
from grit_impl.record import RunRecord
from grit_impl.verify.claims import Evidence
from grit_impl.verify.claims import find as find_claim

CASES = {**cases_unmodified.CASES, **cases_change.CASES, **cases_effect.CASES, **cases_applied.CASES}


@pytest.mark.parametrize("name", CASES)
def test_check(name: str) -> None:
    """Oracle: what was written into the ledger, on one side or the other of the check's threshold."""
    cause, rows, sentence, numbers = CASES[name]
    found = find(cause, rows)
    if sentence is None:
        assert found is None, found
        return
    assert found is not None
    assert found.summary == sentence
    assert found.numbers.keys() == numbers.keys()
    for key, value in numbers.items():
        near = pytest.approx(value, nan_ok=True) if isinstance(value, float) else value
        assert found.numbers[key] == near, key


@pytest.mark.parametrize(
    ("name", "cause", "effective", "fault"),
    [
        ("effective", "effective", True, False),
        ("plain", "no-modifier", None, False),
        ("all-skipped", "no-steps", None, True),
        ("unexplained", "update-unexplained", None, True),
        ("scaled-only", "scaled-only", False, True),
        ("no-bit-changed", "no-update", False, True),
        ("rate-zero-for-b", "learning-rate-zero", False, True),
        ("overwritten", "overwritten", False, True),
        ("dropped", "dropped", False, True),
    ],
)
def test_verdict(name: str, cause: str, effective: bool | None, fault: bool) -> None:
    """Oracle: the check's cause; where nothing can be said about the modifier, `effective` is None, not False."""
    verdict = judge_ledger(CASES[name][1])
    assert (verdict.cause, verdict.effective, verdict.fault) == (cause, effective, fault)
    prefix = {True: "", None: "" if name == "plain" else "Cannot say: ", False: "No: "}[effective]
    assert verdict.summary == prefix + str(CASES[name][2])
    assert str(verdict) == f"{cause}: {verdict.summary}"


def test_first_breach_names_the_cause() -> None:
    """Oracle: NaN written into an otherwise effective run; without any check nothing is wrong."""
    rows = bent(nonfinite=1)
    assert judge_ledger(rows).cause == "non-finite"
    nothing = judge_ledger(rows, [])
    assert (nothing.cause, nothing.effective) == ("effective", True)
    assert nothing.numbers["steps"] == STEPS


def test_numbers_of_a_verdict() -> None:
    """Oracle: A turned at 0.3 from step 3 on, B at 0.5 in all steps; medians and shares by hand."""
    turned = {
        "lora_A": {**BENT, "condition": 8.0},
        "lora_B": {**BENT, "turn": 0.5, "update_turn": 0.4, "identity": 2.0},
    }

    def tensor(step: int, name: str) -> dict[str, Any]:
        side = "lora_A" if "lora_A" in name else "lora_B"
        return turned[side] if side == "lora_B" or step > 2 else {"replay": 1.0}

    def step(number: int) -> dict[str, Any]:
        return {"order": ["backward", "GRIT", "step"] if number == 4 else ["backward", "step"]}

    verdict = judge_ledger(ledger(tensor, step, statuses(ready=4)))
    assert verdict.numbers == {
        "steps": 10,
        "tensors": 4,
        "active_steps": 10,
        "share_modified": 0.9,
        "statuses": {"ready": 4},
        "order": ["backward", "GRIT", "step"],
        "turn": 0.5,
        "update_turn": 0.4,
        "replay": 1e-6,
        "by": "GRIT",
    }
    assert verdict.per_group == {
        "A": {"tensors": 2, "share_modified": 0.8, "turn": 0.3, "update_turn": 0.2, "condition": 8.0},
        "B": {"tensors": 2, "share_modified": 1.0, "turn": 0.5, "update_turn": 0.4, "identity_distance": 2.0},
    }
    plain = judge_ledger(ledger())
    assert plain.numbers == {"steps": 10, "tensors": 4, "active_steps": 0, "share_modified": 0.0, "replay": 1e-6}


def test_rounding_of_numbers() -> None:
    """Oracle: four significant digits; 13 of 40 rows is 0.325, 1 of 3 rows 0.3333."""
    assert judge_ledger(some(13, BENT)).numbers["share_modified"] == 0.325
    odd = {**BENT, "turn": 0.123456, "update_turn": 0.654321}
    thirds = ledger(lambda s, n: odd if s == 1 else {}, steps=3, names=NAMES[:1])
    verdict = judge_ledger(thirds)
    assert verdict.numbers["share_modified"] == 0.3333
    assert verdict.numbers["turn"] == 0.1235
    assert verdict.per_group == {"A": {"tensors": 1, "share_modified": 0.3333, "turn": 0.1235, "update_turn": 0.6543}}


def test_assert_effective_says_why() -> None:
    """Oracle: the cause, the sentence and every number; an allowed cause passes."""
    assert assert_effective(bent()).cause == "effective"
    late = CASES["late"][1]
    with pytest.raises(AssertionError) as error:
        assert_effective(late)
    text = str(error.value)
    assert text.startswith(
        "No: callback changed gradients after the optimizer step, in 7 of 10 steps [modified-too-late"
    )
    assert "late = 28, late_steps = 7" in text
    assert "delivered" in text
    assert assert_effective(late, allow=["modified-too-late"]).effective is False


def other(**fields: Any) -> Rows:
    """A run beside the plain one: the same data, parameters that differ after each step from 4 on."""
    return ledger(lambda s, n: {"hash_after": f"{n}@{s + 1}{'x' if s > 3 else ''}", **(fields if s > 3 else {})})


@pytest.mark.parametrize(
    ("rows", "cause", "effective", "sentence"),
    [
        (
            ledger(),
            "identical-to-baseline",
            False,
            "every parameter is bit-equal to the baseline's after each of 10 steps",
        ),
        (
            ledger(lambda s, n: {"raw": 1.02, "hash_after": "x"}),
            "different-data",
            None,
            "the first gradients differ by 2.0% before any update: other data, labels or initial weights",
        ),
        (other(), "same-within-rounding", False, "gradients and updates agree with the baseline's to 0.0e+00"),
        (
            other(update=0.2),
            "differs",
            True,
            "updates differ from the baseline's by 35.0%, from step 4",
        ),
        (other(raw=2.0), "differs", True, "updates differ from the baseline's by 0.0%, from step 4"),
        (ledger(names=["elsewhere"]), "nothing-in-common", None, "the two ledgers share no step and tensor"),
    ],
    ids=["identical", "data", "rounding", "update", "raw", "nothing"],
)
def test_pair(rows: Rows, cause: str, effective: bool | None, sentence: str) -> None:
    """Oracle: by hand; 7 of 10 steps with half the update's larger size apart: 35%."""
    verdict = judge_pair(rows, ledger())
    assert (verdict.cause, verdict.effective, verdict.summary) == (cause, effective, sentence)


def test_numbers_of_a_pair() -> None:
    """Oracle: updates of 0.2 against 0.1 in 7 of 10 steps, hashes equal in 3 of 10; a missing zero is no difference."""
    verdict = judge_pair(other(update=0.2), ledger())
    expected = {"rows": 40, "steps": 10, "first_raw": 0.0, "raw": 0.0, "update": 0.35, "bit_equal": 0.3, "onset": 4}
    assert verdict.numbers == pytest.approx(expected)
    assert judge_pair(ledger(steps=4), ledger()).numbers["rows"] == 16
    silent = ledger(lambda s, n: {"raw": 0.0, "update": 0.0, "hash_after": "x"})
    assert judge_pair(silent, ledger(lambda s, n: {"raw": 0.0, "update": 0.0})).cause == "same-within-rounding"


@pytest.mark.parametrize(
    ("first", "later", "cause"),
    [
        (1.009, 1.0, "same-within-rounding"),
        (1.011, 1.0, "different-data"),
        (1.0, 1.0009, "same-within-rounding"),
        (1.0, 1.002, "differs"),
    ],
)
def test_thresholds_of_a_pair(first: float, later: float, cause: str) -> None:
    """Oracle: 1% of the first gradients means other data, 0.1% on average a difference."""
    rows = ledger(lambda s, n: {"raw": first if s == 1 else later, "hash_after": "x"}, steps=100, names=NAMES[:1])
    assert judge_pair(rows, ledger(steps=100, names=NAMES[:1])).cause == cause


def test_not_a_ledger() -> None:
    """Oracle: rows without the header, and none at all."""
    for rows in ([], ledger()[1:]):
        with pytest.raises(GRITError, match="not a gradient ledger"):
            judge_ledger(rows)


def test_facts_of_rows() -> None:
    """Oracle: live, bent and touched by hand, on rows that miss one of their conditions each."""
    changes = ({"raw": 0.0}, {"raw": math.inf}, {"unheld": 1}, {"turn": 1e-4}, {"mods": None}, {"turn": None}, {})
    rows = ledger(lambda s, n: {**BENT, **changes[s - 1]}, steps=len(changes), names=NAMES[:1])
    table = facts(rows)
    assert list(table.live.step) == [4, 5, 6, 7]
    assert list(table.bent.step) == [7]
    assert list(table.touched.step) == [4, 6, 7]
    assert list(table.tensors.turn)[5] == 0.0
    assert table.tensors.layer[0] == "layers.0.q_proj"
    assert table.tensors.late[0] is None
    assert table.share(table.bent, table.live) == 0.25
    assert table.share(table.bent, table.bent[:0]) == 0.0
    missing = facts(ledger(lambda s, n: {"entry": None, "turn": None, "mods": 1}, names=["w"]))
    assert missing.tensors.turn.isna().all()
    assert set(missing.tensors.group) == {"other"}
    assert missing.statuses == {}
    assert not missing.modifier_known


def test_last_report_counts() -> None:
    """Oracle: the preconditioner's report at the end of training, not the first one."""
    rows = [*ledger(report=statuses(collecting=4)), {"kind": "factors", "step": 10, **statuses(ready=4)}]
    assert facts(rows).statuses == {"ready": 4}
    assert facts(rows).modifier_known


@pytest.fixture
def resumed(tmp_path: Path) -> Callable[[Rows, int], RunRecord]:
    """A run record whose ledger begins after step k."""

    def write(rows: Rows, k: int) -> RunRecord:
        record = RunRecord.create(tmp_path / f"{k}-{len(rows)}", arm="pure", resumed_from=k or None)
        with gzip.open(record.ledger, "wt") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
        return record

    return write


@pytest.mark.parametrize(
    ("name", "unseen", "cause", "effective", "claims"),
    [
        ("effective", 0, "effective", True, ("supported", "refuted")),
        ("effective", 10, "effective", True, ("supported", "refuted")),
        ("effective", 11, "partly-seen", None, ("inconclusive", "inconclusive")),
        ("plain", 10, "no-modifier", None, ("inconclusive", "supported")),
        ("plain", 11, "partly-seen", None, ("inconclusive", "inconclusive")),
        ("overwritten", 99, "overwritten", False, ("refuted", "refuted")),
        ("all-skipped", 99, "partly-seen", None, ("inconclusive", "inconclusive")),
    ],
)
def test_resumed_run_is_judged_on_what_was_seen(
    resumed: Any, name: str, unseen: int, cause: str, effective: bool | None, claims: tuple[str, str]
) -> None:
    """Oracle: ten steps seen: half of 20 speaks for the run, less does not, but a fault is one whenever it was seen."""
    verdict = judge_ledger(resumed(CASES[name][1], unseen))
    assert (verdict.cause, verdict.effective) == (cause, effective)
    assert verdict.numbers.get("unseen_steps", 0) == unseen
    seen = f"steps {unseen + 1} to {unseen + 10} seen; the run was resumed after step {unseen}"
    assert (seen in verdict.summary) == bool(unseen)
    assert str(CASES[name][2])[:30] in verdict.summary
    evidence = Evidence(verdicts={"pure": verdict, "baseline": verdict})
    found = [find_claim(f"gradients.{c}").judge(evidence) for c in ("pure-effective", "baseline-unmodified")]
    assert tuple(each.verdict for each in found) == claims


def test_resumed_run_is_compared_at_the_same_steps(resumed: Any) -> None:
    """Oracle: parameters bit-equal to an uninterrupted run's after steps 7 to 10, which the ledger calls 1 to 4."""
    whole = ledger()
    tail = [{**row, "step": row["step"] - 6} if "step" in row else row for row in whole if row.get("step", 7) > 6]
    verdict = judge_pair(resumed(tail, 6), resumed(whole, 0))
    assert (verdict.cause, verdict.numbers["steps"]) == ("identical-to-baseline", 4)
    assert judge_pair(resumed(tail, 0), resumed(whole, 0)).cause == "same-within-rounding"
    stopped = resumed(CASES["stopped"][1], 6)
    assert "no gradient of all 4 tensors was modified after step 13 of 16" in judge_ledger(stopped).summary


def test_picture_of_a_run() -> None:
    """Oracle: two tensors held throughout, one whose learning rate is zero from step 8 on, one that is never turned."""

    def tensor(step: int, name: str) -> dict[str, Any]:
        if name == NAMES[2] and step > 7:
            return {**BENT, "hash_after": f"{name}@{step}"}
        return {} if name == NAMES[3] else BENT

    held, still, idle = custody(facts(ledger(tensor)))
    assert held == (0, 2, [(1, 10, "held")])
    assert still == (2, 1, [(1, 7, "held"), (8, 3, "moved")])
    assert idle == (3, 1, [(1, 10, "turned")])
    assert custody(facts(ledger())) == [(0, 4, [(1, 10, "unmodified")])]


def test_table_of_a_run() -> None:
    """Oracle: 40 tensor-steps, of which B's of layer 1 were never turned; the last link counts tensors."""
    rows = {row.link: row for row in chain_of(facts(ledger(lambda s, n: {} if n == NAMES[3] else BENT)))}
    assert (rows["arrived"].held, rows["arrived"].seen, rows["arrived"].first) == (40, 40, None)
    assert (rows["turned"].held, rows["turned"].seen) == (30, 40)
    assert (rows["turned"].first, rows["turned"].who) == (1, "B of layer 1, q_proj")
    assert (rows["throughout"].held, rows["throughout"].seen) == (3, 4)
