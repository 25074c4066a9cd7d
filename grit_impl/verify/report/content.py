"""What a report says, as plain values: the templates only lay it out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grit_impl.cost.performance import read_performance
from grit_impl.errors import GRITError
from grit_impl.files import FIXTURES
from grit_impl.record import RunRecord
from grit_impl.verify.claims import OUTCOMES, Evidence, Metric
from grit_impl.verify.claims.curves import losses
from grit_impl.verify.claims.measures import measured
from grit_impl.verify.options import MODELS, PLAN_MODELS, RECOMMENDED
from grit_impl.verify.store.database import JudgedClaim

DASH = "\N{EN DASH}"
GIB = 2**30
AQI_NAMES = {"category": "right category", "exact": "exact index", "within5": "index within 5 points"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of the metrics table, with what stands small beside it."""

    value: str = DASH
    interval: str = ""


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """A number for people; a dash where there is none."""
    if value is None or math.isnan(value):
        return DASH
    return f"{value:.{digits}f}{unit}"


def cell(metric: Metric, digits: int = 1, sign: bool = False) -> Cell:
    """A metric with its interval."""
    if math.isnan(metric.estimate):
        return Cell()
    shape = f"{'+' if sign else ''}.{digits}f"
    interval = ""
    if metric.low is not None and metric.high is not None and not math.isinf(metric.high - metric.low):
        interval = f"[{_signed(metric.low, shape)}, {_signed(metric.high, shape)}]"
    return Cell(_signed(metric.estimate, shape), interval)


def _signed(value: float, shape: str) -> str:
    """Formatted; a value that rounds to zero has no sign."""
    text = format(value, shape)
    return text.lstrip("+-") if float(text) == 0 else text


def metrics_table(evidence: Evidence) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """The plan's table.

    Returns:
        Column names (the base and the arms of the plan) and rows: a label with its unit, and a cell per column.
    """
    rows: list[tuple[str, list[Cell]]] = []
    names = MODELS if RECOMMENDED in evidence.records else PLAN_MODELS

    def add(label: str, make: Any) -> None:
        cells = [make(name) or Cell() for name in names]
        if any(each.value != DASH for each in cells):
            rows.append((label, cells))

    def from_run(read: Any) -> Any:
        return lambda name: read(evidence.records[name]) if name in evidence.records else None

    def from_evaluation(metric: str, digits: int = 1, sign: bool = False) -> Any:
        present = evidence.evaluation.metrics if evidence.evaluation is not None else {}
        return lambda name: cell(measured(evidence, name, metric), digits, sign) if name in present else None

    add("Training time (s)", from_run(lambda record: Cell(number(record.run.get("train_seconds")))))
    add("Time per step, median (s)", from_run(lambda record: Cell(number(_median_seconds(record), 3))))
    add("Peak memory (GiB)", from_run(lambda record: Cell(number(_gib(record.peak_memory_bytes), 2))))
    add("Final loss", from_run(lambda record: Cell(number(record.steps[-1]["loss"] if record.steps else None, 4))))
    add("Fisher inversions", from_run(lambda record: Cell(_grit(record, "inversions", 0))))
    add("Preconditioning coverage (%)", from_run(lambda record: Cell(_grit(record, "coverage", 1, 100))))
    add("Loss-curve divergence (RMS)", lambda name: Cell(_divergence(evidence, name)))

    def unparsable(name: str) -> Cell | None:
        if evidence.evaluation is None or name not in evidence.evaluation.models:
            return None
        found = evidence.evaluation.metrics[name].unparsable
        return Cell(str(sum(found.values())), ", ".join(f"{count} {reason}" for reason, count in found.items()))

    def changed(name: str) -> Cell | None:
        if evidence.evaluation is None or (share := evidence.evaluation.noise(name).share) is None:
            return None
        return Cell(number(share.estimate), changed_answers(evidence, name))

    primary = evidence.evaluation.aqi_metric if evidence.evaluation is not None else ""
    add("AQI accuracy (%)", from_evaluation("aqi_accuracy"))
    for metric in (each for each in AQI_NAMES if each != primary):
        add(f"AQI {AQI_NAMES[metric]} (%)", from_evaluation(metric))
    add("AQI mean absolute error (index points)", from_evaluation("mae"))
    add("Unparsable answers", unparsable)
    add("Answers that change when asked again (%)", changed)
    add("delta_AQI (points)", from_evaluation("delta_aqi", sign=True))
    add("Knowledge retention (%)", from_evaluation("retention"))
    add("Speed (tokens/s)", from_evaluation("tokens_per_second"))
    add("delta_speed (%)", from_evaluation("delta_speed", sign=True))
    add("delta_speed (tokens/s)", from_evaluation("delta_speed_absolute", sign=True))
    return list(names), rows


def changed_answers(evidence: Evidence, name: str) -> str:
    """How many of a model's answers were others when asked again; empty if none was."""
    found = evidence.evaluation.noise(name) if evidence.evaluation is not None else None
    return f"{found.changed} of {found.asked} answers changed" if found and found.asked else ""


def primary_accuracy(evidence: Evidence) -> str:
    """What "AQI accuracy" means in this evaluation; empty without one."""
    return AQI_NAMES[evidence.evaluation.aqi_metric] if evidence.evaluation is not None else ""


def group_tables(evidence: Evidence) -> list[tuple[str, list[str], list[tuple[str, list[Cell]]]]]:
    """AQI accuracy in percent by pollutant and by true category: title, models, and a row of cells per group."""
    if evidence.evaluation is None:
        return []
    models = list(evidence.evaluation.models)
    tables = []
    for by, title in (("pollutant", "By pollutant"), ("category", "By true category")):
        groups: dict[str, dict[str, Cell]] = {}
        for row in evidence.evaluation.table(by):
            interval = f"[{row['low']:.1f}, {row['high']:.1f}], n = {row['n']}"
            groups.setdefault(row["group"], {})[row["label"]] = Cell(number(row["accuracy"]), interval)
        rows = [(group, [cells.get(model, Cell()) for model in models]) for group, cells in groups.items()]
        tables.append((title, models, rows))
    return tables


def _median_seconds(record: RunRecord) -> float | None:
    times = [row["seconds"] for row in record.steps if row.get("seconds") is not None]
    return statistics.median(times) if times else None


def _gib(value: float | None) -> float | None:
    return None if value is None else value / GIB


def _grit(record: RunRecord, key: str, digits: int, scale: float = 1) -> str:
    value = (record.run.get("grit_report") or {}).get(key)
    return number(None if value is None else float(value) * scale, digits)


def _divergence(evidence: Evidence, name: str) -> str:
    if name == "baseline" or not {name, "baseline"} <= evidence.records.keys():
        return DASH
    gaps = [a - b for a, b in zip(losses(evidence, name), losses(evidence, "baseline"), strict=False)]
    return number(math.sqrt(statistics.fmean(gap * gap for gap in gaps)), 4) if gaps else DASH


def counts(judged: Sequence[JudgedClaim]) -> dict[str, int]:
    """How many claims have each verdict, in the order of `OUTCOMES`."""
    return {outcome: sum(each.judgement.verdict == outcome for each in judged) for outcome in OUTCOMES}


def headline(judged: Sequence[JudgedClaim]) -> str:
    """One sentence: do the gating claims hold?"""
    gating = [each for each in judged if each.claim.gates]
    refuted = [each.claim.id for each in gating if each.judgement.verdict == "refuted"]
    open_ = [each for each in gating if each.judgement.verdict in ("inconclusive", "not exercised")]
    if refuted:
        return f"{len(refuted)} of {len(gating)} gating claims refuted: {', '.join(refuted)}"
    if open_:
        return f"No gating claim refuted; {len(open_)} of {len(gating)} undecided"
    return f"All {len(gating)} gating claims supported" if gating else "No gating claim was judged"


def seed_rows(judged: Sequence[JudgedClaim]) -> list[dict[str, str]]:
    """Claims that were decided over training seeds: the difference with each of them, and what they support."""
    return [
        {
            "claim": each.claim.id,
            "differences": ", ".join(f"{seed}: {gap:+.3g}" for seed, gap in differences.items()),
            "statement": each.judgement.summary,
        }
        for each in judged
        if (differences := each.judgement.evidence.get("differences by seed"))
    ]


def metric_rows(metrics: Sequence[Metric]) -> list[dict[str, str]]:
    """The metrics of a claim, for its table."""
    return [
        {
            "subject": metric.subject,
            "name": metric.name,
            "estimate": _plain(metric.estimate),
            "interval": "" if metric.low is None else f"[{_plain(metric.low)}, {_plain(metric.high)}]",
            "unit": metric.unit,
            "n": "" if metric.n is None else str(metric.n),
            "method": metric.method,
        }
        for metric in metrics
    ]


def _plain(value: float | None) -> str:
    return DASH if value is None else f"{value:.6g}"


def performance(folder: Path) -> dict[str, Any] | None:
    """What `make bench` left in the reports: where and when, and its figures; or what is wrong with it; or None."""
    try:
        found = read_performance(folder)
    except GRITError as error:
        return {"problem": str(error), "facts": "", "figures": []}
    if found is None:
        return None
    kept = [f"{name} {found.versions[name]}" for name in ("python", "torch", "peft") if name in found.versions]
    when = found.measured.replace("T", " ").replace("+00:00", " UTC")
    facts = f"{found.machine}; {', '.join(kept)}; commit {found.commit or 'unknown'}, {when}."
    return {"problem": "", "facts": facts, "figures": found.figures}


def evidence_text(value: Mapping[str, Any]) -> str:
    """Evidence as indented JSON; empty for none."""
    return json.dumps(value, indent=2, default=str) if value else ""


def fault_matrix(folder: Path) -> dict[str, Any] | None:
    """The fault zoo's summary, as `grit faults --out` wrote it to the reports or recorded with the source; or None."""
    for path in (folder / "fault_matrix.json", FIXTURES / "fault_matrix.json"):
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())["summary"]
            return found
    return None
