"""Effects over training seeds: paired by seed, and honest about how few there are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from grit_impl.errors import GRITError
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.seeds import effect_over_seeds
from grit_impl.verify.claims import Evidence, find
from grit_impl.verify.claims.base import SeedEvidence
from grit_impl.verify.options import Options


def _evaluation(baseline: int, pure: int, n: int = 100) -> Evaluation:
    rows = [
        {"label": label, "suite": "aqi", "item": str(i), "scores": {"category_right": i < right, "unparsable": False}}
        for label, right in (("baseline", baseline), ("pure", pure))
        for i in range(n)
    ]
    return Evaluation({"baseline": "b", "pure": "p"}, rows)


def test_six_seeds_by_hand() -> None:
    """Oracle: differences 4, 6, 5, 7, 3, 5: mean 5; all of one sign, so p = 2 / 2**6; t interval by hand."""
    found = effect_over_seeds([_evaluation(50, 50 + d) for d in (4, 6, 5, 7, 3, 5)], "pure", "baseline")
    assert found.differences == (4, 6, 5, 7, 3, 5)
    assert found.p == pytest.approx(2 / 2**6)
    half = 2.5706 * 2**0.5 / 6**0.5
    assert (found.interval.low, found.interval.high) == pytest.approx((5 - half, 5 + half), abs=1e-3)
    assert found.decided
    assert "over 6 seeds, p = 0.031" in found.statement


def test_a_server_that_is_not_exact_widens_the_interval_over_seeds() -> None:
    """Oracle: 18 answers asked again without a change: 1 of 20 may be off for each arm, 10 points for a difference."""
    evaluations = [_evaluation(50, 50 + d) for d in (4, 6, 5, 7, 3, 5)]
    plain = effect_over_seeds(evaluations, "pure", "baseline")
    rows = list(evaluations[2].rows("pure").values())[:18]
    for row in rows:
        row["answer"] = "AQI 1"
    evaluations[2].again = [{**row, "beside": ""} for row in rows]
    found = effect_over_seeds(evaluations, "pure", "baseline")
    assert (found.interval.low, found.interval.high) == (plain.interval.low - 10, plain.interval.high + 10)
    assert not found.decided


def test_a_bound_other_than_zero() -> None:
    """Oracle: against a bound of 4.5 the differences are -.5, 1.5, .5, 2.5, -1.5, .5: 3 above all flips, undecided."""
    found = effect_over_seeds([_evaluation(50, 50 + d) for d in (4, 6, 5, 7, 3, 5)], "pure", "baseline", bound=4.5)
    assert found.p > 0.05
    assert not found.decided
    assert "decides nothing" in found.statement


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([7], "one seed, which supports no statement"),
        ([7, 8, 7, 9, 8], "5 seeds, which cannot reach p < .05 (at best 0.062); run 6"),
        ([7, -6, 5, -7, 3, -1], "decides nothing"),
    ],
)
def test_what_too_few_or_mixed_seeds_do_not_support(seeds: list[int], words: str) -> None:
    """Oracle: two-sided sign-flip test: 2 / 2**n at best."""
    found = effect_over_seeds([_evaluation(50, 50 + d) for d in seeds], "pure", "baseline")
    assert words in found.statement
    assert not found.decided


def test_missing_arms_are_named() -> None:
    """Oracle: the message."""
    with pytest.raises(GRITError, match="evaluation 1 has no items that both 'hybrid' and 'baseline'"):
        effect_over_seeds([_evaluation(50, 60)], "hybrid", "baseline")
    with pytest.raises(GRITError, match="at least one seed"):
        effect_over_seeds([], "pure", "baseline")


def _evidence(gaps: Sequence[int]) -> Evidence:
    """Pure is so many points better than the baseline, one number per seed; hybrid equals pure."""
    seeds = {}
    for seed, gap in enumerate(gaps, 3407):
        evaluation = _evaluation(50, 50 + gap)
        rows = [*evaluation.answers]
        rows += [{**row, "label": "hybrid"} for row in rows if row["label"] == "pure"]
        seeds[seed] = SeedEvidence({}, Evaluation({"baseline": "b", "pure": "p", "hybrid": "h"}, rows))
    first = seeds[3407].evaluation
    return Evidence(Options(seeds=len(gaps)), evaluation=first, seeds=seeds if len(gaps) > 1 else {})


@pytest.mark.parametrize(
    ("gaps", "verdict", "words"),
    [
        ((4, 6, 5, 7, 3, 5), "supported", "over 6 seeds, p = 0.031"),
        ((-4, -6, -5, -7, -3, -5), "refuted", "over 6 seeds"),
        ((40, 41, 42), "inconclusive", "run 6"),
        ((9, -6, 5, -7, 3, -1), "inconclusive", "decides nothing"),
        ((30,), "supported", "one seed: these models, not the method"),
    ],
)
def test_the_hypothesis_is_decided_over_seeds(gaps, verdict: str, words: str) -> None:
    """Oracle: by hand; three seeds with a gap of 40 points decide nothing about the method, one decides about items."""
    judged = find("hypotheses.pure-beats-lora").decide(_evidence(gaps))
    assert judged.verdict == verdict
    assert words in judged.summary
    if len(gaps) > 1:
        assert judged.evidence["differences by seed"] == dict(enumerate(map(float, gaps), 3407))
        assert judged.metrics[0].n == len(gaps)


def test_seeds_that_are_asked_for_can_decide() -> None:
    """Oracle: by width alone four seeds would do after these three, but fewer than six reach no p < .05."""
    judged = find("hypotheses.pure-beats-lora").decide(_evidence((5, 6, 2)))
    assert judged.metrics[0].low < 0
    assert (judged.verdict, judged.needed) == ("inconclusive", 6)


def test_equivalence_over_seeds() -> None:
    """Oracle: hybrid and pure answer alike with every seed; two seeds that agree by chance are no evidence."""
    judged = find("hypotheses.hybrid-agrees-with-pure").decide(_evidence((4, 6, 5, 7, 3, 5)))
    assert (judged.verdict, judged.metrics[0].estimate, judged.metrics[0].n) == ("supported", 0, 6)
    evidence = _evidence((4, 6, 5, 7, 3, 5))
    for offset, each in zip((0, 0, 0, 0, 2, 8), evidence.seeds.values(), strict=True):
        for item in [str(n) for n in range(offset)]:
            each.evaluation.rows("hybrid")[item]["scores"] = {"category_right": False}
    judged = find("hypotheses.hybrid-agrees-with-pure").decide(evidence)
    assert judged.verdict == "inconclusive"
    assert judged.needed > 6, "six did not decide"
    judged = find("hypotheses.hybrid-agrees-with-pure").decide(_evidence((4, 6)))
    assert (judged.verdict, judged.needed) == ("inconclusive", 6)


def test_an_unanswered_item_of_any_seed_decides_nothing() -> None:
    """Oracle: one item of the third seed has an error; it is named."""
    evidence = _evidence((4, 6, 5, 7, 3, 5))
    evidence.seeds[3409].evaluation.rows("pure")["7"]["error"] = "timeout"
    for name in ("pure-beats-lora", "hybrid-agrees-with-pure"):
        judged = find(f"hypotheses.{name}").decide(evidence)
        assert judged.verdict == "inconclusive"
        assert "pure: aqi/7" in judged.summary


def test_seeds_are_required_only_where_several_were_asked_for() -> None:
    """Oracle: the reason that the evidence gives."""
    assert Evidence(Options()).lacks("seeds:pure") is None
    assert "every seed" in str(Evidence(Options(seeds=6)).lacks("seeds:pure"))


def test_the_report_shows_every_seed(tmp_path) -> None:
    """Oracle: the planted differences, in the page and in the summary; without seeds no such section."""
    from grit_impl.verify.report import write_report
    from grit_impl.verify.store.database import JudgedClaim, Session

    claim, evidence = find("hypotheses.pure-beats-lora"), _evidence((4, 6, 5, 7, 3, 5))
    session = Session("a", "2026-01-01T00:00:00+00:00", None, Options(seeds=6).to_dict(), {})
    write_report(tmp_path, session, [JudgedClaim(claim, claim.decide(evidence))], Evidence(Options(seeds=6)))
    for name in ("index.html", "grit_evaluation.md"):
        text = (tmp_path / name).read_text()
        assert "Over seeds" in text
        assert "3407: +4, 3408: +6, 3409: +5, 3410: +7, 3411: +3, 3412: +5" in text
        assert "over 6 seeds, p = 0.031" in text
    write_report(tmp_path, session, [JudgedClaim(claim, claim.decide(_evidence((30,))))], Evidence(Options()))
    assert "Over seeds" not in (tmp_path / "index.html").read_text()
