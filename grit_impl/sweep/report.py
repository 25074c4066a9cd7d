"""A sweep's results as Markdown tables and SVG figures."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.record import write_atomic
from grit_impl.statistics.intervals import Interval, t_interval
from grit_impl.sweep.analysis import ALPHA, SMALLEST_EFFECT, PairedEffect, candidate, compare, family, tuned, verdicts
from grit_impl.sweep.plan import BASE_ARM
from grit_impl.sweep.store import Store

Rows = list[dict[str, Any]]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _interval(value: Interval, digits: int = 1, sign: str = "+") -> str:
    if not math.isfinite(value.low):
        return f"{value.estimate:{sign}.{digits}f}"
    return f"{value.estimate:{sign}.{digits}f} [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


class _Results:
    """One store, by phase."""

    def __init__(self, store: Store) -> None:
        self.plan: dict[str, Any] = json.loads(store.meta.get("plan", "null"))
        self.meta, self.all = store.meta, store.runs()
        if self.plan is None or not self.all:
            raise GRITError(f"{store.path} holds no runs of a sweep: run grit sweep run first")
        self.tuning = [row for row in self.all if row["phase"] == "tuning" and row["status"] != "failed"]
        self.evaluation = [row for row in self.all if row["phase"] == "evaluation" and row["status"] != "failed"]
        self.ablation = [row for row in self.all if row["phase"] == "ablation" and row["status"] != "failed"]
        self.reference: str = self.plan["reference"]
        self.tasks = [t for t in self.plan["tasks"] if any(row["task"] == t for row in self.evaluation)]
        self.arms = [arm for arm in self.plan["trials"] if any(row["arm"] == arm for row in self.evaluation)]
        self.name = Path(self.plan["base"]).name


def markdown(stores: Sequence[Store]) -> str:
    """All tables. The first store's tuning phase names the GRIT arm of the confirmatory test."""
    results = [_Results(store) for store in stores]
    arm = candidate(results[0].tuning)
    confirmed: list[tuple[_Results, PairedEffect]] = []
    for r in results:
        found = (compare(r.evaluation, task, arm, r.reference) for task in r.tasks)
        confirmed += [(r, c) for c in found if c is not None]
    judged = verdicts([c for _, c in confirmed])
    parts = [
        f"The GRIT arm of the confirmatory test, chosen on the tuning seeds alone: **{arm}**.",
        _table(
            ("base", "task", "n", "held-out loss against tuned AdamW, %", "p (Holm)", "sign-flip p", "verdict"),
            [
                (
                    r.name,
                    c.task,
                    str(c.effect.n),
                    _interval(c.effect),
                    _p(c.adjusted),
                    _p(c.p_flip),
                    f"**{c.verdict}**" + (f" ({c.needed} seeds would decide)" if c.verdict == "inconclusive" else ""),
                )
                for (r, _), c in zip(confirmed, judged, strict=True)
            ],
        ),
        f"Negative is better; 95% intervals over paired seeds; smallest effect of interest {SMALLEST_EFFECT:g}%, "
        f"alpha {ALPHA:g}.",
    ]
    for r in results:
        parts += _base(r)
    return "\n\n".join(parts) + "\n"


def _base(r: _Results) -> list[str]:
    others = [arm for arm in r.arms if arm != r.reference]
    parts = [f"### Base `{r.name}`", _cost(r), "#### Held-out loss and accuracy", _levels(r)]
    parts += ["#### Every arm against tuned AdamW (Holm over this table)"]
    rows = []
    for c in family(r.evaluation, r.reference, others, r.tasks):
        steps = "never" if c.steps is None else f"{c.steps:.2f}"
        cells = (
            c.task,
            c.arm,
            str(c.effect.n),
            _interval(c.effect),
            _p(c.adjusted),
            _p(c.p_flip),
            f"{c.detectable:.1f}",
        )
        seconds = _interval(c.equal_seconds) if c.step_time > 1 else "as at equal steps"
        rest = (_interval(c.accuracy), steps, f"{c.step_time:.2f}", seconds, _interval(c.retention, 2))
        rows.append((*cells, *rest, c.verdict + (f", {c.diverged} diverged" if c.diverged else "")))
    header = ("task", "arm", "n", "loss, %", "p (Holm)", "sign-flip p", "detectable, %", "accuracy, points")
    more = ("steps to AdamW's loss", "step time", "loss at equal seconds, %", "retention, nats", "verdict")
    parts += [_table((*header, *more), rows), "#### Chosen by tuning", _tuning(r)]
    if r.ablation:
        parts += ["#### Ablations (exploratory)", _ablations(r)]
    return parts


def _cost(r: _Results) -> str:
    seconds: dict[str, float] = {}
    for row in r.all:
        seconds[row["phase"]] = seconds.get(row["phase"], 0.0) + (row["seconds"] or 0.0)
    counts = Counter(row["phase"] for row in r.all)
    failed = sum(row["status"] == "failed" for row in r.all)
    diverged = sum(row["status"] == "diverged" for row in r.all)
    each = "; ".join(f"{phase} {counts[phase]} runs, {seconds[phase]:.0f} s" for phase in counts)
    device = "process-seconds with one thread" if r.all[0]["device"] == "cpu" else "process-seconds on shared GPUs"
    trials = len(next(iter(r.plan["trials"].values())))
    return (
        f"Cost: {each} ({device}). {trials} tuning trials per arm and task on seed(s) "
        f"{', '.join(map(str, r.plan['tuning_seeds']))}. {diverged} runs diverged, {failed} failed. "
        f"Commit {r.meta.get('git_commit')}, torch {json.loads(r.meta['versions']).get('torch')}."
        + (f" The tuning runs are another sweep's, of commit {r.meta['tuned_by']}." if "tuned_by" in r.meta else "")
    )


def _levels(r: _Results) -> str:
    rows = []
    for task in r.tasks:
        for arm in (BASE_ARM, *r.arms):
            members = [x for x in r.evaluation if x["task"] == task and x["arm"] == arm and x["status"] == "done"]
            if members:
                loss, accuracy = ([x[key] for x in members] for key in ("loss", "accuracy"))
                retention = statistics.fmean(x["retention"] for x in members)
                seconds = [x["step_seconds"] for x in members if x["step_seconds"]]
                right = t_interval(accuracy).scaled(100)
                cells = (task, arm, str(len(members)), _interval(t_interval(loss), 4, ""), _interval(right, 1, ""))
                time = f"{1000 * statistics.median(seconds):.1f}" if seconds else "-"
                rows.append((*cells, f"{retention:.2f}", time))
    header = ("task", "arm", "n", "held-out loss, nats per token", "accuracy, %", "retention loss", "ms per step")
    return _table(header, rows)


def _tuning(r: _Results) -> str:
    rows = []
    for (task, arm), row in sorted(tuned(r.tuning).items()):
        fixed = set(r.plan["common"]) | set(r.plan["fixed"].get(arm, {})) | {"every"}
        text = ", ".join(f"{name} {value:g}" for name, value in row["settings"].items() if name not in fixed)
        trials = len(r.plan["trials"][arm])
        edge = " (at an end of the grid)" if row["trial"] in (0, trials - 1) else ""
        rows.append((task, arm, f"{row['trial'] + 1} of {trials}{edge}", text, f"{row['loss']:.4f}"))
    return _table(("task", "arm", "trial", "settings", "validation loss"), rows)


def _ablations(r: _Results) -> str:
    """Each change against the same arm unchanged, and against the reference with the same change where it has one."""
    rows = []
    for name in dict.fromkeys(a["name"] for a in r.plan["ablations"]):
        changed = [x for x in r.ablation if x["variant"] == name]
        for task, arm in dict.fromkeys((x["task"], x["arm"]) for x in changed):
            plain = [dict(x, arm="unchanged") for x in r.evaluation if x["task"] == task and x["arm"] == arm]
            within = compare([*changed, *plain], task, arm, "unchanged")
            against = compare(changed, task, arm, r.reference) if arm != r.reference else None
            if within is not None:
                other = "-" if against is None else _interval(against.effect)
                rows.append((name, task, arm, str(within.effect.n), _interval(within.effect), other))
    header = (
        "change",
        "task",
        "arm",
        "n",
        "loss against the arm unchanged, %",
        "against AdamW with the same change, %",
    )
    return _table(header, rows)


def marks(block: str = "sweep") -> tuple[str, str]:
    """What a block of a Markdown file stands between."""
    return f"<!-- {block}:begin -->", f"<!-- {block}:end -->"


def replace_block(document: Path, text: str, block: str = "sweep") -> None:
    """Put `text` between the two marks of a block in a Markdown file.

    Raises:
        GRITError: the file cannot be read, or lacks the marks.
    """
    try:
        content = document.read_text(encoding="utf-8")
    except OSError as error:
        raise GRITError(f"cannot read {document}: {error.strerror or error}") from error
    begin, end = marks(block)
    if content.count(begin) != 1 or content.count(end) != 1:
        raise GRITError(f"{document} needs exactly one {begin} and one {end}")
    head, rest = content.split(begin)
    write_atomic(document, f"{head}{begin}\n\n{text}\n{end}{rest.split(end)[1]}")


def plots(stores: Sequence[Store], folder: Path) -> list[Path]:
    """Held-out loss against steps and against seconds, a panel per task, mean and 95% band over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for store in stores:
        r = _Results(store)
        if not r.tasks:
            continue
        for axis in ("steps", "seconds"):
            figure, panels = plt.subplots(
                1, len(r.tasks), figsize=(3.4 * len(r.tasks), 3.2), layout="constrained", squeeze=False
            )
            for panel, task in zip(panels[0], r.tasks, strict=True):
                for arm in r.arms:
                    rows = [x for x in r.evaluation if x["task"] == task and x["arm"] == arm and x["status"] == "done"]
                    if not rows:
                        continue
                    steps = np.array([point[0] for point in rows[0]["curve"]], dtype=float)
                    losses = np.log([[point[1] for point in row["curve"]] for row in rows])
                    bands = [t_interval(column) for column in losses.T]
                    # One clock per arm: a step's median, so that a busy core bends no curve.
                    x = steps * (statistics.median(row["step_seconds"] for row in rows) if axis == "seconds" else 1)
                    (line,) = panel.plot(x, np.exp([band.estimate for band in bands]), label=arm, linewidth=1.2)
                    if len(rows) > 1:
                        low, high = np.exp([[b.low, b.high] for b in bands]).T
                        panel.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
                panel.set(title=task, xlabel=axis, yscale="log")
                # 0.6, not 6 x 10^-1.
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_formatter(NullFormatter())
            panels[0][0].set_ylabel("held-out loss, nats per token")
            panels[0][-1].legend(fontsize=6, frameon=False)
            path = folder / f"{r.name}-loss-{axis}.svg"
            # Named by what they show: the same results give the same file.
            with plt.rc_context({"svg.hashsalt": path.name}):
                figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
            written.append(path)
    return written
