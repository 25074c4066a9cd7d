"""Logs as the tools write them: the numbers that were put in come out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from tool_logs import (
    LOSS,
    NORM,
    RATE,
    STRIDES,
    WITH_NORM,
    WITHOUT,
    axolotl,
    jsonl,
    lightning,
    lightning_by_pandas,
    llama_factory,
    mlflow,
    table,
    wandb_export,
    wandb_history,
)

from grit_impl.curves.commands import compare as command
from grit_impl.curves.logs import RunLog, read_log
from grit_impl.errors import GRITError


@pytest.mark.parametrize("write", WITH_NORM + WITHOUT, ids=lambda w: w.__name__)
def test_tool(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """Oracle: the numbers that the tool was given, at the steps that it was given."""
    log = read_log(write(tmp_path))
    np.testing.assert_array_equal(log.loss, LOSS)
    assert (int(log.steps[0]), log.stride) == STRIDES.get(write, (10, 10))
    assert (log.grad_norm is not None) == (write in WITH_NORM)
    if log.grad_norm is not None:
        np.testing.assert_array_equal(log.grad_norm, NORM)
    if write in (llama_factory, axolotl, lightning, lightning_by_pandas, wandb_history, mlflow):
        np.testing.assert_allclose(log.learning_rate, RATE, rtol=1e-12)
    assert log.seed == (7 if write is mlflow else None)
    assert not any("counted" in note for note in log.notes)


TAGS = [
    "loss/train",
    "train_loss",
    "Loss/train",
    "train/loss",
    "training_loss",
    "loss",
    "Train/Loss",
    "train_loss_step",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tensorboard_tags(tmp_path: Path, logs: ModuleType, tag: str) -> None:
    """Oracle: the loss under each usual tag, beside a validation's, an epoch's and the Trainer's mean over the run."""
    rows = [{"step": i, "loss": v} for i, v in enumerate(LOSS, 1)]
    path = logs.write_events(tmp_path, rows, tensors=tag < "m", tags={"loss": tag})
    others = [{"step": 40, name: 9.0} for name in ("val_loss", "loss/val", "eval/loss", "train/train_loss", "epoch")]
    others += [{"step": 10 * i, "train_loss_epoch": 1.0} for i in range(1, 5)]
    tags = {name: name for row in others for name in row if name != "step"}
    for row in others:
        logs.write_events(tmp_path / "other", [row], tensors=False, tags=tags, name=f"events.out.tfevents.{len(tags)}")
        path.write_bytes(path.read_bytes() + next((tmp_path / "other").iterdir()).read_bytes())
    shutil.rmtree(tmp_path / "other")
    log = read_log(tmp_path)
    np.testing.assert_allclose(log.loss, LOSS, rtol=1e-7)
    assert log.steps.tolist() == list(range(1, 41))


def test_an_unusual_tag_is_named_by_the_user(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: the message lists what is there; the remedy that it names reads the loss."""
    logs.write_events(
        tmp_path, [{"step": i, "x": v} for i, v in enumerate(LOSS, 1)], tensors=True, tags={"x": "my/nll"}
    )
    with pytest.raises(GRITError, match=r"no loss column; found step, my/nll; name it with `--loss NAME`"):
        read_log(tmp_path)
    np.testing.assert_allclose(read_log(tmp_path, loss="my/nll").loss, LOSS, rtol=1e-7)
    with pytest.raises(GRITError, match="no columns or tags named 'other'; found step, my/nll"):
        read_log(tmp_path, loss="other")


def compare(*arguments: str | Path) -> tuple[int, str]:
    """`grit compare`, with the exit status that `grit` gives it."""
    outcome = CliRunner().invoke(command, [str(a) for a in arguments])
    if isinstance(outcome.exception, GRITError):
        return 2, str(outcome.exception)
    return outcome.exit_code, outcome.output


@pytest.mark.parametrize(
    "runs", [("lora", "grit"), ("a, b", 'the "best" - run'), ("Group: lora", "Group: grit", "third")]
)
def test_runs_of_an_export_are_asked_for(tmp_path: Path, runs: tuple[str, ...]) -> None:
    """Oracle: each run's own losses (the second is one higher and 10 shorter); unnamed, the runs are listed."""
    path = wandb_export(tmp_path, runs)
    for at, run in enumerate(runs):
        log = read_log(f"{path}::{run}")
        np.testing.assert_allclose(log.loss, np.array(LOSS[: 40 - 10 * at]) + at, atol=1e-9)
        assert (log.name, log.steps[-1]) == (run, 10 * (40 - 10 * at))
    status, text = compare(path, path)
    assert status == 2
    assert f"holds {len(runs)} runs ({', '.join(runs)})" in text
    remedy = text.split("e.g. '")[1].split("'")[0] if "'" not in runs[0] else ""
    assert read_log(remedy).name == runs[0]
    assert compare(path) == (status, text)
    assert compare(f"{path}::none", path)[1] == f"{path}: no run named 'none'; its runs are {', '.join(runs)}"
    status, text = compare(f"{path}::{runs[0]}", f"{path}::{runs[1]}", "--json")
    assert status == 1
    assert "`--until 300`" in text
    assert compare(f"{path}::{runs[0]}", f"{path}::{runs[1]}", "--until", 300, "--anyway")[0] == 0


def test_interleaved_and_shifted_runs(tmp_path: Path) -> None:
    """Oracle: two runs whose steps do not meet, so that each row belongs to one of them."""
    rows = [[i, LOSS[i // 2] if i % 2 == 0 else "", LOSS[i // 2] + 1 if i % 2 else ""] for i in range(80)]
    path = table(tmp_path / "export.csv", ["Step", "x - train/loss", "y - train/loss"], rows)
    x, y = (read_log(f"{path}::{run}") for run in "xy")
    np.testing.assert_allclose(y.loss - x.loss, 1)
    assert (x.steps[0], y.steps[0], x.stride) == (0, 1, 2)


def test_a_column_that_names_the_run(tmp_path: Path) -> None:
    """Oracle: a data frame of two runs, one below the other."""
    rows = [[run, i, v + at] for at, run in enumerate(("x", "y")) for i, v in enumerate(LOSS, 1)]
    path = table(tmp_path / "frame.csv", ["run", "step", "loss"], rows)
    with pytest.raises(GRITError, match=r"holds 2 runs \(x, y\)"):
        read_log(path)
    np.testing.assert_allclose(read_log(f"{path}::y").loss, np.array(LOSS) + 1)


def test_rows_that_stand_for_several_steps_are_announced(tmp_path: Path) -> None:
    """Oracle: wandb's extremes differ where it thinned the points."""
    path = wandb_export(tmp_path)
    text = path.read_text()
    assert not read_log(path).notes
    path.write_text(text.replace(f'"{LOSS[3]}","{LOSS[3]}","{LOSS[3]}"', f'"{LOSS[3]}","0.1","{LOSS[3]}"'))
    assert any("stand for several steps" in note for note in read_log(path).notes)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_missing_step_column_is_announced(tmp_path: Path, kind: str) -> None:
    """Oracle: losses alone are counted, and the page says so, also where the answer is no."""
    if kind == "csv":
        path = table(tmp_path / "x.csv", ["epoch", "loss"], [[i / 20, v] for i, v in enumerate(LOSS)])
    else:
        path = jsonl(tmp_path / "x.jsonl", [{"epoch": i / 20, "loss": v} for i, v in enumerate(LOSS)])
    log = read_log(path)
    assert log.steps.tolist() == list(range(1, 41))
    with_steps = table(tmp_path / "y.csv", ["step", "loss"], [[10 * i, v] for i, v in enumerate(LOSS, 1)])
    status, text = compare(path, with_steps)
    assert status == 1
    for words in ("no step column", "losses were counted"):
        assert words in " ".join(text.split())


def logged(steps: list[float], path: Path) -> Path:
    """Losses at given steps."""
    return jsonl(path, [{"step": s, "loss": LOSS[i % 40]} for i, s in enumerate(steps)])


@pytest.mark.parametrize(
    ("steps", "until"),
    [
        ([*range(1, 10), *range(19, 200, 10)], None),
        ([1, 2, *range(10, 300, 10)], None),
        ([*range(1, 31), *range(35, 60)], 30),
        ([*range(10, 210, 10), *range(260, 400, 10)], 200),
        ([*range(1, 6), *range(7, 40)], None),
        ([*range(1, 31), *range(21, 60)], 20),
        ([*range(1, 31), *range(5, 60)], None),
    ],
)
def test_remedies_work_or_are_not_named(tmp_path: Path, steps: list[float], until: int | None) -> None:
    """Oracle: the suggestion is tried: it must leave a log to compare, and a single point is none."""
    path = logged(steps, tmp_path / "x.jsonl")
    with pytest.raises(GRITError) as caught:
        read_log(path)
    assert (f"`--until {until}`" in str(caught.value)) == (until is not None)
    assert ("--until" in str(caught.value)) == (until is not None)
    if until is not None:
        assert compare(path, path, "--until", until)[0] == 0


@pytest.mark.parametrize("hole", ["", "NaN", "nan"])
def test_a_diverged_run_is_no_row_with_a_hole(tmp_path: Path, hole: str) -> None:
    """Oracle: a loss that is NaN, or empty where pandas saved it, from step 31 on, beside what every step logs."""
    rows = [[i, v if i <= 30 else hole, r, n] for i, (v, r, n) in enumerate(zip(LOSS, RATE, NORM, strict=True), 1)]
    path = table(tmp_path / "x.csv", ["step", "loss", "lr", "grad_norm"], rows)
    with pytest.raises(GRITError, match=r"diverged.*`--until 30`"):
        read_log(path)
    assert read_log(path, until=30).loss.size == 30
    alone = table(tmp_path / "y.csv", ["step", "loss"], [row[:2] for row in rows])
    with pytest.raises(GRITError, match=r"the loss is nan at step 31.*`--until 30`"):
        read_log(alone)


ODD = {
    "byte order mark": ("step,loss\n", "\ufeff", ","),
    "semicolons": ("step;loss\n", "", ";"),
    "tabs": ("step\tloss\n", "", "\t"),
    "spaces": ("step, loss\n", "", ", "),
    "carriage returns": ("step,loss\r\n", "", ","),
}


@pytest.mark.parametrize("kind", list(ODD))
def test_dialects(tmp_path: Path, kind: str) -> None:
    """Oracle: the same table in every dialect; semicolons are said."""
    header, mark, separator = ODD[kind]
    end = header[len(header.rstrip()) :]
    body = end.join(f"{i}{separator}{v}" for i, v in enumerate(LOSS, 1))
    path = tmp_path / "x.csv"
    path.write_bytes((mark + header + body + end).encode())
    log = read_log(path)
    np.testing.assert_array_equal(log.loss, LOSS)
    assert any("semicolons" in note for note in log.notes) == (kind == "semicolons")


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\u2029b\x0bc", "x" * 140_000])
def test_strings_split_no_rows(tmp_path: Path, text: str) -> None:
    """Oracle: line separators in a string, and a field beyond the csv module's usual limit, in each kind of table."""
    rows = [{"step": i, "loss": v, "note": text if i == 7 else ""} for i, v in enumerate(LOSS, 1)]
    for path in (
        tmp_path / "x.jsonl",
        table(tmp_path / "x.csv", ["step", "loss", "note"], [list(row.values()) for row in rows]),
        tmp_path / "x.json",
    ):
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8-sig")
        elif path.suffix == ".json":
            path.write_text(json.dumps({"log_history": rows}, ensure_ascii=False), encoding="utf-8-sig")
        np.testing.assert_array_equal(read_log(path).loss, LOSS)


ARABIC = "\u0661"
BAD = {
    "decimal commas": "step;loss\n" + "".join(f"{i};1,{i}\n" for i in range(10, 30)),
    "a short row": "step,loss\n" + "".join(f"{i},1.5\n" for i in range(1, 12)) + "12\n",
    "a long row": "step,loss\n" + "".join(f"{i},1.5\n" for i in range(1, 12)) + "12,1,5\n",
    "an open quote": 'step,loss\n1,"1.5\n' + "".join(f"{i},1.5\n" for i in range(2, 12)),
    "a word": "step,loss\n" + "".join(f"{i},{'1.5' if i != 5 else 'high'}\n" for i in range(1, 12)),
    "an underscore": "step,loss\n" + "".join(f"{i},{'1.5' if i != 5 else '1_0'}\n" for i in range(1, 12)),
    "other digits": "step,loss\n" + "".join(f"{i},{ARABIC if i == 5 else '1.5'}\n" for i in range(1, 12)),
    "half steps": "step,loss\n" + "".join(f"{i / 2},1.5\n" for i in range(1, 12)),
    "two losses": "step,loss,loss\n" + "".join(f"{i},1.5,1.6\n" for i in range(1, 12)),
    "no step number": "step,loss\n" + "".join(f"{i if i != 4 else ''},1.5\n" for i in range(1, 12)),
    "nothing": "",
    "a header": "step,loss\n",
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_tables_get_one_line(tmp_path: Path, kind: str) -> None:
    """Oracle: exit status 2 and one line that names the file."""
    path = tmp_path / "x.csv"
    path.write_text(BAD[kind])
    status, text = compare(path, path)
    assert (status, text.count("\n"), str(path) in text) == (2, 0, True)


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, "1" * 5000, '{"step": 5, "loss": ' + "9" * 400 + "}", '{"step": 5, "loss": true}', '"text"', "[1]",
     '{"step": 5, "loss": [1]}', '{"step": 5, "loss": {"value": 1}}', '{"step": "five", "loss": 1}',
     '{"step": 5, "loss": 1e999}'],
)  # fmt: skip
def test_bad_json_lines_get_one_line(tmp_path: Path, line: str) -> None:
    """Oracle: exit status 2 and one line that names the file."""
    path = jsonl(tmp_path / "x.jsonl", [{"step": i, "loss": 1.5} for i in range(1, 5)])
    path.write_text(path.read_text() + line + "\n" + "".join(f'{{"step": {i}, "loss": 1.5}}\n' for i in range(6, 20)))
    status, text = compare(path, path)
    assert (status, text.count("\n"), str(path) in text) == (2, 0, True)


def test_logs_that_only_look_like_one(tmp_path: Path) -> None:
    """Oracle: several tables, runs of Lightning and of MLflow, wandb's own file: the remedy names one that is there."""
    lightning(tmp_path / "l")
    shutil.copytree(tmp_path / "l" / "lightning_logs" / "version_0", tmp_path / "l" / "lightning_logs" / "version_1")
    mlflow(tmp_path / "m")
    shutil.copytree(tmp_path / "m" / "mlruns" / "0" / "3f1c", tmp_path / "m" / "mlruns" / "0" / "9a")
    for name in ("x", "y"):
        table(tmp_path / "t" / f"{name}.csv", ["step", "loss"], [[i, v] for i, v in enumerate(LOSS, 1)])
    for folder, what in (("l", "2 runs of Lightning"), ("m", "2 runs of MLflow"), ("t", "2 tables")):
        with pytest.raises(GRITError, match=what) as caught:
            read_log(tmp_path / folder)
        found: RunLog = read_log(str(caught.value).split("e.g. ")[1])
        np.testing.assert_array_equal(found.loss, LOSS)
    (tmp_path / "run.wandb").write_bytes(b":W&B")
    with pytest.raises(GRITError, match="export the run's loss chart as CSV"):
        read_log(tmp_path / "run.wandb")


def test_json_lines_under_another_name(tmp_path: Path) -> None:
    """Oracle: the losses; the same reader reads such rows for training."""
    rows = [{"step": i, "loss": v} for i, v in enumerate(LOSS, 1)]
    np.testing.assert_array_equal(read_log(jsonl(tmp_path / "x.jsonl", rows).rename(tmp_path / "x.json")).loss, LOSS)


@pytest.mark.parametrize("header", ["Step,x - train/loss", "_step,_runtime,train/loss"])
def test_wandbs_own_steps_have_gaps(tmp_path: Path, header: str) -> None:
    """Oracle: an evaluation after every seventh entry takes a number of wandb's own; other logs get no such advice."""
    steps = [i + i // 7 for i in range(40)]
    columns = header.split(",")
    rows = [[step, *[i] * (len(columns) - 2), v] for i, (step, v) in enumerate(zip(steps, LOSS, strict=True))]
    with pytest.raises(GRITError, match=r"missing steps: 6 is followed by 8.*with train/global_step as its x axis"):
        read_log(table(tmp_path / "export.csv", columns, rows))
    with pytest.raises(GRITError, match="missing steps") as caught:
        read_log(table(tmp_path / "own.csv", ["step", "loss"], [[row[0], row[-1]] for row in rows]))
    assert "global_step" not in str(caught.value)
