"""Live evidence: trains, exports and evaluates what a claim requires, and finds again what is already there.

Nothing is done twice: a run record, an export and an evaluation are reused if they were made from the same inputs
by the same code, and only a finished one counts. Several processes (pytest-xdist) take turns through a lock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.config import GRITConfig, preset_training
from grit_impl.cost.measure import complete, read
from grit_impl.errors import GRITError
from grit_impl.machine import cores, gpu_names, has_gpu, switches, versions, visible_gpus
from grit_impl.recipes.arms import ARMS, RunSpec, default_training, find_arm, grit_options
from grit_impl.recipes.bases import find_base
from grit_impl.record import RunRecord, fingerprint
from grit_impl.runs.execute import finished, run_arms, run_cost, source_fingerprint, unfinished, with_tokens
from grit_impl.verify.claims.base import Evidence, SeedEvidence
from grit_impl.verify.evidence import preflight
from grit_impl.verify.evidence.products import ProductEvidence
from grit_impl.verify.evidence.questions import questions
from grit_impl.verify.options import MODELS, PLAN_ARMS, RECOMMENDED

if TYPE_CHECKING:
    from grit_impl.evaluate.results import Evaluation


@dataclass
class LiveEvidence(ProductEvidence):
    """Evidence that is made when it is asked for.

    Attributes:
        config: GRIT's options for the arms that use it.
    """

    # Hybrid and pure share a rule that works beside the optimizer of any training loop.
    config: GRITConfig = field(default_factory=lambda: GRITConfig.preset("precondition"))

    def __post_init__(self) -> None:
        self.records, self.verdicts, self.exports, self.costs, self.seeds = {}, {}, {}, {}, {}
        self.missing, self.failed = {}, {}
        self._wanted: frozenset[str] = frozenset()
        self._evaluating, self._tried, self._first = False, False, threading.Lock()
        self._ended: BaseException | None = None

    def gather(self, requires: Iterable[str]) -> Evidence:
        """Make what these requirements need and does not exist yet.

        Raises:
            GRITError: bad input: an unknown base model, a corrupt record, an unreachable Ollama.
        """
        self._ended = None
        wanted = [tuple(requirement.partition(":")[::2]) for requirement in requires]
        models = {name for kind, name in wanted if kind == "export"}
        evaluate = any(kind == "evaluation" for kind, _ in wanted)
        if evaluate:
            models |= set(self._models)
        arms = {name for kind, name in wanted if kind in ("record", "verdict")} | (models - {"base"})
        repeated = {name for kind, name in wanted if kind == "seeds"} if self.options.seeds > 1 else set()
        if RECOMMENDED in arms and RECOMMENDED not in self._models:
            arms, models = arms - {RECOMMENDED}, models - {RECOMMENDED}
            why = f"the preset {RECOMMENDED} was not tuned on {self.options.base_model}: grit sweep finds its settings"
            self.missing = {**self.missing, RECOMMENDED: why}
        if repeated:
            arms, models, evaluate = arms | repeated, models | repeated | {"base"}, True
        self._refuse_early(evaluate)
        self._wanted, self._evaluating = frozenset(models), evaluate
        with self._lock(), ThreadPoolExecutor(max(1, self.options.seeds)) as pool, self._together():
            ahead = self._train_ahead([name for name in PLAN_ARMS if name in repeated], pool)
            self._train([name for name in ARMS if name in arms])
            for name in dict.fromkeys(name for kind, name in wanted if kind == "cost"):
                self._cost(name)
            for name in [name for name in self._models if name in models]:
                self._export(name)
            if evaluate and self.evaluation is None and "evaluation" not in self.missing:
                self._evaluate()
            if repeated and not self.seeds and "seeds" not in {**self.missing, **self.failed}:
                self._over_seeds([name for name in PLAN_ARMS if name in repeated], ahead, pool)
        return self

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What fails here ends the trainings that were started ahead: the pool waits for its threads."""
        try:
            yield
        except BaseException as error:
            self._ended = self._ended or error
            raise

    def _progress_unless_ended(self, label: str, done: int, total: int) -> None:
        """Progress of a training, which ends when another seed's has failed."""
        if self._ended is not None:
            raise self._ended
        self.progress(label, done, total)

    def _refuse_early(self, evaluate: bool) -> None:
        """Find bad input before minutes of training.

        Raises:
            GRITError: no such base model, an Ollama that does not answer, or unusable questions.
        """
        find_base(self.options.base_model)
        if evaluate and self.ollama_url and self.evaluation is None and not self.options.reuse_runs:
            from grit_impl.serve.client import Endpoint

            with Endpoint(self.ollama_url) as endpoint:
                endpoint.version()
        if evaluate and self.evaluation is None:
            questions(self.options)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        from filelock import FileLock

        lock = FileLock(self.reports / ".lock")
        try:
            self.reports.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise GRITError(f"cannot use {self.reports}: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    # Training

    def _specs(self, arms: Iterable[str], seed: int) -> list[RunSpec]:
        options, base = self.options, self._prepare_base()
        specs = []
        for arm in map(find_arm, arms):
            training = default_training(options.base_model, cuda=has_gpu(), preset=arm.preset, steps=options.steps)
            grit = grit_options(arm, GRITConfig.preset(arm.preset) if arm.preset else self.config)
            specs.append(RunSpec(arm=arm.name, base_model=base, seed=seed, training=training, grit=grit))
        return specs

    @property
    def _models(self) -> tuple[str, ...]:
        """What is exported and evaluated, in the order of the report."""
        tuned = preset_training(RECOMMENDED, self.options.base_model)
        return MODELS if tuned else tuple(name for name in MODELS if name != RECOMMENDED)

    def _train(self, arms: list[str]) -> None:
        todo = [name for name in arms if name not in {**self.records, **self.missing, **self.failed}]
        if not todo:
            return
        found = self._runs(todo, self.options.seed)
        if self.options.reuse_runs:
            self.missing = {**self.missing, **{name: why for name, why in found.items() if isinstance(why, str)}}
        for name, result in found.items():
            if isinstance(result, str):
                if name not in self.missing:
                    self.failed = {**self.failed, name: result}
                continue
            if why := result.diverged:  # of a version that completed such runs
                self.failed = {**self.failed, name: why}
                continue
            self.records = {**self.records, name: result}
            self._judge(name, result)

    def _runs(self, arms: Iterable[str], seed: int) -> dict[str, RunRecord | str]:
        """Finished runs of these arms with this seed, or why there is none."""
        folder = self.reports / "runs"
        if self.options.reuse_runs:
            found: dict[str, RunRecord | str] = {}
            for name in arms:
                record = finished(folder / f"{name}-seed{seed}", None)
                found[name] = record or f"no finished run in {folder}, and --reuse-runs trains none"
            return found
        # One at a time where they would share a GPU; else one per core, for a run of one thread each.
        share = self.options.jobs // self.options.seeds if self._all_at_once else self.options.jobs
        jobs = share or (1 if has_gpu() else max(1, min(2, cores())))
        with self._first:  # seeds come in threads of their own, which must not import or try the same at once
            specs = [with_tokens(spec, folder) for spec in self._specs(arms, seed)]
            if todo := unfinished(specs, folder):
                self._preflight(todo, jobs)
        return run_arms(specs, folder, jobs=jobs, progress=self._progress_unless_ended)

    def _preflight(self, todo: list[RunSpec], jobs: int) -> None:
        """Before the first training, try on the untrained base what the session will need later.

        Raises:
            GRITError: something does not work, so nothing is trained.
        """
        if self._tried:
            return
        runs, seeds, answer = self.reports / "runs", self.options.seeds, 0.0
        preflight.require_disk(self.reports, 0)
        exported = self._exported("base", None) if self._wanted and isinstance(self.base, Path) else None
        if isinstance(exported, str):
            raise GRITError(f"the untrained base cannot be exported, so nothing is trained: {exported}")
        if exported:
            self._note(preflight.require_export(Path(self.base), exported, self.format.told(), self.progress))
            if self._evaluating:
                answer = self._try_answers(exported)
        step = preflight.rehearse(todo, runs, self.reports / ".rehearsal", self.progress)
        size = Path(exported["path"]).stat().st_size if exported else 0
        if step:
            # One after another where they share a GPU; else as many as the machine has to hold.
            preflight.require_memory(step, -(-jobs // max(1, len(visible_gpus()))) if step.total else jobs)
            size += seeds * (len(todo) * step.adapter * 4 + len(self._wanted) * size)
        preflight.require_disk(self.reports, size)
        asked = sum(len(suite.items) for suite in questions(self.options)) if answer else 0
        self._note(preflight.minutes(step, todo, jobs, seeds, answer, asked * len(self._wanted)))
        self._tried = True

    def _try_answers(self, exported: Mapping[str, Any]) -> float:
        """Ask the untrained base a few questions, through the server that will be used: seconds per answer."""
        found = self._evaluated({"base": exported}, only=preflight.few)
        if isinstance(found, str):
            raise GRITError(f"the untrained base cannot be evaluated, so nothing is trained: {found}")
        return preflight.require_answers(found)

    def _judge(self, name: str, record: RunRecord) -> None:
        from grit_impl.ledger.verdict import judge_ledger

        if not record.ledger.is_file():
            self.missing = {**self.missing, f"verdict:{name}": f"{record.path} has no gradient ledger"}
            return
        self.verdicts = {**self.verdicts, name: judge_ledger(record)}

    def _cost(self, stack: str) -> None:
        """Steps with and without GRIT in turn, in a process of their own."""
        key, target = f"cost:{stack}", self.reports / "cost" / f"{stack}.json"
        if stack in self.costs or key in self.missing or key in self.failed:
            return
        if not self.options.reuse_runs and not has_gpu():
            self.missing = {**self.missing, key: "needs a CUDA GPU: found no NVIDIA driver"}
            return
        inputs = fingerprint(
            {
                "base": self.options.base_model,
                "stack": stack,
                "gpus": gpu_names(),
                "seconds": self.options.cost_seconds,
                "source": source_fingerprint("cost"),
                "versions": versions(),
                **(switches() if stack == "unsloth" else {}),
            }
        )
        found = read(target)
        if self.options.reuse_runs and not found["cells"]:
            self.missing = {**self.missing, key: f"no figures in {target}, and --reuse-runs measures nothing"}
            return
        if not (self.options.reuse_runs or complete(found, inputs)):
            seconds, base = self.options.cost_seconds, self._prepare_base()
            made = run_cost(base, stack, target, seconds=seconds, inputs=inputs, progress=self.progress)
            if isinstance(made, str):
                self.failed = {**self.failed, key: made}
                return
            found = made
        self.costs = {**self.costs, stack: found}

    # Export

    def _export(self, name: str) -> None:
        key = f"export:{name}"
        if name in self.exports or key in self.missing or key in self.failed:
            return
        record = self.records.get(name)
        if name != "base" and record is None:
            return  # why is known under the arm's name
        found = self._exported(name, record)
        if isinstance(found, str):
            if self.options.reuse_runs or isinstance(self.base, str):
                self.missing = {**self.missing, key: found}
            else:
                self.failed = {**self.failed, key: found}
        else:
            self.exports = {**self.exports, name: found}

    # Evaluation

    def _evaluate(self) -> None:
        absent = [name for name in self._models if name not in self.exports]
        if "base" in absent or len(absent) == len(self._models):
            self.missing = {**self.missing, "evaluation": f"nothing to evaluate: no export of {', '.join(absent)}"}
            return
        found = self._evaluated({name: self.exports[name] for name in self._models if name in self.exports})
        if isinstance(found, str):
            self.missing = {**self.missing, "evaluation": found}
        else:
            self.evaluation = found

    # Seeds

    @property
    def _all_seeds(self) -> range:
        return range(self.options.seed, self.options.seed + self.options.seeds)

    def _train_ahead(self, arms: list[str], pool: Executor) -> dict[int, Future[Any]]:
        """Start training the other seeds' arms, where `--jobs` allows that many at the same time."""
        others = [seed for seed in self._all_seeds if seed != self.options.seed] if arms else []
        return {seed: pool.submit(self._run_ahead, arms, seed) for seed in others if self._all_at_once}

    def _run_ahead(self, arms: list[str], seed: int) -> dict[str, RunRecord | str]:
        with self._together():
            return self._runs(arms, seed)

    @property
    def _all_at_once(self) -> bool:
        """Whether the arms of all seeds train at the same time."""
        return self.options.seeds > 1 and self.options.jobs >= len(PLAN_ARMS) * self.options.seeds

    def _over_seeds(self, arms: list[str], ahead: Mapping[int, Future[Any]], pool: Executor) -> None:
        """Train, export and evaluate these arms with every seed. One that is not there leaves nothing to pair.

        Args:
            arms: The arms that are paired.
            ahead: Runs that have been started already, by seed.
            pool: For seeds that are evaluated at the same time, each by servers of its own.
        """
        seeds: dict[int, SeedEvidence] = {}
        others = [seed for seed in self._all_seeds if seed != self.options.seed]
        runs = {seed: ahead[seed].result() if seed in ahead else self._runs(arms, seed) for seed in others}
        # In turn: transformers and peft build one model at a time, not one in each of several threads.
        exports = [self._exports_of(runs[seed]) for seed in others]
        # Answers do not depend on what else is running; four cores are enough for one seed's server and its client.
        together = len(others) > 1 and not self.ollama_url and cores() >= 4 * len(others)
        evaluations = dict(zip(others, (pool.map if together else map)(self._evaluate_seed, exports), strict=True))
        for seed in self._all_seeds:
            if seed == self.options.seed:
                records = {name: self.records[name] for name in arms if name in self.records}
                found: Evaluation | str = self.evaluation or "no evaluation"
            else:
                records = {name: run for name, run in runs[seed].items() if isinstance(run, RunRecord)}
                found = evaluations[seed]
            if isinstance(found, str) or len(records) < len(arms):
                why = {"seeds": f"seed {seed}: {found if isinstance(found, str) else 'an arm has no run'}"}
                if self.options.reuse_runs:
                    self.missing = {**self.missing, **why}
                else:
                    self.failed = {**self.failed, **why}
                return
            seeds[seed] = SeedEvidence(records, found)
        self.seeds = seeds

    def _exports_of(self, runs: Mapping[str, RunRecord | str]) -> dict[str, dict[str, Any]] | str:
        """Export notes of the base and of one seed's arms, made now if they are not there, or why there are none."""
        if why := "; ".join(run for run in runs.values() if isinstance(run, str)):
            return why
        if "base" not in self.exports:
            return "nothing to compare with: no export of base"
        exports: dict[str, dict[str, Any]] = {"base": dict(self.exports["base"])}
        for name, record in runs.items():
            assert isinstance(record, RunRecord)
            found = self._exported(name, record)
            if isinstance(found, str):
                return found
            exports[name] = found
        return exports

    def _evaluate_seed(self, exports: dict[str, dict[str, Any]] | str) -> Evaluation | str:
        return exports if isinstance(exports, str) else self._evaluated(exports, speed=False)
