"""Runs a plan's jobs, one process each, and writes results as they come.

Processes are forked from a server that has torch and transformers loaded already, so that a run pays for neither the
import nor another run's state. The controlling process alone writes the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.machine import least_used, visible_gpus
from grit_impl.sweep.plan import Plan, PlannedRun
from grit_impl.sweep.store import FINISHED, Store, choose_trial

Work = Callable[[Mapping[str, Any], Mapping[str, Any], str], dict[str, Any]]
PRELOAD = ["grit_impl.sweep.worker"]
PATIENCE = 0.5
"""Seconds between two looks at the clock."""


@dataclass
class _Running:
    job: PlannedRun
    settings: dict[str, Any]
    process: Any
    inbox: Connection
    gpu: str | None
    began: float


class Interrupted(BaseException):
    """The sweep was asked to end; what is finished stays."""


def default_work(job: Mapping[str, Any], settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    """One training run."""
    from grit_impl.sweep.run import train

    return train(job, settings, device)


def _child(
    work: Work, outbox: Connection, job: dict[str, Any], settings: dict[str, Any], device: str, gpu: str | None
) -> None:
    """In the run's process: a result, or the error as one."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when torch first touches a GPU, which it has not yet
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the controlling process ends its children itself
    try:
        result = work(job, settings, device)
    except Exception as error:
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(BrokenPipeError):  # the controlling process has ended, and nobody waits for this any more
        outbox.send(result)
    outbox.close()


def _touch_gpu() -> None:
    import torch

    torch.zeros(1, device="cuda").cpu()


def _context(device: str) -> Any:
    """How processes are started: forked from a warm server, or where the GPU does not survive that, from nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    if device == "cpu":
        return context
    probe = context.Process(target=_touch_gpu)
    probe.start()
    probe.join()
    return context if probe.exitcode == 0 else multiprocessing.get_context("spawn")


class Sweep:
    """One pass over a plan: what is finished stays, what is missing is run.

    Args:
        plan: What to run.
        store: Where results are and go.
        jobs: Processes at a time.
        device: `cpu` or `cuda`; where there are several GPUs, each run gets the one with the fewest.
        budget: Seconds after which everything still running is ended and left for the next pass; None: no limit.
        retry: Run again what failed.
        fresh: Start every process from nothing: the warm server cannot load weights that bitsandbytes has quantised.
        work: What a run does; the tests put something fast here.
        progress: Called with the number of finished runs, of all runs, and a line about the last one.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        *,
        jobs: int,
        device: str,
        budget: float | None = None,
        retry: bool = False,
        fresh: bool = False,
        work: Work = default_work,
        progress: Callable[[int, int, str], None] = lambda done, total, line: None,
    ) -> None:
        self.plan, self.store, self.jobs, self.device, self.work = plan, store, jobs, device, work
        self.fresh = fresh
        self.progress = progress
        self.deadline = None if budget is None else time.monotonic() + budget
        everything = list(plan.jobs())
        statuses = store.statuses()
        settled = (*FINISHED, *(() if retry else ("failed",)))
        self.total = len({job.key for job in everything})
        self.pending = [job for job in everything if statuses.get(job.key) not in settled]
        self.finished = self.total - len(self.pending)
        self._untuned = {job.group for job in self.pending if job.phase == "tuning"}
        self._costs: list[float] = []
        self._running: list[_Running] = []
        self._gpus = visible_gpus() if device == "cuda" else []
        self._context: Any = None

    def run(self) -> int:
        """Run until nothing is left, or the budget is spent.

        Returns:
            The number of runs that are still missing.

        Raises:
            Interrupted: a signal asked the sweep to end; finished runs are in the store.
        """
        self._context = multiprocessing.get_context("spawn") if self.fresh else _context(self.device)
        with _signals():
            try:
                while self.pending or self._running:
                    while len(self._running) < self.jobs and (job := self._next()) is not None:
                        self._start(job)
                    if not self._running or self._left() <= 0:
                        break
                    self._collect()
            finally:
                for running in self._running:
                    running.process.terminate()
                for running in self._running:
                    running.process.join()
        return len(self.pending) + len(self._running)

    def _left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def _next(self) -> PlannedRun | None:
        """The first pending job whose tuning is finished; None if there is none, or no time for it."""
        if self._costs and self._left() < statistics.median(self._costs):
            return None
        for job in self.pending:
            if job.phase == "tuning" or job.method == "none" or job.group not in self._untuned:
                self.pending.remove(job)
                return job
        return None

    def _start(self, job: PlannedRun) -> None:
        chosen: dict[str, Any] = {}
        if job.phase != "tuning" and job.method != "none":
            trial = choose_trial(self.store.runs(phase="tuning", task=job.task, arm=job.arm))
            if trial is None:
                self._record(job, {}, {"status": "failed", "error": "no tuning trial of this arm came to an end"})
                return
            chosen = self.plan.trials[job.arm][trial]
        settings = self.plan.settings(job, chosen)
        inbox, outbox = self._context.Pipe(duplex=False)
        gpu = least_used(self._gpus, (running.gpu for running in self._running))
        arguments = (self.work, outbox, dataclasses.asdict(job), settings, self.device, gpu)
        process = self._context.Process(target=_child, args=arguments, daemon=True)
        process.start()
        outbox.close()
        self._running.append(_Running(job, settings, process, inbox, gpu, time.monotonic()))

    def _collect(self) -> None:
        """Wait for a result or a death, and write what came."""
        ready = wait([running.inbox for running in self._running], timeout=min(PATIENCE, max(0.0, self._left())))
        for running in [r for r in self._running if r.inbox in ready]:
            try:
                result = running.inbox.recv()
            except EOFError:
                result = None
            running.process.join()
            running.inbox.close()
            if result is None:
                code = running.process.exitcode
                result = {"status": "failed", "error": f"the process died with exit status {code}"}
            self._running.remove(running)
            seconds = time.monotonic() - running.began
            self._costs.append(seconds)
            self._record(running.job, running.settings, {**result, "seconds": seconds})

    def _record(self, job: PlannedRun, settings: dict[str, Any], result: dict[str, Any]) -> None:
        self.store.add(job, settings, result, self.device)
        self.finished += 1
        if job.phase == "tuning":
            waiting = [j for j in (*self.pending, *(r.job for r in self._running)) if j.phase == "tuning"]
            self._untuned = {j.group for j in waiting}
        name = "/".join(filter(None, (job.phase, job.task, job.arm, job.variant, f"seed {job.seed}")))
        what = f"loss {result['loss']:.4f}" if result["status"] == "done" else result.get("error") or result["status"]
        self.progress(self.finished, self.total, f"{name}: {what}")


@contextmanager
def _signals() -> Iterator[None]:
    """A termination signal ends the sweep like an interruption from the keyboard."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever runs it there deals with signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_device(device: str) -> None:
    """Refuse a GPU that is not there, before any process is started.

    Raises:
        GRITError: `cuda` without one.
    """
    from grit_impl.machine import has_gpu

    if device == "cuda" and not has_gpu():
        raise GRITError("--device cuda: no NVIDIA GPU was found; use --device cpu")
