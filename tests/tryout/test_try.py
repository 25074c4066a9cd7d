"""`grit try` from end to end on the embedded base: answered, interrupted and resumed, refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import grit_impl
from grit_impl.errors import GRITError
from grit_impl.sweep.store import Store
from grit_impl.tryout import session
from grit_impl.tryout.commands import try_
from grit_impl.tryout.options import Trying, training_of
from grit_impl.tryout.page import markdown
from grit_impl.tryout.plan import Size, make_plan

SMALL = ("--steps", "12", "--trials", "2", "--seeds", "3", "--rank", "4", "--batch-size", "4")


def rows(path: Path, n: int = 220) -> Path:
    """Questions with one of two answers."""
    source = random.Random(0)
    with path.open("w") as file:
        for _ in range(n):
            a, b = source.sample(range(100), 2)
            file.write(json.dumps({"prompt": f"{a} or {b}? ", "completion": "first" if a > b else "second"}) + "\n")
    return path


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """`grit try` on `rows.jsonl` of a folder, and how to run it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(grit_impl.__file__).parents[1])}
    called = [sys.executable, "-m", "grit_impl.cli", "try", "--dataset", "rows.jsonl", "--out", "out", *arguments]
    return called, {"cwd": folder, "env": environment, "text": True}


def grit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    called, how = command(folder, *arguments)
    return subprocess.run(called, capture_output=True, timeout=300, **how)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the question was asked, interrupted in its tuning, and asked again; and what was printed."""
    folder = tmp_path_factory.mktemp("try")
    rows(folder / "rows.jsonl")
    called, how = command(folder, *SMALL, "--jobs", "2", "--metric", "exact")
    first = subprocess.Popen(called, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    began = time.monotonic()
    while not (folder / "out" / "runs.db").is_file() and time.monotonic() - began < 120:
        time.sleep(0.1)
    time.sleep(1.5)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert (first.returncode, said.rstrip().splitlines()[-1]) == (130, "interrupted: the same command continues")
    assert not (folder / "out" / "answer.json").is_file()
    done = grit(folder, *SMALL, "--jobs", "2", "--metric", "exact")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


@pytest.mark.slow
def test_the_page_answers(answered: tuple[Path, str]) -> None:
    """What mattered, what helped, what it cost and what to type next; and the same numbers as JSON and as a file."""
    folder, printed = answered
    result = json.loads((folder / "out" / "answer.json").read_text())
    page = (folder / "out" / "answer.md").read_text()
    assert page in printed
    for part in (
        "Did it matter?** Yes: in 12 of 12 steps",
        "Did it help?",
        "ms per step",
        "alpha 0.05",
        "which all seeds share",
    ):
        assert part in page, part
    assert "pairs: 6 in " in printed  # no tuning, and no base, is counted as a pair
    # 12 steps of four batches of four are more than all training rows, 8 are not.
    assert "A first look" not in page
    shorter = markdown({**result, "size": {**result["size"], "steps": 8}})
    assert f"A first look, no answer: each run read 128 of the {result['rows']['train']} training rows." in shorter
    assert result["answer"]["outcome"] in ("yes", "no", "inconclusive")
    assert result["ledger"]["cause"] == "effective"
    assert {arm: len(each["rates"]) for arm, each in result["tuned"].items()} == dict.fromkeys(result["tuned"], 2)
    assert [pair["seed"] for pair in result["pairs"]] == [3408, 3409, 3410]
    assert sum(result["rows"].values()) == 220
    assert all(0 <= pair["recommended"]["accuracy"] <= 100 for pair in result["pairs"])


@pytest.mark.slow
def test_pairs_begin_equal_and_the_base_was_measured(answered: tuple[Path, str]) -> None:
    """The base alone has the higher loss; both arms left an adapter of the first seed."""
    folder, _ = answered
    result = json.loads((folder / "out" / "answer.json").read_text())
    assert all(pair[arm]["loss"] < result["base"]["loss"] for pair in result["pairs"] for arm in ("recommended",))
    for arm in ("recommended", result["reference"]):
        assert (folder / "out" / f"adapter-{arm}" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_asked_again_it_trains_nothing(answered: tuple[Path, str]) -> None:
    """Oracle: the database of the runs is not touched, and the page is the same."""
    folder, _ = answered
    before = (folder / "out" / "runs.db").stat().st_mtime_ns
    again = grit(folder, *SMALL, "--metric", "exact")
    assert (folder / "out" / "answer.md").read_text() in again.stdout
    assert (again.returncode, (folder / "out" / "runs.db").stat().st_mtime_ns) == (0, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--steps", "5"), "--max-steps 12 there, 5 now"),
        (("--metric", "loss"), "--metric exact there, loss now"),
        (("--rank", "8"), "--lora-r 4 there, 8 now"),
    ],
)
def test_a_changed_option_is_refused_by_name(answered: tuple[Path, str], changed: tuple[str, ...], named: str) -> None:
    """What is in the folder stays as it is."""
    folder, _ = answered
    done = grit(folder, *SMALL, "--metric", "exact", *changed)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_other_rows_are_another_question(answered: tuple[Path, str]) -> None:
    """A data file that was changed under its name is named, too."""
    folder, _ = answered
    before = (folder / "rows.jsonl").read_text()
    try:
        rows(folder / "rows.jsonl", 300)
        done = grit(folder, *SMALL, "--metric", "exact")
    finally:
        (folder / "rows.jsonl").write_text(before)
    assert (done.returncode, "other content of rows.jsonl" in done.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "numeric"), "is not a number"),
        (("--minutes", "0.01", "--steps", "100000"), "--minutes 0.01 is too short"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_it_is_trained(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """One line, exit status 2, and no run but the few steps on the clock."""
    rows(tmp_path / "rows.jsonl")
    done = grit(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "runs.db").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "regex", "--pattern", "("), "--pattern takes a regular expression, not '\\('"),
        (("--smallest-effect", "100"), "--smallest-effect takes a number above 0 and below 100"),
    ],
)
def test_an_option_that_no_run_could_be_judged_by_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Before base and rows are read."""
    with pytest.raises(GRITError, match=message):
        CliRunner().invoke(
            try_, ["--dataset", "none.jsonl", "--out", str(tmp_path), *arguments], catch_exceptions=False
        )


def test_a_folder_without_runs_may_be_asked_something_else(tmp_path: Path) -> None:
    """What was measured for the refused question goes; with one run in it, the folder is that question's."""
    data, out = rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    training = training_of("tiny", cuda=False, given={})
    short, long = (session.Asked("tiny", str(data), Trying(minutes=n), training, "cpu") for n in (0.01, 30))
    plan = make_plan("tiny", "rows", short.common(), Size(2, 1, 3), centre=1e-3, spacing=2.0, seed=0)
    session.claim_folder(out, short)
    for name in (session.SIZE, session.PROBE):
        (out / name).write_text("")
    with Store(out / session.RESULTS) as store:
        assert store.runs() == []
    session.claim_folder(out, long)
    assert not (out / session.SIZE).exists()
    assert not (out / session.PROBE).exists()
    with Store(out / session.RESULTS) as store:
        store.add(next(iter(plan.jobs())), {}, {"status": "done"}, "cpu")
    session.claim_folder(out, long)
    with pytest.raises(GRITError, match=r"--minutes 30 there, 0\.01 now"):
        session.claim_folder(out, short)
