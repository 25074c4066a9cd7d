"""Runs arms and measurements of cost, each in a process of its own, and finds again what is finished.

An arm gets its own process because Unsloth patches transformers, peft and trl when it is imported, and because peak
memory is a property of a process. This module is both sides: `run_arms` starts `python -m grit_impl.runs.execute`,
which trains one arm under the gradient ledger; `run_cost` starts `grit_impl.cost.measure`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grit_impl.compatibility  # noqa: F401 (refuses versions that do not go together)
from grit_impl.cost.measure import LENGTHS, complete, read
from grit_impl.errors import GRITError, RunFailed
from grit_impl.imports import closure
from grit_impl.machine import has_gpu, least_used, switches, versions, visible_gpus
from grit_impl.processes import end_with_parent, place
from grit_impl.recipes.arms import FIRST, NEUTRAL, TOKEN_FILE, RunSpec, find_arm
from grit_impl.recipes.bases import find_base
from grit_impl.recipes.fetch import digest
from grit_impl.record import RunRecord, fingerprint, sha256_file, write_atomic
from grit_impl.runs.first import disagreement, first_batch
from grit_impl.runs.restart import REQUEST, request_of, set_aside

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with a label, what is done and the total."""

# What determines a result, by stage, with all that it imports: a change in a report must not train anything again.
_TRAIN = ("grit_impl.recipes.train", "grit_impl.ledger.recorder", "grit_impl.probe.run")
_STAGES = {
    "train": _TRAIN,
    "export": ("grit_impl.export.writer", "grit_impl.export.check", "grit_impl.gguf.modelfile"),
    "evaluate": ("grit_impl.evaluate.session", "grit_impl.serve.server"),
    "cost": (*_TRAIN, "grit_impl.cost.measure"),
}
_POLL_SECONDS = 0.5
TOKENS = ".tokens"
"""Folder beside the runs: what the arms of a session read."""


def source_fingerprint(stage: str = "train") -> str:
    """Hash of the code that determines a stage's results: `train`, `export`, `evaluate` or `cost`."""
    return fingerprint({name: sha256_file(path) for name, path in closure(*_STAGES[stage]).items()})


def spec_fingerprint(spec: RunSpec) -> str:
    """Hash of everything that determines a run."""
    return fingerprint(depends(spec))


def depends(spec: RunSpec) -> dict[str, Any]:
    """Everything that determines a run: spec, base weights, data file, code, libraries, kind of device."""
    weights = find_base(spec.base_model).weights()
    data = [Path(spec.dataset)] if Path(spec.dataset).is_file() else []
    described = spec.to_dict()
    for name in NEUTRAL:
        del described["training"][name]
    return {
        "spec": described,
        "contents": {f.name: digest(f) for f in (*weights, *data)},
        "source": source_fingerprint(),
        "versions": versions(),
        "gpu": has_gpu(),
        **(switches() if find_arm(spec.arm).unsloth else {}),
        **({"processes": place()[1]} if place()[1] > 1 else {}),
    }


def request_for(spec: RunSpec, *, ledger: bool) -> dict[str, Any]:
    """What an arm's process is told, which stays in the folder."""
    found = depends(spec)
    return {"spec": spec.to_dict(), "fingerprint": fingerprint(found), "depends": found, "ledger": ledger}


def finished(path: Path, wanted: str | None) -> RunRecord | None:
    """The complete record at `path`, if it is of the wanted fingerprint (None: of any)."""
    record = RunRecord(path)
    if not record.complete:
        return None
    if wanted is not None and (path / "COMPLETE").read_text(errors="replace").strip() != wanted:
        return None
    return record


def run_arms(
    specs: Iterable[RunSpec],
    folder: Path,
    *,
    jobs: int,
    progress: Progress,
    name: Callable[[RunSpec], str] | None = None,
    ledger: bool = True,
) -> dict[str, RunRecord | str]:
    """Train the arms that have no finished record.

    Args:
        specs: What to train.
        folder: Where run records are kept, each in a folder of its own.
        jobs: Arms that train at the same time, spread over the GPUs there are.
        progress: Told about optimizer steps.
        name: The name of a run's folder. Default: `run_name`.
        ledger: Record what happens to the gradients.

    Returns:
        By arm, the complete record, or why there is none.

    Raises:
        GRITError: bad input, as the arm's process reported it.
    """
    results: dict[str, RunRecord | str] = {}
    waiting: list[tuple[RunSpec, Path, dict[str, Any]]] = []
    paths: dict[str, Path] = {}
    for spec in (with_tokens(spec, folder) for spec in specs):
        path, request = folder / (name or run_name)(spec), request_for(spec, ledger=ledger)
        paths[spec.arm] = path
        if (record := finished(path, request["fingerprint"])) is not None:
            results[spec.arm] = record
        else:
            waiting.append((spec, path, request))
    running: dict[subprocess.Popen[bytes], tuple[RunSpec, Path, str | None]] = {}
    # Processes that train together choose their GPUs by their numbers.
    gpus = visible_gpus() if waiting and place()[1] == 1 else []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                spec, path, request = waiting.pop(0)
                gpu = least_used(gpus, (used for *_, used in running.values()))
                running[_start(spec, path, request, gpu)] = (spec, path, gpu)
            time.sleep(_POLL_SECONDS)
            for process, (spec, path, _) in list(running.items()):
                _require_agreement(paths, spec)
                progress(f"training {spec.arm}", _steps_done(path), spec.training.steps)
                if (status := process.poll()) is None:
                    continue
                del running[process]
                if status == 2:
                    raise GRITError(_last_line(path / "log.txt").removeprefix("error: "))
                results[spec.arm] = finished(path, None) or _how_it_ended(status, path / "log.txt")
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return results


def with_tokens(spec: RunSpec, folder: Path) -> RunSpec:
    """The spec with the hash of its tokens, made once, by the base's own tokenizer, and kept in `folder`.

    Raises:
        GRITError: the base model or the data set is wrong, or nothing is left to learn from.
    """
    if spec.tokens:
        return spec
    from grit_impl.recipes.tokens import make_tokens

    return replace(spec, tokens=make_tokens(spec, folder / TOKENS))


def unfinished(specs: Iterable[RunSpec], folder: Path) -> list[RunSpec]:
    """Those that `run_arms` would train, in folders of their usual names."""
    return [spec for spec in specs if not finished(folder / run_name(spec), spec_fingerprint(spec))]


def run_name(spec: RunSpec) -> str:
    """The name of a run's folder."""
    return f"{spec.arm}-seed{spec.seed}"


def _require_agreement(paths: Mapping[str, Path], spec: RunSpec) -> None:
    """Raise `GRITError` if two arms have begun with numbers that rounding does not explain."""
    noted = [(arm, found) for arm, path in paths.items() if (found := first_batch(path / FIRST))]
    on_gpu = has_gpu() and find_base(spec.base_model).gpu
    # On a GPU a base's own weights are 16 bits wide, whatever the adapters are.
    precision = spec.training.precision if not on_gpu or spec.training.precision == "fp16" else "bf16"
    if why := disagreement(noted, precision):
        raise GRITError(why)


def _start(spec: RunSpec, path: Path, request: dict[str, Any], gpu: str | None) -> subprocess.Popen[bytes]:
    """Start one arm. An unfinished run of the same fingerprint is continued, any other is moved aside.

    Raises:
        GRITError: the folder holds something that is no run record.
    """
    if path.exists() and any(path.iterdir()):
        before = request_of(path)
        if before is None:
            raise GRITError(f"{path} holds files but no run record: choose another folder")
        other = (path / "COMPLETE").exists() or before.get("fingerprint") != request["fingerprint"]
        if other and (aside := set_aside(path)) is not None:
            logger.warning("%s held another run, which is now in %s", path, aside)
    write_atomic(path / REQUEST, json.dumps(request, indent=2))
    shutil.copyfile(path.parent / TOKENS / f"{spec.tokens}.json", path / TOKEN_FILE)
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return _process(path, spec.training.threads, environment)


def _process(path: Path, threads: int, environment: Mapping[str, str], *more: str) -> subprocess.Popen[bytes]:
    """One arm's, with its log beside its request."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **environment,
    }
    command = [sys.executable, "-m", "grit_impl.runs.execute", str(path), *more]
    with open(path / "log.txt", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def train_beside(spec: RunSpec, path: Path, request: Mapping[str, Any]) -> None:
    """What every process but the first does, where a launcher has started several: train, and keep no record.

    Args:
        spec: With its tokens made.
        path: The first process's record, whose checkpoints all of them continue from.
        request: As in `REQUEST`.

    Raises:
        RunFailed: this process's part ended before it was over; a plain GRITError: its input is bad.
    """
    with TemporaryDirectory() as folder:
        own = Path(folder)
        write_atomic(own / REQUEST, json.dumps({**request, "ledger": False}))
        shutil.copyfile(path.parent / TOKENS / f"{spec.tokens}.json", own / TOKEN_FILE)
        process = _process(own, spec.training.threads, {}, str(path))
        try:
            status = process.wait()
        finally:
            process.terminate()
            process.wait()
        if status:  # of bad input, the first process tells, too
            why = f"process {place()[0]}: {_last_line(own / 'log.txt').removeprefix('error: ')}"
            raise GRITError(why) if status == 2 else RunFailed(why)


def _steps_done(path: Path) -> int:
    try:
        return (path / "steps.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "it printed nothing"


def _how_it_ended(status: int, log: Path) -> str:
    return f"its process ended with status {status}: {_last_line(log).removeprefix('error: ')} (see {log})"


def run_cost(
    base: str, stack: str, target: Path, *, seconds: float, inputs: str, progress: Progress
) -> dict[str, Any] | str:
    """Measure the cost on one stack; lengths that an interrupted measurement finished are kept.

    Args:
        base: Folder of the base model.
        stack: `unsloth` or `peft`.
        target: The JSON file; what the process prints goes beside it.
        seconds: For the rounds of each length.
        inputs: Fingerprint of what the figures depend on: other figures are measured anew.
        progress: Told about seconds of rounds.

    Returns:
        The content of the file, or why it is not whole.
    """
    log, total = target.with_suffix(".log"), round(len(LENGTHS) * seconds)
    label = f"measuring the cost on {stack}, seconds"
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "grit_impl.cost.measure", base, stack, str(target)]
    command += ["--seconds", str(seconds), "--inputs", inputs]
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        while (status := process.poll()) is None:
            progress(label, min(_seconds_measured(read(target), process.pid, seconds, inputs), total - 1), total)
            time.sleep(_POLL_SECONDS)
    finally:
        process.terminate()
        process.wait()
    found = read(target)
    if not complete(found, inputs):
        return _how_it_ended(status, log)
    progress(label, total, total)
    return found


def _seconds_measured(found: dict[str, Any], process: int, seconds: float, inputs: str) -> int:
    if found.get("inputs") != inputs:  # of an earlier measurement, until the process replaces it
        return 0
    running = found.get("running") or {}
    now = min(time.time() - running["since"], seconds) if running.get("process") == process else 0.0
    return round(len(found["cells"]) * seconds + now)


def run_here(
    path: Path, spec: RunSpec, wanted: str = "", *, ledger: bool = True, checkpoints: Path | None = None
) -> RunRecord:
    """Train one arm in this process, under the gradient ledger, and complete its record (see `train`)."""
    arm, unsloth = find_arm(spec.arm), False
    if arm.unsloth and find_base(spec.base_model).gpu:
        import torch

        if unsloth := torch.cuda.is_available():
            from grit_impl.recipes.unsloth import import_unsloth

            import_unsloth()  # before transformers, peft and trl, which it patches
    from grit_impl.ledger.recorder import gradient_ledger
    from grit_impl.recipes.train import train

    path.mkdir(parents=True, exist_ok=True)
    if arm.grit == "callback":
        from grit_impl.probe.run import require_probe

        require_probe(path, spec.training, unsloth=unsloth)
    target = RunRecord(path).ledger

    def observer(model: Any, done: int) -> Any:
        return gradient_ledger(model, path=target, resume_from=done)

    record = train(spec, path, observer if ledger else None, checkpoints)
    record.update(fingerprint=wanted)
    record.finish()
    return record


def main() -> int:
    """Entry of an arm's process: the record's folder with its `spec.json`, and the first process's, if another's."""
    end_with_parent()
    path, first = Path(sys.argv[1]), Path(sys.argv[-1])
    request = json.loads((path / REQUEST).read_text())
    spec, ledger = RunSpec.from_dict(request["spec"]), request["ledger"]
    try:
        run_here(path, spec, request["fingerprint"], ledger=ledger, checkpoints=first / "checkpoints")
    except RunFailed as error:
        print(f"error: {error}", flush=True)
        return 1
    except GRITError as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
