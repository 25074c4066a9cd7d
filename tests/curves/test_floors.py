"""A floor that nobody measured may widen an answer, never veto it; and a copy measures nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import signal  # type: ignore[import-untyped]

from grit_impl.curves.commands import compare as command
from grit_impl.curves.compare import compare_logs
from grit_impl.curves.logs import RunLog, read_log
from grit_impl.curves.noise import BF16_FLOOR
from grit_impl.curves.report import page
from grit_impl.errors import GRITError

Values = np.typing.NDArray[np.float64]
STEPS = 200


def grit_compare(*arguments: str | Path) -> tuple[int, str]:
    """`grit compare`, with the exit status that `grit` gives it."""
    outcome = CliRunner().invoke(command, [str(a) for a in arguments])
    if isinstance(outcome.exception, GRITError):
        return 2, str(outcome.exception)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exc_info
    return outcome.exit_code, outcome.output


def unit(rng: np.random.Generator, kind: str) -> Values:
    """Noise of RMS 1 over the window that is compared first."""
    noise = {
        "white": lambda: rng.normal(size=STEPS),
        "autocorrelated": lambda: signal.lfilter([1.0], [1.0, -0.3], rng.normal(size=STEPS)),
        "heavy tails": lambda: rng.standard_t(3, size=STEPS),
        "growing": lambda: rng.normal(size=STEPS) * np.linspace(0.2, 1.8, STEPS),
    }[kind]()
    return np.asarray(noise / np.sqrt(np.mean(noise[1:21] ** 2)))


def two_runs(
    seed: int, *, loss: str, norms: str, times: float
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The seed experiment's baseline and hybrid: losses RMS 0.0006 apart where their spread is 0.106, gradient norms
    `times` an assumed floor apart; first norms 0.378703 and 0.378705; everything rounded as transformers 4 does."""
    rng = np.random.default_rng([29, seed])
    base = 1.15 + rng.normal(0, 0.106, STEPS)
    base[0] = 1.4976
    apart = 0.0006 * unit(rng, loss)
    apart[0] = 0.0
    norm = 0.378703 * np.exp(rng.normal(0, 0.2, STEPS))
    norm[0] = 0.378703
    factor = np.exp(times * BF16_FLOOR * unit(rng, norms))
    factor[0] = 0.378705 / 0.378703
    rows: list[list[dict[str, float]]] = []
    for losses, gradients in ((base, norm), (base + apart, norm * factor)):
        rows.append(
            [
                {
                    "epoch": round(i / 100, 2),
                    "grad_norm": float(np.float32(g)),
                    "learning_rate": 2e-4 * (1 - i / STEPS),
                    "loss": round(float(v), 4),
                    "step": i,
                }
                for i, (v, g) in enumerate(zip(losses, gradients, strict=True), 1)
            ]
        )
    return rows[0], rows[1]


def state(folder: Path, history: list[dict[str, Any]]) -> Path:
    """A trainer_state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": STEPS, "log_history": history}))
    return path


@pytest.mark.parametrize("times", [3.0, 5.0, 10.0])
@pytest.mark.parametrize(
    ("loss", "norms"),
    [("white", "white"), ("white", "growing"), ("autocorrelated", "heavy tails"), ("heavy tails", "autocorrelated")],
)
def test_seed_experiment_is_the_same_training(tmp_path: Path, loss: str, norms: str, times: float) -> None:
    """Oracle: the construction. That the gradient norm exceeds an assumed floor vetoes nothing, and is said."""
    for seed in range(3):
        a, b = two_runs(seed, loss=loss, norms=norms, times=times)
        x, y = state(tmp_path / f"a{seed}", a), state(tmp_path / f"b{seed}", b)
        status, text = grit_compare(x, y, "--json")
        found = json.loads(text)
        assert (status, found["verdict"]) == (0, "same"), found["reasons"]
        excess = [d["ratio"]["estimate"] for k, d in found["numbers"]["difference"].items() if k == "grad_norm early"]
        assert excess == [pytest.approx(times, rel=0.05)]
        reason = found["reasons"]["training"]
        for words in ("loss, steps 2-21", "times the noise floor", "assumed from bfloat16", "no rerun was given"):
            assert words in reason
        if excess[0] > 3:
            assert "gradient norm" in reason
            assert "decides nothing" in reason


def test_seed_experiment_third_run_is_not_comparable(tmp_path: Path) -> None:
    """Oracle: first losses 7.4957 and 1.4976, norms 160.6 and 0.379, before any update."""
    a, _ = two_runs(0, loss="white", norms="white", times=3)
    rng = np.random.default_rng(3)
    c = [
        {**row, "loss": round(7.4957 * np.exp(-i / 30) + 0.09 + float(rng.normal(0, 0.02)), 4), "grad_norm": 160.6}
        for i, row in enumerate(a)
    ]
    c[0]["loss"] = 7.4957
    status, text = grit_compare(state(tmp_path / "a", a), state(tmp_path / "c", c))
    assert status == 1
    assert "7.4957" in text
    assert "1.4976" in text


def make(loss: Values, name: str, norm: Values | None = None) -> RunLog:
    """A log in memory."""
    return RunLog(name, Path(name), "array", np.arange(1, loss.size + 1), loss, norm)


def test_a_measured_floor_of_the_gradient_norm_still_convicts(logs: ModuleType) -> None:
    """Oracle: the rerun repeats to the bit, so gradient norms that drift by 20% are another training."""
    base = logs.curve()
    norm = np.full(STEPS, 0.4)
    drifting = norm * np.exp(np.linspace(0, 0.2, STEPS))
    pair = make(base, "a", norm), make(base + 1e-6, "b", drifting)
    assert compare_logs(*pair, [make(base, "again", norm)]).verdict == "different"
    assert compare_logs(*pair).verdict != "different"
    # A rerun that logs no gradient norm measures the loss alone.
    assert compare_logs(*pair, [make(base, "again")]).verdict == "same"


@pytest.mark.parametrize("equal", [40, 50, 60, 100, 150])
@pytest.mark.parametrize("reruns", [0, 1])
def test_equal_then_different(tmp_path: Path, logs: ModuleType, equal: int, reruns: int) -> None:
    """Oracle: the first quarter is equal to the bit, so the growth is infinite; every page has an answer."""
    base = logs.curve()
    other = base.copy()
    other[equal:] += 0.05
    result = compare_logs(make(base, "a"), make(other, "b"), [make(base, "again")] * reruns)
    assert result.verdict == ("different" if reruns else "inconclusive")
    assert result.reasons["training"].startswith("loss, steps 181-200: ")
    assert ("infinity: growing" in page([result])) == (equal >= 50)
    json.dumps(result.to_dict(), allow_nan=False)
    x, y = (logs.write_csv(tmp_path / f"{name}.csv", logs.rows(loss)) for name, loss in (("a", base), ("b", other)))
    status, _ = grit_compare(x, y, "--html", tmp_path / "o.html")
    assert status == 0


@pytest.fixture
def runs(tmp_path: Path, logs: ModuleType) -> tuple[Path, Path]:
    """Two different runs."""
    base = logs.curve()
    other = base + np.linspace(0, 0.1, STEPS)
    return (
        logs.write_csv(tmp_path / "a.csv", logs.rows(base)),
        logs.write_csv(tmp_path / "b.csv", logs.rows(other)),
    )


def test_copies_are_no_reruns(tmp_path: Path, logs: ModuleType, runs: tuple[Path, Path]) -> None:
    """Oracle: the same file, its copy, its values in other formats; of A, B or another rerun; also as reference."""
    a, b = runs
    shutil.copy(a, tmp_path / "copy.csv")
    rows = logs.rows(logs.curve())
    other = logs.rows(logs.curve() + np.linspace(0, 0.1, STEPS))
    copies = [
        a,
        tmp_path / "copy.csv",
        logs.write_jsonl(tmp_path / "a.jsonl", rows),
        logs.write_events(tmp_path / "events", rows, tensors=False).parent,
        logs.write_state(tmp_path / "state", rows, version=5).parent,
        logs.write_jsonl(tmp_path / "b.jsonl", other),
    ]
    for option in ("--rerun", "--reference"):
        for copy in copies:
            status, text = grit_compare(a, b, option, copy)
            assert status == 2, copy
            assert "a copy measures no noise" in text
            assert "\n" not in text
    again = logs.write_csv(tmp_path / "again.csv", logs.rows(logs.curve() + 1e-3))
    assert grit_compare(a, b, "--rerun", again)[0] == 0
    assert grit_compare(a, b, "--rerun", again, "--rerun", again)[0] == 2
    assert grit_compare("--arm", f"x={a},{tmp_path / 'copy.csv'}", "--arm", f"y={b}")[0] == 2


def test_a_rerun_that_repeats_to_the_bit_is_believed_by_its_clock(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: two trainings at other times with equal losses; a copied folder has the same times."""
    rows = logs.rows(logs.curve())
    other = logs.rows(logs.curve() + np.linspace(0, 0.1, STEPS))
    for name, log, seconds in (("a", rows, 0.5), ("again", rows, 0.6), ("b", other, 0.5)):
        logs.write_record(tmp_path / name, [{**row, "seconds": seconds + row["step"] / 1e4} for row in log], arm=name)
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    status, text = grit_compare(tmp_path / "a", tmp_path / "b", "--rerun", tmp_path / "again", "--json")
    assert (status, json.loads(text)["verdict"]) == (0, "different")
    assert "bit-identical" in text
    assert grit_compare(tmp_path / "a", tmp_path / "b", "--rerun", tmp_path / "copied")[0] == 2


def test_remedies_of_other_lengths_work(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: the suggested `--until` is run; where none would help, none is suggested."""
    rows = logs.rows(logs.curve())
    full = logs.write_csv(tmp_path / "full.csv", rows)
    short = logs.write_csv(tmp_path / "short.csv", rows[:150])
    status, text = grit_compare(full, short, "--json")
    assert (status, "`--until 150`" in text) == (1, True)
    assert grit_compare(full, short, "--until", "150")[0] == 0
    tenth = logs.write_csv(tmp_path / "tenth.csv", rows[9::10])
    status, text = grit_compare(full, tenth, "--json")
    assert (status, "--until" in text) == (1, False)
    late = logs.write_csv(tmp_path / "late.csv", rows[100:])
    status, text = grit_compare(logs.write_csv(tmp_path / "early.csv", rows[:100]), late, "--json")
    assert status == 1
    assert "begin at steps 1 and 101" in text


def test_an_unknown_base_model_is_no_other_model(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: a run record names its base, the CSV of the same run does not."""
    rows = logs.rows(logs.curve())
    record = logs.write_record(tmp_path / "record", rows)
    assert compare_logs(read_log(record.path), read_log(logs.write_csv(tmp_path / "x.csv", rows))).verdict == "same"
