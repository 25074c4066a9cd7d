"""`grit compare`: the four questions, on logs whose truth is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from grit_impl.curves import report as compare_report
from grit_impl.curves.arms import compare_arms, fewest_pairs
from grit_impl.curves.commands import compare as command
from grit_impl.curves.compare import CAVEAT, compare_logs, compare_records
from grit_impl.curves.logs import RunLog, read_log
from grit_impl.curves.result import CurveComparison
from grit_impl.errors import GRITError
from grit_impl.record import RunRecord

FORMATS = ["tensorboard scalars", "tensorboard tensors", "trainer_state 4", "trainer_state 5", "csv", "jsonl", "record"]
Values = np.typing.NDArray[np.float64]


def log(loss: Values, name: str = "run", **series: Values | dict[str, int] | None) -> RunLog:
    """A log in memory."""
    return RunLog(name, Path(name), "array", np.arange(1, loss.size + 1), loss, **series)  # type: ignore[arg-type]


def noise(seed: int, scale: float = 6e-4, size: int = 200) -> Values:
    """White noise with a first entry of zero: the loss before any update."""
    values = np.random.default_rng([17, seed]).normal(0, scale, size)
    values[0] = 0
    return values


def drift(size: int = 200, end: float = 0.08) -> Values:
    """What another optimizer does to the loss."""
    return np.linspace(0, end, size)


@pytest.fixture
def pair(logs: ModuleType) -> tuple[Values, Values, Values]:
    """Baseline, its noisy rerun, and a run that really differs."""
    base = logs.curve()
    return base, base + noise(1), base - drift() + noise(2)


@pytest.mark.parametrize("kind", FORMATS)
def test_same_verdicts_from_every_format(
    tmp_path: Path, logs: ModuleType, pair: tuple[Values, Values, Values], kind: str
) -> None:
    """Oracle: one run in seven formats must get one set of verdicts, against itself, a rerun and another optimizer."""
    base, rerun, other = pair
    for name, loss in (("base", base), ("rerun", rerun), ("other", other), ("again", base + noise(3))):
        logs.WRITERS[kind](tmp_path / name, logs.rows(loss))
    base_log, rerun_log, other_log, again = (read_log(tmp_path / n) for n in ("base", "rerun", "other", "again"))
    different = compare_logs(base_log, other_log, [rerun_log])
    assert different.verdicts == {
        "comparable": "yes",
        "training": "different",
        "decorrelated": "shared batches",
        "better": "inconclusive",
    }
    assert compare_logs(base_log, again, [rerun_log]).verdict == "same"
    assert compare_logs(base_log, base_log).verdicts["better"] == "neither"


def test_transformers_4_against_5(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: one run, logged by both: rates one step apart and rounded losses are the same training."""
    rows = logs.rows(logs.curve())
    four, five = (read_log(logs.write_state(tmp_path / str(v), rows, version=v)) for v in (4, 5))
    result = compare_logs(four, five)
    assert result.verdict == "same"
    assert "one step apart" in result.reasons["comparable"]


def test_seed_experiment_pure_is_refused() -> None:
    """Oracle: the "pure GRIT" log: 7.4957 and norm 160.6 against 1.4976 and 0.379 before any update."""
    base, n = np.linspace(1.4976, 1.0, 200), 200
    a = log(base, "baseline", grad_norm=np.full(n, 0.379))
    b = log(np.linspace(7.4957, 0.09, n), "pure", grad_norm=np.full(n, 160.6))
    result = compare_logs(a, b)
    assert result.verdict == "incomparable"
    assert result.verdicts["better"] == "not exercised"
    for number in ("1.4976", "7.4957", "0.379", "160.6"):
        assert number in result.reasons["comparable"]


def test_seed_experiment_hybrid_is_the_same(logs: ModuleType) -> None:
    """Oracle: the seed's hybrid: RMS 0.0006 in every block of 50 steps, r = 0.99998, no rerun; nothing was applied."""
    base = logs.curve()
    other = base + noise(4)
    norms = 0.378703 + 0.05 * np.abs(base - base[0])
    result = compare_logs(log(base, "a", grad_norm=norms), log(other, "b", grad_norm=norms * (1 + 5e-6)))
    assert np.corrcoef(base, other)[0, 1] > 0.9999
    assert result.verdict == "same"
    assert result.numbers["difference"]["loss early"]["shape"] == "flat"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"learning_rate": np.full(200, 3e-4)}, r"learning rates differ \(step 1: 0.0002 and 0.0003\)"),
        ({"tokens": np.full(200, 90.0)}, r"tokens differ at 200 of 200 steps \(step 1: 100 and 90\)"),
        ({"meta": {"base_model": "other"}}, r"base models tiny and other"),
    ],
)
def test_unfair_comparisons_are_refused(logs: ModuleType, change: dict[str, Values], reason: str) -> None:
    """Oracle: the one thing that was changed is named with its numbers; `anyway` goes on and says so."""
    same = {"learning_rate": np.full(200, 2e-4), "tokens": np.full(200, 100.0), "meta": {"base_model": "tiny"}}
    a, b = log(logs.curve(), "a", **same), log(logs.curve() - drift(), "b", **(same | change))
    result = compare_logs(a, b)
    assert result.verdict == "incomparable"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(result.reasons["comparable"])
    forced = compare_logs(a, b, [log(logs.curve(), "again")], anyway=True)
    assert forced.verdict == "different"
    assert any("not fair" in note for note in forced.notes)


def test_other_lengths_and_shifted_batches_are_refused(logs: ModuleType) -> None:
    """Oracle: 150 losses against 200; the same batches two steps later; another data order."""
    base = logs.curve()
    assert "--until 150" in compare_logs(log(base), log(base[:150])).reasons["comparable"]
    level = base - (1.2 + 0.5 * np.exp(-np.arange(200) / 40)) + 1.5
    level[0] = level[2]
    shifted = np.roll(level, 2)
    shifted[0] = level[0]
    assert "2 steps later" in compare_logs(log(level), log(shifted, "b")).reasons["comparable"]
    order = logs.curve(9)
    order[0] = base[0] * 1.01
    assert "not the same batches" in compare_logs(log(base), log(order)).reasons["comparable"]


def test_gradient_norm_counts_only_if_it_is_the_same_quantity(logs: ModuleType) -> None:
    """Oracle: an arm that logs the preconditioned norm differs from the first step, which is no evidence."""
    base = logs.curve()
    a, again = log(base, "a", grad_norm=0.3 * base), log(base, "again", grad_norm=0.3 * base)
    other_quantity = log(base.copy(), "b", grad_norm=5 * base)
    assert compare_logs(a, other_quantity, [again]).verdict == "same"
    diverging = 0.3 * base * np.exp(drift(end=1.0))
    result = compare_logs(a, log(base.copy(), "b", grad_norm=diverging), [again])
    assert result.verdict == "different"
    assert "gradient norm" in result.reasons["training"]


def test_effect_that_starts_late_is_found(logs: ModuleType) -> None:
    """Oracle: a preconditioner that starts at step 120 leaves the early window alone."""
    base = logs.curve()
    late = base.copy()
    late[120:] -= 0.05
    result = compare_logs(log(base), log(late, "b"), [log(base, "again")])
    assert result.verdict == "different"
    assert result.numbers["difference"]["loss early"]["verdict"] == "same"
    assert result.numbers["difference"]["loss late"]["onset"] is not None


def test_decorrelation_describes_and_never_convicts(logs: ModuleType) -> None:
    """Oracle: perfectly correlated curves of different training; the report carries the caveat and the known pairs."""
    base = logs.curve()
    result = compare_logs(log(base, "a"), log(base - drift(), "b"), [log(base, "again")])
    assert result.numbers["correlation"]["raw"] > 0.99
    assert result.verdict == "different"
    assert CAVEAT in result.notes
    assert "never convicts" in compare_report.page([result])
    assert any(line.startswith("other order") for line in compare_report.null_lines())


def test_records(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: a bit-identical rerun on the CPU: floor of float32, hybrid_late the same, hybrid different."""
    base = logs.curve()
    arms = {"baseline": base, "rerun": base, "hybrid_late": base, "hybrid": base - drift()}
    records: dict[str, RunRecord] = {
        arm: logs.write_record(tmp_path / arm, logs.rows(loss), arm=arm) for arm, loss in arms.items()
    }
    verdicts = {
        arm: compare_records(records["baseline"], records[arm], [records["rerun"]])
        for arm in ("rerun", "hybrid_late", "hybrid")
    }
    assert {arm: c.verdict for arm, c in verdicts.items()} == {
        "rerun": "same",
        "hybrid_late": "same",
        "hybrid": "different",
    }
    assert "bit-identical" in verdicts["hybrid"].numbers["floor"]["loss early"]["source"]
    assert verdicts["hybrid"].summary.startswith("hybrid against baseline: different (")
    json.dumps(verdicts["hybrid"].to_dict(), allow_nan=False)


def test_corrupt_record_is_named(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: the damaged line."""
    record = logs.write_record(tmp_path / "a", logs.rows(logs.curve()))
    lines = (tmp_path / "a" / "steps.jsonl").read_text().splitlines()
    (tmp_path / "a" / "steps.jsonl").write_text("\n".join([*lines[:4], "{", *lines[5:]]) + "\n")
    with pytest.raises(GRITError, match=r"steps\.jsonl, line 5"):
        compare_records(record, RunRecord(tmp_path / "a"))


# -- several runs per arm


def arm(logs: ModuleType, seeds: range, effect: float, spread: float = 0.0, name: str = "x") -> list[RunLog]:
    """Runs of one arm: its effect on the loss varies by seed."""
    rng = np.random.default_rng(3)
    gaps = {seed: effect + spread * float(rng.normal()) for seed in seeds}
    return [log(logs.curve(seed) - drift(end=gap), f"{name}-{seed}", meta={"seed": seed}) for seed, gap in gaps.items()]


def test_arms_paired_by_seed_find_a_steady_effect(logs: ModuleType) -> None:
    """Oracle: -0.05 for each of 8 seeds, far below the spread between seeds' curves; pairing removes that."""
    (result,) = compare_arms({"lora": arm(logs, range(8), 0.0), "grit": arm(logs, range(8), 0.05, 0.005)[::-1]})
    assert result.verdicts["better"] == "grit"
    row = result.numbers["metrics"]["final loss"]
    assert row["difference"].estimate == pytest.approx(-0.05 * 0.95, abs=0.005)
    assert row["p_sign_flip"] == pytest.approx(2 / 2**8)
    assert row["p_holm"] == pytest.approx(2 * 2 / 2**8)
    assert row["probability_of_improvement"].estimate > 0.5


def test_too_few_seeds_decide_nothing_and_say_how_many_would(logs: ModuleType) -> None:
    """Oracle: 2 tests * 2 / 2**n < .05 needs n = 7."""
    assert (fewest_pairs(1), fewest_pairs(2)) == (6, 7)
    (result,) = compare_arms({"lora": arm(logs, range(5), 0.0), "grit": arm(logs, range(5), 0.05, 0.005)})
    assert result.verdicts["better"] == "inconclusive"
    assert "fewer than 7 seeds cannot reach 0.05" in result.reasons["better"]


def test_no_effect_is_inconclusive_with_the_number_of_seeds(logs: ModuleType) -> None:
    """Oracle: no effect, only spread."""
    (result,) = compare_arms({"lora": arm(logs, range(8), 0.0), "grit": arm(logs, range(8), 0.0, 0.05)})
    assert result.verdicts["better"] == "inconclusive"
    assert result.numbers["metrics"]["final loss"]["minimum_detectable_effect"] > 0.02
    assert "seeds" in result.reasons["better"]


def test_reruns_inside_the_reference_arm_are_its_floor(logs: ModuleType) -> None:
    """Oracle: every seed of the reference trained twice, bit-identically: now each pair decides."""
    (result,) = compare_arms({"lora": arm(logs, range(3), 0.0) * 2, "grit": arm(logs, range(3), 0.05)})
    assert result.verdicts["training"] == "different"
    assert result.numbers["metrics"]["final loss"]["difference"].n == 3


def test_arms_that_cannot_be_paired(logs: ModuleType) -> None:
    """Oracle: other seeds; unknown seeds and unequal counts; one arm; one incomparable pair."""
    with pytest.raises(GRITError, match="share no seed"):
        compare_arms({"a": arm(logs, range(2), 0.0), "b": arm(logs, range(5, 7), 0.0)})
    with pytest.raises(GRITError, match="seeds are unknown"):
        compare_arms({"a": [log(logs.curve())], "b": [log(logs.curve()), log(logs.curve(1))]})
    with pytest.raises(GRITError, match="two of them"):
        compare_arms({"a": [log(logs.curve())]})
    bad = arm(logs, range(3), 0.0)
    bad[1] = log(logs.curve(1) * 5, "bad", meta={"seed": 1})
    (result,) = compare_arms({"a": arm(logs, range(3), 0.0), "b": bad})
    assert result.verdict == "incomparable"
    assert "1 of 3 pairs are not comparable; seed 1" in result.reasons["comparable"]


# -- what people see


def test_reports_and_plots(logs: ModuleType, pair: tuple[Values, Values, Values]) -> None:
    """Oracle: SVG and HTML parse, names are escaped, three plots hold their data, and output is reproducible."""
    base, rerun, other = pair
    result = compare_logs(log(base, "lora"), log(other, "<grit> & co"), [log(rerun, "again")])
    plots = compare_report.plot_svgs(result)
    assert list(plots) == ["curves", "difference", "correlation"]
    for svg in plots.values():
        assert ET.fromstring(svg).tag.endswith("svg")
    assert plots == compare_report.plot_svgs(result)
    ET.fromstring(compare_report.figure_svg(result))
    page = compare_report.page([result])
    assert "<script" not in page
    assert "&lt;grit&gt; &amp; co" in page
    assert "<grit>" not in page
    assert "<tr><th>Same training, or different?</th><td><b>different</b></td>" in page


def test_refused_comparison_still_reports(logs: ModuleType) -> None:
    """Oracle: other lengths: no plots, and a page with the reason."""
    result = compare_logs(log(logs.curve(), "a"), log(logs.curve()[:100], "b"))
    assert "100" in compare_report.page([result])
    assert isinstance(result, CurveComparison)


def run(*arguments: str | Path) -> tuple[int, str]:
    """The click command as `grit` runs it: GRITError becomes exit status 2."""
    outcome = CliRunner().invoke(command, [str(a) for a in arguments])
    if isinstance(outcome.exception, GRITError):
        return 2, str(outcome.exception)
    return outcome.exit_code, outcome.output


def test_command(tmp_path: Path, logs: ModuleType, pair: tuple[Values, Values, Values]) -> None:
    """Oracle: exit status 0 answered, 1 refused, 2 unusable; JSON parses; files are written."""
    for name, loss in zip(("base", "rerun", "other"), pair, strict=True):
        logs.write_events(tmp_path / name, logs.rows(loss), tensors=True)
    logs.write_state(tmp_path / "five", logs.rows(5 * pair[0]), version=5)
    base, other, rerun = tmp_path / "base", tmp_path / "other", tmp_path / "rerun"
    status, text = run(base, other, "--rerun", rerun, "--html", tmp_path / "o.html", "--plot", tmp_path / "o.svg")
    assert status == 0
    assert "different" in text
    assert "<svg" in (tmp_path / "o.html").read_text()
    assert (tmp_path / "o.svg").read_text().startswith("<?xml")
    status, text = run(base, other, "--rerun", rerun, "--json")
    assert json.loads(text)["verdict"] == "different"
    assert run(base, tmp_path / "five")[0] == 1
    assert run(base)[0] == 2
    assert run(base, tmp_path / "none") == (2, f"{tmp_path / 'none'}: no such file or folder")
    assert run("--arm", "lora")[0] == 2
    assert run("--arm", f"a={base}", "--arm", f"b={tmp_path}/no*")[0] == 2
    status, text = run("--arm", f"a={base}", "--arm", f"b={other}", "--json")
    assert (status, json.loads(text)[0]["b"]) == (0, "b")


def test_help_teaches() -> None:
    """Oracle: what a newcomer must learn: which logs, a rerun, several seeds, the exit status."""
    status, text = run("--help")
    assert status == 0
    for word in ("TensorBoard", "trainer_state.json", "train", "seeds", "Exit status", "--rerun"):
        assert word in text


def test_answers_within_three_seconds_without_torch(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: processor time, the least of three (a busy machine is not the program's fault), and sys.modules of a
    fresh process."""
    for name, loss in (("a", logs.curve()), ("b", logs.curve() - drift())):
        logs.write_events(tmp_path / name, logs.rows(loss), tensors=False)
    code = (
        "import sys; from grit_impl.curves.commands import compare\n"
        "compare.main(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'tensorflow', 'matplotlib'} & set(sys.modules)"
    )
    spent = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], check=True, capture_output=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(spent) < 3
