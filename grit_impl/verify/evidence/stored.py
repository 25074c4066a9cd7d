"""Evidence as it lies in a reports folder: read, never made. Enough for reports; verdicts are in the database."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.record import RunRecord
from grit_impl.verify.claims import Evidence
from grit_impl.verify.options import Options

if TYPE_CHECKING:
    from grit_impl.evaluate.results import Evaluation


def stored_evidence(options: Options, requires: Iterable[str], evaluation: Path | None = None) -> Evidence:
    """Finished runs, exports and an evaluation that are there.

    Args:
        options: Where to look, for which seed, and by which metric answers are scored.
        requires: Requirements of claims; what they do not name is left out.
        evaluation: Folder of the evaluation, or None.

    Raises:
        GRITError: a record or the evaluation is corrupt.
    """
    named = [requirement.partition(":")[::2] for requirement in requires]
    runs = Path(options.reports_dir) / "runs"
    arms = sorted({name for kind, name in named if kind in ("record", "verdict", "evaluation", "export")})
    records, exports = {}, {}
    for name in arms:
        record = RunRecord(runs / f"{name}-seed{options.seed}")
        if record.complete:
            records[name] = record
        note = (runs / "base" if name == "base" else record.path) / "gguf" / "export.json"
        if note.is_file():
            exports[name] = json.loads(note.read_text())
    found = None
    if evaluation is not None and (evaluation / "evaluation.json").is_file():
        from grit_impl.evaluate.results import Evaluation

        found = Evaluation.load(evaluation, options.aqi_metric)
    return Evidence(options, records=records, exports=exports, evaluation=found)


def stored_evaluation(folder: Path, metric: str, inputs: Mapping[str, Any], server: str) -> Evaluation | str:
    """The latest finished evaluation in a folder of just these files, questions and server, or why there is none.

    Args:
        folder: Of evaluations.
        metric: The primary AQI accuracy.
        inputs: What it must have been made from.
        server: What answers now, with its version: another one may answer otherwise. Empty: nothing answers.
    """
    from grit_impl.evaluate.results import Evaluation

    done = sorted(folder.glob("*/evaluation.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    others: list[str] = []
    for path in done:
        found = Evaluation.load(path.parent, metric)
        known = found.meta.get("inputs", {})
        if any(known.get(name) != value for name, value in inputs.items()):
            continue
        if not server or known.get("server") == server:
            return found
        others.append(str(known.get("server")))
    if others:
        return f"{others[0]} answered in the evaluation that is there, and now it would be {server}: evaluate again"
    if done:
        return f"none of the {len(done)} evaluations in {folder} is of these exports and questions, by this server"
    return "no finished evaluation, and --reuse-runs makes none"
