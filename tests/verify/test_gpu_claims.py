"""The logic of the claims that only a GPU can decide, on hand-written costs and records."""

from __future__ import annotations

import json

import pytest

from grit_impl.errors import GRITError
from grit_impl.probe.findings import FILE, ProbeReport, Requirement
from grit_impl.record import RunRecord
from grit_impl.verify.claims import find
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.evidence.live import LiveEvidence
from grit_impl.verify.options import Options

from .conftest import write_run


def _costs(ratios, memory=1.0):
    cell = {"length": 512, "step_ratios": ratios, "plain_peak_bytes": 2**33, "grit_peak_bytes": int(2**33 * memory)}
    return Evidence(costs={stack: {"cells": [{**cell}, {**cell, "length": 2048}]} for stack in ("unsloth", "peft")})


@pytest.mark.parametrize("arm", ["hybrid", "pure"])
@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.01, 1.02, 1.03] * 4, "supported"),
        ([1.07, 1.08, 1.10] * 4, "refuted"),
        ([0.95, 1.04, 1.15] * 4, "inconclusive"),
        ([1.01] * 5, "inconclusive"),  # too few for an interval
    ],
)
def test_step_time(arm, ratios, verdict):
    """Oracle: where the whole interval of the median lies, at either length."""
    for claim in (f"gpu.{arm}-step-time", f"gpu.{arm}-step-time-short"):
        assert find(claim).judge(_costs(ratios)).verdict == verdict


def test_each_length_is_judged_by_its_own_ratios():
    """Oracle: by hand: dear on short sequences alone refutes the claim about those; a missing length is open."""
    evidence = _costs([1.01, 1.02, 1.03] * 4)
    evidence.costs["peft"]["cells"][0]["step_ratios"] = [1.07, 1.08, 1.10] * 4
    evidence.costs["unsloth"]["cells"].pop()
    names = ("pure-step-time", "pure-step-time-short", "hybrid-step-time", "hybrid-step-time-short")
    verdicts = [find(f"gpu.{name}").judge(evidence).verdict for name in names]
    assert verdicts == ["supported", "refuted", "inconclusive", "supported"]


@pytest.mark.parametrize(("ratios", "least"), [([1.01] * 5, 6), ([0.95, 1.04, 1.15] * 4, 13)])
def test_step_time_names_how_many_ratios_would_decide(ratios, least):
    """Oracle: five are too few for any interval; of twelve that leave it open, more than twelve are needed."""
    assert find("gpu.hybrid-step-time").judge(_costs(ratios)).needed >= least


def test_compiled_layers_are_named(tmp_path):
    """Oracle: by hand: what was measured on Unsloth says in how many compiled decoder layers, or that there were none;
    plain peft has none."""
    evidence, report = _costs([1.01] * 6), {"completeness_error": 0.004, "statuses": {}, "layers": [], "spectra": []}
    for layers in (0, 32):
        for cell in evidence.costs["unsloth"]["cells"]:
            cell["compiled_layers"] = layers
        record = write_run(tmp_path / str(layers), "hybrid", grit_report=report, compiled_layers=layers, unsloth=True)
        judged = [
            find("gpu.hybrid-step-time").judge(evidence),
            find("gpu.hybrid-all-layers").judge(Evidence(records={"hybrid": record})),
        ]
        said = ", in 32 compiled decoder layers" if layers else ", in decoder layers that Unsloth did not compile"
        assert [said in each.summary for each in judged] == [True] * 2
        assert [" compiled decoder layers" in each.summary for each in judged] == [layers > 0] * 2
    plain = write_run(tmp_path / "pure", "pure", grit_report=report, compiled_layers=0)
    assert "decoder" not in find("gpu.pure-all-layers").judge(Evidence(records={"pure": plain})).summary


@pytest.mark.parametrize(("factor", "verdict"), [(1.019, "supported"), (1.03, "refuted")])
def test_memory(factor, verdict):
    """Oracle: the ratio of two peaks against the plan's 1.02."""
    assert find("gpu.hybrid-memory").judge(_costs([1.0] * 6, factor)).verdict == verdict


def test_memory_without_a_gpu_is_open():
    """Oracle: a cost file made on a CPU holds no peak."""
    evidence = _costs([1.0] * 6)
    evidence.costs["unsloth"]["cells"][0].update(plain_peak_bytes=0, grit_peak_bytes=0)
    assert find("gpu.hybrid-memory").judge(evidence).verdict == "inconclusive"


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "inconclusive"), (1.03, "refuted")])
def test_memory_of_one_length_alone(factor, verdict):
    """Oracle: what was not measured supports nothing; too much at the other length refutes it all the same."""
    evidence = _costs([1.0] * 6, factor)
    evidence.costs["unsloth"]["cells"].pop()
    assert find("gpu.hybrid-memory").judge(evidence).verdict == verdict
    evidence.costs["unsloth"]["cells"].clear()
    assert find("gpu.hybrid-memory").judge(evidence).verdict == "inconclusive"


GIB = 2**30


@pytest.fixture
def runs(tmp_path):
    """(baseline, hybrid): records of runs whose memory peaked so, per step and at the end; -> evidence."""

    def write(baseline, hybrid, gpu="NVIDIA A10", save_every=20, compiled=(None, None)):
        records = {}
        for arm, peaks, layers in zip(("baseline", "hybrid"), (baseline, hybrid), compiled, strict=True):
            config = {"training": {"steps": 40, "save_every": save_every}}
            last = int(peaks[-1] * GIB)
            record = write_run(tmp_path, arm, machine={"gpu": gpu}, peak_memory_bytes=last, config=config)
            record.update(compiled_layers=layers)
            steps = record.steps
            for step, peak in zip(steps, [*peaks, *[peaks[-1]] * len(steps)], strict=False):
                step["memory_bytes"] = int(peak * GIB)
            (record.path / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
            records[arm] = RunRecord(record.path)
        return Evidence(records=records)

    return write


@pytest.mark.parametrize(
    ("hybrid", "verdict"),
    [
        ([6.071, 6.1043], "supported"),
        ([6.071, 6.1043, 6.4244], "refuted"),  # a checkpoint solved the spectra that waited on the GPU
        ([6.071, 6.4244, 6.1], "refuted"),  # the run was resumed afterwards, which begins the peak anew
    ],
)
def test_memory_of_whole_runs(runs, hybrid, verdict):
    """Oracle: measured peaks of 200 steps on an H200, GiB, against the plan's 1.02 by hand."""
    judged = find("gpu.hybrid-run-memory").judge(runs([6.0561, 6.1009], hybrid))
    assert judged.verdict == verdict
    assert f"{max(hybrid):.2f} GiB for 6.10" in judged.summary


@pytest.mark.parametrize(("compiled", "verdict"), [((0, None), "supported"), ((32, 32), "supported")])
def test_memory_of_runs_that_compiled_alike(runs, compiled, verdict):
    """Oracle: records from before Unsloth compiled decoder layers do not say how many; they had none."""
    assert find("gpu.hybrid-run-memory").judge(runs([6.1], [6.1], compiled=compiled)).verdict == verdict


def test_memory_of_runs_that_compiled_otherwise_is_open(runs):
    """Oracle: by hand: Unsloth gave up compiling in one of the two."""
    judged = find("gpu.hybrid-run-memory").judge(runs([6.1], [6.1], compiled=(32, 0)))
    assert judged.verdict == "inconclusive"
    assert judged.summary == "Unsloth ran 0 in hybrid and 32 in baseline of the decoder layers compiled"


def test_memory_of_runs_without_a_gpu_is_open(runs):
    """Oracle: there the records hold the memory of the process."""
    judged = find("gpu.hybrid-run-memory").judge(runs([6.1], [6.1], gpu=None))
    assert (judged.verdict, judged.summary) == ("inconclusive", "hybrid was trained without a GPU")


def test_memory_of_runs_that_measured_none_is_open(runs):
    """Oracle: no figure refutes nothing."""
    judged = find("gpu.hybrid-run-memory").judge(runs([6.1], [0.0]))
    assert (judged.verdict, judged.summary) == ("inconclusive", "hybrid's record has no peak memory")


@pytest.mark.parametrize(("save_every", "verdict"), [(0, "inconclusive"), (41, "inconclusive"), (40, "supported")])
def test_memory_of_runs_without_a_checkpoint_is_open(runs, save_every, verdict):
    """Oracle: of 40 steps, what a checkpoint takes was in the peak or was not."""
    judged = find("gpu.hybrid-run-memory").judge(runs([6.1], [6.1], save_every=save_every))
    assert judged.verdict == verdict
    assert ("took no checkpoint" in judged.summary) == (verdict == "inconclusive")


def test_an_unfinished_measurement_is_judged_as_far_as_it_goes(tmp_path):
    """Oracle: `--reuse-runs` measures nothing: the finished length is there, the other is said to be missing."""
    (tmp_path / "cost").mkdir()
    cell = _costs([1.01, 1.02, 1.03] * 4).costs["peft"]["cells"][0]
    (tmp_path / "cost" / "peft.json").write_text(json.dumps({"inputs": "x", "cells": [cell], "running": 3.0}))
    evidence = LiveEvidence(Options(reports_dir=tmp_path, reuse_runs=True)).gather(["cost:peft"])
    assert find("gpu.pure-step-time-short").judge(evidence).verdict == "supported"
    judged = find("gpu.pure-step-time").judge(evidence)
    assert (judged.verdict, "2048 tokens per sequence were not measured" in judged.summary) == ("inconclusive", True)


def test_a_damaged_cost_file_is_named(tmp_path):
    """Oracle: one line with the file."""
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost" / "peft.json").write_text('{"cells": [')
    evidence = LiveEvidence(Options(reports_dir=tmp_path, reuse_runs=True))
    with pytest.raises(GRITError, match=r"cost/peft\.json is damaged"):
        evidence.gather(["cost:peft"])


@pytest.mark.parametrize(
    ("ready", "error", "verdict"), [(224, 0.004, "supported"), (223, 0.004, "refuted"), (224, None, "inconclusive")]
)
def test_all_layers(tmp_path, ready, error, verdict):
    """Oracle: one layer without statistics refutes it; statistics never compared with gradients decide nothing."""
    report = {
        "inversions": 4,
        "coverage": 0.9,
        "spectra": [],
        "completeness_error": error,
        "statuses": {"ready": ready},
        "layers": [{}] * 224,
    }
    record = write_run(tmp_path, "hybrid", grit_report=report)
    assert find("gpu.hybrid-all-layers").judge(Evidence(records={"hybrid": record})).verdict == verdict


@pytest.mark.parametrize(("pure", "verdict"), [(False, "supported"), (True, "refuted")])
def test_unsloth_where_it_belongs(tmp_path, pure, verdict):
    """Oracle: what the processes recorded; Unsloth in pure's process refutes it."""
    used = {"baseline": True, "hybrid": True, "pure": pure}
    records = {arm: write_run(tmp_path, arm, unsloth=on) for arm, on in used.items()}
    assert find("gpu.unsloth-where-it-belongs").judge(Evidence(records=records)).verdict == verdict


def test_a_failed_probe_refutes_and_names_the_check(tmp_path):
    """Oracle: a probe in which the gradients did not arrive; without a probe nothing is decided."""
    claim, record = find("gradients.moment-reaches-optimizer"), write_run(tmp_path, "hybrid")
    evidence = Evidence(records={"hybrid": record})
    assert claim.judge(evidence).verdict == "supported"
    lost = Requirement("bit for bit", False, "0 of 448 tensors, AdamW8bit")
    ProbeReport("unsloth", "AdamW8bit", {}, (), (lost,)).write(record.path / FILE)
    judgement = claim.judge(evidence)
    assert judgement.verdict == "refuted"
    assert "0 of 448 tensors, AdamW8bit" in judgement.summary
    (record.path / FILE).unlink()
    assert claim.judge(evidence).verdict == "inconclusive"
