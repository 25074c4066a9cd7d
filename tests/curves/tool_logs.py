"""Logs as the tools write them, built in each tool's own format."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
RNG = np.random.default_rng(8)
LOSS = [round(float(v), 4) for v in 1.5 - np.arange(40) / 100 + RNG.normal(0, 0.1, 40)]
NORM = [round(float(v), 5) for v in RNG.uniform(0.2, 0.6, 40)]
RATE = [2e-4 * (1 - i / 40) for i in range(40)]


def jsonl(path: Path, rows: list[Row]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, header: list[str], rows: list[list[Any]], *, quoted: bool = False) -> Path:
    """A CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def llama_factory(folder: Path) -> Path:
    """trainer_log.jsonl every 10 steps, rows of an evaluation, and a last row without a loss."""
    rows: list[Row] = []
    for i, (loss, rate) in enumerate(zip(LOSS, RATE, strict=True), 1):
        about = {"current_steps": 10 * i, "total_steps": 400, "epoch": i / 20, "percentage": i / 4}
        times = {"elapsed_time": "0:02:03", "remaining_time": "0:36:15", "throughput": 13061.0, "total_tokens": 999}
        rows.append({**about, "loss": loss, "lr": rate, **times})
        if i % 10 == 0:
            rows.append({**about, "eval_loss": 1.0, **times})
    rows.append({"current_steps": 400, "total_steps": 400, "epoch": 2.0, "percentage": 100.0, **times})
    jsonl(folder / "trainer_log.jsonl", rows)
    (folder / "all_results.json").write_text("{}")
    state = folder / "checkpoint-200" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"log_history": [{"step": 10 * i, "loss": 9.0} for i in range(1, 21)]}))
    return folder


def axolotl(folder: Path) -> Path:
    """A Trainer's state with axolotl's own metrics and an evaluation before the first step."""
    history: list[Row] = [{"epoch": 0, "step": 0, "eval_loss": 2.2, "memory/max_active (GiB)": 13.14}]
    for i, (loss, norm, rate) in enumerate(zip(LOSS, NORM, RATE, strict=True), 1):
        extras = {
            "ppl": 3.2,
            "memory/max_active (GiB)": 32.3,
            "tokens/train_per_sec_per_gpu": 3.1,
            "tokens/total": 900 * i,
        }
        history.append(
            {
                "epoch": i / 20,
                "grad_norm": norm,
                "learning_rate": rate,
                "loss": loss,
                "loss=code": 9.9,
                "step": i,
                **extras,
            }
        )
    history.append({"epoch": 2.0, "step": 40, "train_loss": 1.3, "train_runtime": 60.0, "total_flos": 1e15})
    path = folder / "checkpoint-40" / "trainer_state.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"global_step": 40, "log_history": history}))
    return folder


def lightning(folder: Path) -> Path:
    """metrics.csv: rows of a step, a learning rate, a validation and an epoch, each with holes for the rest."""
    header = ["epoch", "lr-AdamW", "step", "train_loss_epoch", "train_loss_step", "val_loss"]
    rows: list[list[Any]] = []
    for i, (loss, rate) in enumerate(zip(LOSS, RATE, strict=True), 1):
        rows += [["", rate, 50 * i - 1, "", "", ""], [i // 10, "", 50 * i - 1, "", loss, ""]]
        if i % 10 == 0:
            rows += [[i // 10, "", 50 * i + 7, "", "", 1.1], [i // 10, "", 50 * i + 7, 1.2, "", ""]]
    return table(folder / "lightning_logs" / "version_0" / "metrics.csv", header, rows).parents[2]


def lightning_by_pandas(folder: Path) -> Path:
    """The same, saved again by pandas with NaN for the holes."""
    import pandas

    lightning(folder / "original")
    frame = pandas.read_csv(folder / "original" / "lightning_logs" / "version_0" / "metrics.csv")
    frame.to_csv(folder / "saved.csv", na_rep="NaN", index=False)
    return folder / "saved.csv"


def wandb_history(folder: Path) -> Path:
    """A run's history as a data frame: rows of an evaluation between, the mean over the run at the end."""
    names = [
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/global_step",
        "eval/loss",
        "train/train_loss",
    ]
    header = ["", "_step", "_runtime", "_timestamp", *names]
    rows: list[list[Any]] = []
    for i, (loss, norm, rate) in enumerate(zip(LOSS, NORM, RATE, strict=True), 1):
        rows.append([len(rows), len(rows), i, 1.7e9 + i, loss, norm, rate, 10 * i, "", ""])
        if i % 7 == 0:
            rows.append([len(rows), len(rows), i, 1.7e9 + i, "", "", "", 10 * i, 1.1, ""])
    rows.append([len(rows), len(rows), 41, 1.7e9 + 41, "", "", "", 400, "", 1.3])
    return table(folder / "history.csv", header, rows)


def wandb_scan(folder: Path) -> Path:
    """The same as JSON lines, with null for holes."""
    import pandas

    wandb_history(folder)
    pandas.read_csv(folder / "history.csv").to_json(folder / "history.jsonl", orient="records", lines=True)
    return folder / "history.jsonl"


def wandb_export(folder: Path, runs: tuple[str, ...] = ("crisp-sun-7",), axis: str = "train/global_step") -> Path:
    """The CSV of a chart: per run a column with its extremes, and the log's own step where the axis is another."""
    header, rows = [axis], [[10 * i] for i in range(1, 41)]
    for at, run in enumerate(runs):
        for metric in ("_step", "train/loss"):
            header += [f"{run} - {metric}", f"{run} - {metric}__MIN", f"{run} - {metric}__MAX"]
            for i, row in enumerate(rows):
                value: Any = i if metric == "_step" else round(LOSS[i] + at, 4)
                row += [value] * 3 if i < 40 - 10 * at else [""] * 3
    return table(folder / "wandb_export_2026-01-01T00_00_00.000+01_00.csv", header, rows, quoted=True)


def mlflow(folder: Path) -> Path:
    """A run folder of MLflow's file store: `timestamp value step` per line, a file per metric."""
    run = folder / "mlruns" / "0" / "3f1c"
    series = {"loss": LOSS, "grad_norm": NORM, "learning_rate": RATE, "eval_loss": LOSS[:4], "train_loss": [1.3]}
    for name, values in series.items():
        (run / "metrics").mkdir(parents=True, exist_ok=True)
        lines = [f"{1700000000000 + i} {value} {10 * i}\n" for i, value in enumerate(values, 1)]
        (run / "metrics" / name).write_text("".join(lines))
    (run / "params").mkdir()
    (run / "params" / "seed").write_text("7")
    (run / "meta.yaml").write_text("run_id: 3f1c\n")
    (folder / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\n")
    return folder


def mlflow_metric(folder: Path) -> Path:
    """One metric file alone, of a metric with a slash in its name."""
    mlflow(folder)
    metrics = folder / "mlruns" / "0" / "3f1c" / "metrics"
    (metrics / "train").mkdir()
    shutil.move(metrics / "loss", metrics / "train" / "loss")
    return metrics / "train" / "loss"


def mlflow_frame(folder: Path) -> Path:
    """The history of several metrics as a data frame: a row per value."""
    rows = [
        ["3f1c", key, value, 10 * i, 1700000000000 + i]
        for key, values in (("eval_loss", LOSS[:4]), ("loss", LOSS), ("grad_norm", NORM))
        for i, value in enumerate(values, 1)
    ]
    return table(folder / "metrics_of_a_run.csv", ["run_id", "key", "value", "step", "timestamp"], rows)


def trainer_history(folder: Path) -> Path:
    """`trainer.state.log_history`, saved as a list."""
    rows = [{"loss": loss, "step": 10 * i} for i, loss in enumerate(LOSS, 1)] + [{"train_loss": 1.3, "step": 400}]
    (folder / "log.json").write_text(json.dumps(rows, indent=1))
    return folder / "log.json"


def notebook(folder: Path) -> Path:
    """What a Trainer shows in a notebook, pasted with tabs."""
    body = "".join(f"{10 * i}\t{loss}\t1.1\n" for i, loss in enumerate(LOSS, 1))
    (folder / "pasted.txt").write_text("Step\tTraining Loss\tValidation Loss\n" + body)
    return folder / "pasted.txt"


WITH_NORM = [axolotl, wandb_history, wandb_scan, mlflow, mlflow_frame]
WITHOUT = [
    llama_factory, lightning, lightning_by_pandas, wandb_export, mlflow_metric, trainer_history, notebook,
]  # fmt: skip
STRIDES = {axolotl: (1, 1), lightning: (49, 50), lightning_by_pandas: (49, 50)}
