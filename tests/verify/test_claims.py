"""Claims: the catalogue, the decision rules, and each gating claim refuted by evidence that breaks it."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_impl.errors import GRITError
from grit_impl.record import RunRecord
from grit_impl.verify.claims import (
    Claim,
    Evidence,
    Judgement,
    Metric,
    catalogue,
    decide_at_least,
    find,
    items_to_decide,
)
from grit_impl.verify.options import Options

SENTENCE = re.compile(r"[A-Z].*\.$")


@pytest.mark.parametrize("claim", catalogue().values(), ids=catalogue().keys())
def test_declaration_is_complete(claim):
    """Oracle: the rules for a claim: family.name, a sentence, a reason, requirements that evidence understands."""
    assert re.fullmatch(r"[a-z]+\.[a-z0-9-]+", claim.id)
    assert SENTENCE.match(claim.statement)
    assert SENTENCE.match(claim.rationale)
    assert claim.requires
    # `seeds:ARM` asks for something only where several were asked for.
    assert all(Evidence(Options(seeds=2)).lacks(requirement) for requirement in claim.requires)


@pytest.mark.parametrize("claim", catalogue().values(), ids=catalogue().keys())
def test_without_evidence_nothing_is_decided(claim):
    """Oracle: with nothing to judge, the verdict is 'not exercised' and says what is needed."""
    judgement = claim.judge(Evidence())
    assert judgement.verdict == "not exercised"
    assert "needs" in judgement.summary


def test_sound_evidence_supports_every_gate(make_evidence, claims):
    """Oracle: the evidence is written so that every gating claim holds."""
    evidence = make_evidence()
    gating = [c for c in claims if c.gates and c.family != "gpu" and c.id != "gradients.trainer-effective"]
    assert {claim.id: claim.judge(evidence).verdict for claim in gating} == {claim.id: "supported" for claim in gating}


BROKEN = {
    "gradients.baseline-unmodified": {"verdict": ("baseline", "effective", True)},
    "gradients.pure-effective": {"verdict": ("pure", "starved", False)},
    "gradients.hybrid-effective": {"verdict": ("hybrid", "overwritten", False)},
    "gradients.hybrid-late-caught": {"verdict": ("hybrid_late", "effective", True)},
    "curves.rerun-identical": {"offsets": {"rerun": 1e-9}},
    "curves.pure-beyond-noise": {"offsets": {"pure": 0.0}},
    "curves.hybrid-beyond-noise": {"offsets": {"rerun": 0.01}},
    "training.same-schedule": {"options": {"steps": 41}},
    "evaluation.fine-tuning-works": {"right": {"baseline": (0.3, 0.85)}},
    "evaluation.baseline-delta-aqi": {"right": {"baseline": (0.1, 0.85)}},
    "evaluation.pure-delta-aqi": {"right": {"pure": (0.1, 0.85)}},
    "evaluation.baseline-retention": {"right": {"baseline": (0.6, 0.5)}},
    "evaluation.hybrid-retention": {"right": {"hybrid": (0.6, 0.5)}},
    "evaluation.pure-retention": {"right": {"pure": (0.6, 0.5)}},
}


@pytest.mark.parametrize(("name", "change"), BROKEN.items(), ids=BROKEN.keys())
def test_broken_evidence_refutes(make_evidence, name, change):
    """Oracle: the evidence differs from the sound one in just what the claim denies."""
    evidence = make_evidence(right=change.get("right"), offsets=change.get("offsets"), **change.get("options", {}))
    if "verdict" in change:
        arm, cause, effective = change["verdict"]
        found = dataclasses.replace(evidence.verdicts[arm], cause=cause, effective=effective)
        evidence.verdicts = {**evidence.verdicts, arm: found}
    assert find(name).judge(evidence).verdict == "refuted"


def test_other_first_loss_is_not_comparable(make_evidence):
    """Oracle: the logs of the seed experiment: 1.4976 against 7.4957 before any update means other labels."""
    evidence = make_evidence()
    for arm, loss in (("baseline", 1.4976), ("pure", 7.4957), ("hybrid", 1.4976)):
        record = evidence.records[arm]
        rows = record.steps
        rows[0]["loss"] = loss
        (record.path / "steps.jsonl").unlink()
        for row in rows:
            record.append_step(row)
    judgement = find("curves.labels-comparable").judge(evidence)
    assert judgement.verdict == "refuted"
    assert "7.4957" in judgement.summary


@pytest.mark.parametrize(
    ("precision", "pure", "verdict"),
    [
        ("bf16", 3.108919143676758, "supported"),
        ("bf16", 3.2, "refuted"),
        ("fp32", 3.108919143676758, "refuted"),
        (None, 3.108919143676758, "refuted"),
    ],
)
def test_first_losses_differ_by_rounding(make_evidence, precision, pure, verdict):
    """Oracle: SmolLM2's first losses on one H200, the same tokens in bfloat16, on Unsloth and on plain peft."""
    evidence = make_evidence()
    for arm, loss in (("baseline", 3.094081401824951), ("hybrid", 3.094081401824951), ("pure", pure)):
        record = evidence.records[arm]
        rows = [{**row, "loss": loss} if row["step"] == 1 else row for row in record.steps]
        (record.path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if precision:
            content = {**record.run, "config": {"training": {"precision": precision}}}
            (record.path / "run.json").write_text(json.dumps(content))
            evidence.records = {**evidence.records, arm: RunRecord(record.path)}
    assert find("curves.labels-comparable").judge(evidence).verdict == verdict


def test_loss_that_is_not_finite_refutes_learning(make_evidence):
    """Oracle: a NaN planted at step 41."""
    evidence = make_evidence()
    evidence.records["pure"].path.joinpath("COMPLETE").unlink()
    evidence.records["pure"].append_step({"step": 41, "loss": math.nan})
    judgement = find("training.pure-learns").judge(evidence)
    assert judgement.verdict == "refuted"
    assert "step 41" in judgement.summary


def test_a_short_run_leaves_its_curves_open(make_evidence):
    """Oracle: seven steps, one fewer than a comparison takes: open, with the number that would do; no error."""
    evidence = make_evidence()
    for record in evidence.records.values():
        record.truncate_steps(7)
    for claim in ("curves.pure-beyond-noise", "curves.hybrid-beyond-noise"):
        judgement = find(claim).judge(evidence)
        assert (judgement.verdict, judgement.needed) == ("inconclusive", 8)


def test_slow_model_is_refuted_and_noise_is_inconclusive(make_evidence):
    """Oracle: speeds planted at 80% of the base's, and scattered from 70% to 120%."""
    evidence = make_evidence()
    for row in evidence.evaluation.speed:
        if row["label"] == "pure":
            row["tokens_per_second"] *= 0.8
        if row["label"] == "hybrid":
            row["tokens_per_second"] *= 0.7 if row["round"] % 2 else 1.2
    assert find("evaluation.pure-speed").judge(evidence).verdict == "refuted"
    assert find("evaluation.hybrid-speed").judge(evidence).verdict == "inconclusive"
    assert find("evaluation.baseline-speed").judge(evidence).verdict == "supported"


@pytest.mark.parametrize(
    ("tenth", "verdict", "ratio"), [(0.1, "supported", 1.0), (1.4, "refuted", 2.3)], ids=["even", "inversions"]
)
def test_every_tenth_step_counts(make_evidence, tenth, verdict, ratio):
    """Oracle: steps of 0.1 s, and every tenth of 1.4 s: medians are equal, totals are not."""
    evidence = make_evidence()
    for arm, each in (("baseline", 0.1), ("pure", tenth)):
        record = evidence.records[arm]
        rows = [{**row, "seconds": each if row["step"] % 10 == 0 else 0.1} for row in record.steps]
        (record.path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = find("training.pure-overhead").judge(evidence)
    assert judged.verdict == verdict
    assert judged.metrics[0].estimate == pytest.approx(ratio)


def test_changed_or_silent_export_is_refuted(make_evidence):
    """Oracle: one byte appended to a GGUF file, another model that answers nothing."""
    evidence = make_evidence()
    with open(evidence.exports["pure"]["path"], "ab") as handle:
        handle.write(b"!")
    for suite in ("aqi", "knowledge"):
        for row in evidence.evaluation.rows("hybrid", suite).values():
            row.update(answer="", eval_count=0)
    assert find("export.pure-generates").judge(evidence).verdict == "refuted"
    assert find("export.hybrid-generates").judge(evidence).verdict == "refuted"
    assert find("export.base-generates").judge(evidence).verdict == "supported"


def test_unanswered_items_decide_nothing(make_evidence):
    """Oracle: one item of pure without a trustworthy answer: its claims cannot be decided, those of others can."""
    evidence = make_evidence()
    next(iter(evidence.evaluation.rows("pure").values()))["error"] = "timeout"
    assert find("evaluation.pure-delta-aqi").judge(evidence).verdict == "inconclusive"
    assert find("evaluation.baseline-delta-aqi").judge(evidence).verdict == "supported"


@pytest.mark.parametrize(
    ("pure", "hybrid", "beats", "agrees"),
    [
        (0.80, 0.80, "supported", "supported"),
        (0.60, 0.90, "inconclusive", "refuted"),
        (0.40, 0.44, "refuted", "inconclusive"),
    ],
)
def test_hypotheses_follow_the_paired_interval(make_evidence, pure, hybrid, beats, agrees):
    """Oracle: 200 nested items, baseline 60%: gaps of 20 points are plain, of 4 within an interval of about 3."""
    evidence = make_evidence(right={"pure": (pure, 0.85), "hybrid": (hybrid, 0.85)})
    assert find("hypotheses.pure-beats-lora").judge(evidence).verdict == beats
    assert find("hypotheses.hybrid-agrees-with-pure").judge(evidence).verdict == agrees


def test_thresholds_come_from_the_options(make_evidence):
    """Oracle: the same delta_AQI of 36 points against a threshold below and above its interval."""
    claim = find("evaluation.pure-delta-aqi")
    evidence = make_evidence(min_delta_aqi=20.0)
    assert claim.judge(evidence).verdict == "supported"
    assert claim.judge(dataclasses.replace(evidence, options=Options(min_delta_aqi=60.0))).verdict == "refuted"


class TestDecideAtLeast:
    """The rule on intervals, by cases and by properties."""

    CASES = (
        (Metric("m", 5, 1, 9), 0.0, False, "supported"),
        (Metric("m", 5, 0, 9), 0.0, False, "supported"),
        (Metric("m", 5, 0, 9), 0.0, True, "inconclusive"),
        (Metric("m", -5, -9, -1), 0.0, False, "refuted"),
        (Metric("m", -5, -9, 0), 0.0, False, "inconclusive"),
        (Metric("m", -5, -9, 0), 0.0, True, "refuted"),
        (Metric("m", 1, -1, 3), 0.0, False, "inconclusive"),
        (Metric("m", 1), 0.0, True, "supported"),
        (Metric("m", 0), 0.0, True, "refuted"),
        (Metric("m", math.nan), 0.0, False, "not exercised"),
        (Metric("m", 1, math.nan, 2), 0.0, False, "not exercised"),
        (Metric("m", 1, -math.inf, math.inf), 0.0, False, "inconclusive"),
    )

    @pytest.mark.parametrize(("metric", "bound", "strictly", "verdict"), CASES)
    def test_cases(self, metric, bound, strictly, verdict):
        """Oracle: where the interval lies against the bound, by hand."""
        assert decide_at_least(metric, bound, "it", strictly=strictly).verdict == verdict

    @given(st.floats(-50, 50), st.floats(0.01, 50), st.floats(-50, 50), st.integers(2, 10_000))
    def test_needed_sample_decides(self, estimate, half, bound, n):
        """Oracle: with the sample it asks for, and the interval shrunk by 1/sqrt(n), the verdict is decided."""
        metric = Metric("m", estimate, estimate - half, estimate + half, n=n)
        judgement = decide_at_least(metric, bound, "it")
        if judgement.verdict != "inconclusive" or abs(estimate - bound) < 1e-4:
            return
        needed = items_to_decide(metric, bound)
        assert needed is not None
        assert needed > n
        narrow = half * math.sqrt(n / (needed + 1))
        again = Metric("m", estimate, estimate - narrow, estimate + narrow, n=needed)
        assert decide_at_least(again, bound, "it").verdict == ("supported" if estimate > bound else "refuted")


def test_judgement_survives_json(make_evidence):
    """Oracle: the judgement itself, after to_dict and from_dict."""
    judgement = find("evaluation.pure-delta-aqi").judge(make_evidence())
    assert Judgement.from_dict(judgement.to_dict()) == judgement


def test_unknown_claim_names_the_nearest():
    """Oracle: one letter off."""
    with pytest.raises(GRITError, match=r"did you mean 'gradients\.pure-effective'"):
        find("gradients.pure-efective")


def test_unknown_requirement_is_an_error():
    """Oracle: a requirement that no evidence has a place for must not read as 'not exercised'."""
    claim = Claim("x.y", "S.", ("moon:pure",), "R.", lambda _: Judgement("supported", ""))
    with pytest.raises(GRITError, match="unknown requirement"):
        claim.judge(Evidence())


def test_what_broke_is_told_apart_from_what_is_missing():
    """Oracle: two arms without a ledger, one of which crashed."""
    evidence = Evidence(missing={"hybrid": "no GPU"}, failed={"pure": "its process ended with status 1"})
    missing, failed = find("gradients.hybrid-effective"), find("gradients.pure-effective")
    assert missing.judge(evidence).evidence == {"broken": []}
    assert "no GPU" in missing.judge(evidence).summary
    assert failed.judge(evidence).evidence == {"broken": ["verdict:pure"]}
    assert "status 1" in failed.judge(evidence).summary


class TestMetric:
    """How numbers read, and what they are made of."""

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0"),
            (0.0999, "0.0999"),
            (-0.0999, "-0.0999"),
            (0.1, "0.10"),
            (1.0, "1.00"),
            (-1.234, "-1.23"),
            (9999.0, "9999.00"),
            (9999.99, "9999.99"),
            (10000.0, "1e+04"),
            (-123456.0, "-1.235e+05"),
            (math.inf, "inf"),
            (math.nan, "nan"),
        ],
    )
    def test_number(self, value, text):
        """Oracle: two decimals from 0.1 to 10,000, four digits elsewhere."""
        assert str(Metric("m", value)) == text

    @pytest.mark.parametrize(
        ("metric", "text"),
        [
            (Metric("m", 1, unit="points"), "1.00 points"),
            (Metric("m", 1, unit="%"), "1.00%"),
            (Metric("m", 1, 0.5, 2, "s", 7), "1.00 s [0.50, 2.00] (n = 7)"),
            (Metric("m", 1, 0.5, None, n=0), "1.00 (n = 0)"),
            (Metric("m", 1, None, 2), "1.00"),
        ],
    )
    def test_text(self, metric, text):
        """Oracle: by hand: an interval needs both its ends."""
        assert str(metric) == text

    def test_plain_numbers(self):
        """Oracle: Python's own types, whatever came in."""
        numpy = pytest.importorskip("numpy")
        metric = Metric("m", numpy.float32(0.5), numpy.int64(0), numpy.float64(1), n=numpy.int64(3))
        assert [type(v) for v in (metric.estimate, metric.low, metric.high, metric.n)] == [float, float, float, int]
        assert Metric("m", 1).low is Metric("m", 1).high is Metric("m", 1).n is None

    def test_nothing_changes_it(self):
        """Oracle: a judgement that was made stays as it is."""
        for value in (Metric("m", 1), Judgement("supported", "s"), find("gradients.pure-effective")):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, dataclasses.fields(value)[0].name, "other")
        assert find("gradients.pure-effective").family == "gradients"


class TestNeededSample:
    """`items_to_decide`, by hand."""

    @pytest.mark.parametrize(
        ("metric", "bound", "needed"),
        [
            (Metric("m", 5, 1, 8, n=100), 0, 101),  # decided already: one more than there are
            (Metric("m", 2, -4, 3, n=100), 0, 900),  # the lower half of 6 must shrink to 2
            (Metric("m", -2, -9, 4, n=100), 0, 900),  # the upper half of 6 must shrink to 2
            (Metric("m", 3, -1, 9, n=10), 2, 160),
            (Metric("m", 2.5, 2, 5, n=3), 2, 4),
            (Metric("m", 2, 1, 3, n=10), 2, None),
            (Metric("m", 2, 1, 3), 0, None),
            (Metric("m", 2, None, 3, n=10), 0, None),
            (Metric("m", 2, 1, None, n=10), 0, None),
            (Metric("m", 1, -(10**6), 3, n=1), 0, None),
            (Metric("m", 1, 2 - 10**6, 3, n=1), 0, (10**6 - 1) ** 2),
            (Metric("m", 1, -math.inf, 3, n=1), 0, None),
        ],
    )
    def test_cases(self, metric, bound, needed):
        """Oracle: n times the square of (half-width over distance)."""
        assert items_to_decide(metric, bound) == needed

    def test_the_sentence_says_it(self):
        """Oracle: the number that would decide, or that none does."""
        open_one = decide_at_least(Metric("m", 2, -4, 3, "points", 100), 0, "delta")
        text = "delta is 2.00 points [-4.00, 3.00] (n = 100); asked for at least 0 points; about 900 would decide"
        assert (open_one.summary, open_one.needed) == (text, 900)
        at_bound = decide_at_least(Metric("m", 2, 1, 3, "%", 10), 2, "delta", strictly=True)
        assert at_bound.summary.endswith(
            "asked for more than 2%; no sample size can be named: the estimate is at the bound"
        )
        assert at_bound.needed is None
        sure = decide_at_least(Metric("m", 2, 1, 3), 0.5, "delta")
        assert (sure.summary, sure.metrics) == (
            "delta is 2.00 [1.00, 3.00]; asked for at least 0.5",
            (Metric("m", 2, 1, 3),),
        )
        assert decide_at_least(Metric("m", 2, 1, 3), 3.5, "delta").summary == (
            "delta is 2.00 [1.00, 3.00]; asked for at least 3.5"
        )
        assert decide_at_least(Metric("m", 2, 1, 3), 3.0, "delta").verdict == "inconclusive"
        assert decide_at_least(Metric("m", 2, 1, 3), 1.0, "delta", strictly=True).verdict == "inconclusive"
        assert decide_at_least(Metric("m", math.nan), 3.0, "delta").summary == "delta was not measured (not a number)"


def test_what_is_lacking_is_named():
    """Oracle: kind and name of the requirement, why, or what there is instead."""
    evidence = Evidence(
        verdicts={"b": None, "a": None},
        missing={"export": "no disk", "pure": "no time"},
        failed={"record:pure": "crash"},
    )
    assert evidence.lacks("verdict:a") is None
    assert evidence.lacks("verdict:c") == "needs the gradient ledger of 'c': found a, b"
    assert evidence.lacks("record:c") == "needs the run of 'c': found none"
    assert evidence.lacks("export:c") == "needs the GGUF export of 'c': no disk"
    assert evidence.lacks("evaluation:c") == "needs the evaluation of 'c': found none"
    assert evidence.lacks("verdict:pure") == "needs the gradient ledger of 'pure': no time"
    assert evidence.lacks("record:pure") == "needs the run of 'pure': crash"
    assert [evidence.broke(f"{kind}:pure") for kind in ("record", "verdict")] == [True, False]
    claim = Claim("x.y", "S.", ("record:pure", "verdict:a", "export:c"), "R.", lambda _: Judgement("supported", ""))
    judgement = claim.judge(evidence)
    assert judgement.summary == "needs the run of 'pure': crash; needs the GGUF export of 'c': no disk"
    assert judgement.evidence == {"broken": ["record:pure"]}
    assert claim.gates
    assert evidence.gather(["verdict:a"]) is evidence
