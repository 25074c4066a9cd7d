"""Refused before the first step: what a session will need later is tried on the untrained base.

Each check raises `GRITError` with one line. Nothing has been trained by then, so nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.evaluate.items import ItemSet
from grit_impl.evaluate.results import Evaluation
from grit_impl.machine import available_memory, has_gpu
from grit_impl.recipes.arms import RunSpec, find_arm
from grit_impl.recipes.bases import find_base
from grit_impl.recipes.tokens import longest
from grit_impl.record import RunRecord, fingerprint, write_atomic
from grit_impl.runs.execute import TOKENS, Progress, request_for, run_arms
from grit_impl.verify.evidence.questions import spread

ITEMS = 10
"""Questions that the untrained base is asked, half of them about the air, half about knowledge."""
TOGETHER = 2
"""Questions that are answered at the same time, at least."""
SMALL = 32 << 20
"""Bytes of weights below which a base fits wherever Python does, so that no step is tried."""
WHOLE = 5
"""Bytes that transformers needs for a byte of q8_0: four for a float32, and some for what is computed with it."""
ROOM = 256 << 20
"""Bytes for ledgers, answers and reports."""
GIB = 1 << 30


@dataclass(frozen=True)
class Rehearsal:
    """A real step of the longest rows, in a process of its own.

    Attributes:
        seconds: Of the step.
        start: Seconds of everything around it: loading, saving.
        peak: Bytes of memory, a GPU's where there is one.
        total: The GPU's bytes; None on a CPU.
        heavier: How many times the tokens of an average step it has.
        adapter: Bytes of the adapter.
    """

    seconds: float
    start: float
    peak: int
    total: int | None
    heavier: float
    adapter: int


def rehearse(specs: Sequence[RunSpec], runs: Path, folder: Path, progress: Progress) -> Rehearsal | None:
    """Train one step of the longest rows for each library that the arms train with, and compare what they begin with.

    Args:
        specs: What is to be trained, with tokens that lie in `runs`.
        runs: The folder of the runs.
        folder: For the trial runs, of which only what they took is kept: an interrupted session tries them once.
        progress: Told about steps.

    Returns:
        What the heaviest step took; None for a base that fits anywhere and is trained by one library alone.

    Raises:
        GRITError: a step cannot be made, or two libraries do not begin with the same loss and gradient.
    """
    base, on_gpu = find_base(specs[0].base_model), has_gpu() and find_base(specs[0].base_model).gpu
    if base.size() < SMALL and not on_gpu:
        return None
    # The arm that needs most of each library: GRIT's.
    by_library: dict[bool, RunSpec] = {}
    for spec in sorted(specs, key=lambda spec: find_arm(spec.arm).grit == "trainer"):
        by_library[on_gpu and find_arm(spec.arm).unsloth] = spec
    training, note = specs[0].training, folder / "took.json"
    inputs = fingerprint([request_for(spec, ledger=False)["fingerprint"] for spec in by_library.values()])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or of another version
        kept = json.loads(note.read_text())
        if kept.pop("inputs") == inputs:
            return Rehearsal(**kept)
    shutil.rmtree(folder, ignore_errors=True)
    rows = training.batch_size * training.accumulation
    chosen, heavier = longest(runs / TOKENS / f"{specs[0].tokens}.json", rows, folder / TOKENS)
    once = replace(training, steps=1, save_every=0)
    trial = [replace(spec, training=once, tokens=chosen) for spec in by_library.values()]
    began = time.monotonic()
    made = run_arms(trial, folder, jobs=1, progress=_renamed(progress), ledger=False)
    for arm, record in made.items():
        if isinstance(record, str):
            raise GRITError(f"{arm} cannot make a single step of the longest rows, so nothing is trained: {record}")
    each = (time.monotonic() - began) / len(made)
    records = [record for record in made.values() if isinstance(record, RunRecord)]
    peaks = [int(record.run.get("peak_reserved_bytes") or record.peak_memory_bytes or 0) for record in records]
    seconds = max(record.steps[0]["seconds"] for record in records)
    found = Rehearsal(
        seconds=seconds,
        start=max(0.0, each - seconds),
        peak=max(peaks),
        total=records[0].run["machine"].get("gpu_memory_bytes") if on_gpu else None,
        heavier=heavier,
        adapter=max(_size(record.adapter) for record in records),
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_atomic(note, json.dumps({"inputs": inputs, **asdict(found)}))
    return found


def _renamed(progress: Progress) -> Progress:
    return lambda label, done, total: progress(label.replace("training", "trying a step of"), done, total)


def require_memory(step: Rehearsal, together: int) -> None:
    """Refuse more arms at the same time than there is memory for.

    Args:
        step: What one takes.
        together: Arms at the same time on one GPU, or on the machine.

    Raises:
        GRITError: they need more than there is.
    """
    have, where = (step.total, "the GPU has") if step.total else (available_memory(), "are free")
    if have is not None and together * step.peak > have:
        remedy = "use --jobs 1" if together > 1 else "use a smaller base model or a larger machine"
        raise GRITError(
            f"memory: {together} arm{'s' * (together > 1)} at the same time need {together * step.peak / GIB:.1f} GiB, "
            f"{have / GIB:.1f} GiB {where}: {remedy}"
        )


def require_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        GRITError: fewer than `needed` bytes, and some for reports, are free.
    """
    free = shutil.disk_usage(folder).free
    if needed + ROOM > free:
        raise GRITError(
            f"disk: runs and exports need about {(needed + ROOM) / GIB:.1f} GiB, {free / GIB:.1f} GiB are free in "
            f"{folder}: free some, or choose another folder with --reports-dir"
        )


def require_export(base: Path, note: Mapping[str, Any], told: str, progress: Progress) -> str | None:
    """Verify the untrained base's export, as `grit export --verify` does.

    Args:
        base: Its folder.
        note: What the export noted.
        told: The prompt of training, with `{instruction}`.
        progress: Told about the steps.

    Returns:
        Why it was left out: transformers needs the whole model in float32. None: it was verified.

    Raises:
        GRITError: it is not the base model.
    """
    from grit_impl.export.check import verify_export

    size, free = Path(note["path"]).stat().st_size, available_memory()
    needed = size + WHOLE * size
    if free is not None and needed > free:
        return (
            f"the untrained base's export is not verified: that needs {needed / GIB:.1f} GiB of memory, "
            f"{free / GIB:.1f} GiB are free"
        )
    label = "verifying the untrained base's export"
    found = verify_export(
        base,
        None,
        note["path"],
        modelfile=note["modelfile"],
        training_format=told,
        progress=lambda done, total, _: progress(label, done, total),
    )
    if not found.passed:
        raise GRITError(f"the export of the untrained base is not the base, so nothing is trained: {found.summary()}")
    return None


def few(questions: ItemSet) -> ItemSet:
    """Some of these questions."""
    return spread(questions, ITEMS // 2)


def require_answers(evaluation: Evaluation) -> float:
    """Refuse a base that no question gets an answer from; seconds per answer otherwise.

    Raises:
        GRITError: a request failed, or all answers are empty.
    """
    failed = [row for row in evaluation.answers if row.get("error")]
    if failed:
        raise GRITError(f"the untrained base does not answer, so nothing is trained: {failed[0]['error']}")
    answers = [row for row in evaluation.answers if str(row["answer"]).strip()]
    if not answers:
        raise GRITError(
            f"the untrained base answers nothing to {len(evaluation.answers)} questions: nothing is trained"
        )
    return statistics.fmean(float(row.get("seconds") or 0.0) for row in answers)


def minutes(
    step: Rehearsal | None,
    todo: Sequence[RunSpec],
    jobs: int,
    seeds: int,
    answer: float,
    answers: int,
) -> str | None:
    """What lies ahead, for people; None where it is not worth saying.

    Args:
        step: What a step takes.
        todo: Runs to be trained with each seed.
        jobs: How many of them at the same time.
        seeds: Seeds.
        answer: Seconds that the untrained base needs for an answer; trained models, which answer shorter, need less.
        answers: Answers with each seed, of all models.
    """
    if step is None:
        return None
    steps = sum(spec.training.steps for spec in todo)
    training = (step.seconds / step.heavier * steps + step.start * len(todo)) * seeds / min(jobs, len(todo)) / 60
    asking = answer * answers / TOGETHER * seeds / 60
    return f"about {training:.0f} min of training and at most {asking:.0f} min of questions lie ahead"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
