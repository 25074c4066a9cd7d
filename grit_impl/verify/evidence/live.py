"""Live evidence: trains, exports and evaluates what a claim requires, and finds again what is already there.

Nothing is done twice: a run record, an export and an evaluation are reused if they were made from the same inputs
by the same code, and only a finished one counts. Several processes (pytest-xdist) take turns through a lock.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.config import GRITConfig
from grit_impl.cost.measure import complete, read
from grit_impl.errors import GRITError
from grit_impl.files import FIXTURES
from grit_impl.machine import gpu_names, has_gpu, switches, versions
from grit_impl.recipes.arms import ARMS, RunSpec, default_training, find_arm, grit_options
from grit_impl.recipes.bases import BASES, find_base, resolve_base
from grit_impl.recipes.fetch import digest
from grit_impl.recipes.formats import Format, find_format
from grit_impl.record import RunRecord, fingerprint, sha256_file, write_atomic
from grit_impl.runs.execute import Progress, finished, run_arms, run_cost, source_fingerprint
from grit_impl.verify.claims.base import Evidence, SeedEvidence
from grit_impl.verify.options import PLAN_ARMS, PLAN_MODELS

if TYPE_CHECKING:
    from grit_impl.evaluate.items import ItemSet
    from grit_impl.evaluate.results import Evaluation


def no_progress(label: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass
class LiveEvidence(Evidence):
    """Evidence that is made when it is asked for.

    Attributes:
        progress: Told what is going on.
        config: GRIT's options for the arms that use it.
    """

    progress: Progress = no_progress
    # Hybrid and pure share a rule that works beside the optimizer of any training loop.
    config: GRITConfig = field(default_factory=lambda: GRITConfig.preset("precondition"))

    def __post_init__(self) -> None:
        self.records, self.verdicts, self.exports, self.costs, self.seeds = {}, {}, {}, {}, {}
        self.missing, self.failed = {}, {}

    @property
    def reports(self) -> Path:
        """The folder of run records and reports."""
        return Path(self.options.reports_dir)

    def gather(self, requires: Iterable[str]) -> Evidence:
        """Make what these requirements need and does not exist yet.

        Raises:
            GRITError: bad input: an unknown base model, a corrupt record, an unreachable Ollama.
        """
        wanted = [tuple(requirement.partition(":")[::2]) for requirement in requires]
        models = {name for kind, name in wanted if kind == "export"}
        evaluate = any(kind == "evaluation" for kind, _ in wanted)
        if evaluate:
            models |= set(PLAN_MODELS)
        arms = {name for kind, name in wanted if kind in ("record", "verdict")} | (models - {"base"})
        repeated = {name for kind, name in wanted if kind == "seeds"} if self.options.seeds > 1 else set()
        arms, models, evaluate = arms | repeated, models | repeated, evaluate or bool(repeated)
        self._refuse_early(evaluate)
        with self._lock(), ThreadPoolExecutor(max(1, self.options.seeds)) as pool:
            ahead = self._train_ahead([name for name in PLAN_ARMS if name in repeated], pool)
            self._train([name for name in ARMS if name in arms])
            for name in dict.fromkeys(name for kind, name in wanted if kind == "cost"):
                self._cost(name)
            for name in [name for name in PLAN_MODELS if name in models]:
                self._export(name)
            if evaluate and self.evaluation is None and "evaluation" not in self.missing:
                self._evaluate()
            if repeated and not self.seeds and "seeds" not in {**self.missing, **self.failed}:
                self._over_seeds([name for name in PLAN_ARMS if name in repeated], ahead, pool)
        return self

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
            self._questions()

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
        training = default_training(options.base_model, cuda=has_gpu(), steps=options.steps)
        return [
            RunSpec(
                arm=name,
                base_model=base,
                seed=seed,
                training=training,
                grit=grit_options(find_arm(name), self.config),
            )
            for name in arms
        ]

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
        jobs = share or (1 if has_gpu() else max(1, min(2, os.cpu_count() or 1)))
        return run_arms(self._specs(arms, seed), folder, jobs=jobs, progress=self.progress)

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

    @property
    def base(self) -> Path | str:
        """The base model's folder; a random shape's name, but on a GPU the folder that Unsloth can load it from."""
        base = find_base(self.options.base_model)
        if base.shape:
            return self.reports / "bases" / base.shape if has_gpu() else base.name
        return base.folder()

    @functools.cached_property
    def format(self) -> Format:
        """How the base is asked, in training and in every Modelfile."""
        return find_format(self.base)

    def _prepare_base(self) -> str:
        """What the arms load as their base model."""
        base = self.base
        if self.options.base_model.startswith("random:") and isinstance(base, Path) and not base.is_dir():
            self.progress(f"making {self.options.base_model}", 0, 1)
            command = [sys.executable, "-m", "grit_impl.recipes.random_base", self.options.base_model, str(base)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise GRITError((made.stderr.strip().splitlines() or ["no message"])[-1])
        return self.options.base_model if self.options.base_model in BASES else str(base)

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

    def _exported(self, name: str, record: RunRecord | None) -> dict[str, Any] | str:
        """A model's export note, made now if it is not there, or why there is none. Without a record: the base's."""
        from grit_impl.export import export_merged, write_modelfile

        folder = record.gguf if record is not None else self.reports / "runs" / "base" / "gguf"
        note, gguf, modelfile = folder / "export.json", folder / "model-q8_0.gguf", folder / "Modelfile"
        there = note.is_file() and gguf.is_file()
        if self.options.reuse_runs:
            found: dict[str, Any] = json.loads(note.read_text()) if there else {}
            return found or f"no export in {folder}, and --reuse-runs makes none"
        try:
            base = resolve_base(self.base)
        except GRITError as error:
            return str(error)
        adapter = record.adapter if record is not None else None
        inputs = fingerprint(
            {
                "base": [digest(path) for path in sorted(base.glob("*.safetensors"))],
                "adapter": sha256_file(adapter / "adapter_model.safetensors") if adapter else None,
                "template": self.format.template,
                "source": source_fingerprint("export"),
            }
        )
        if not there or json.loads(note.read_text()).get("inputs") != inputs:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                export = export_merged(
                    base, adapter, gguf, "q8_0", lambda done, total, _: self.progress(f"exporting {name}", done, total)
                )
            except GRITError as error:  # a finding about this arm; the others go on
                return str(error)
            stops = export.stops or ("<|end_of_text|>",)
            write_modelfile(gguf, modelfile, self.format.template, stop=stops)
            # Written last: its presence says that the rest is whole.
            write_atomic(
                note, json.dumps({"inputs": inputs, **export.as_dict(), "modelfile": str(modelfile)}, indent=2)
            )
        found = json.loads(note.read_text())
        return found

    # Evaluation

    def _evaluate(self) -> None:
        absent = [name for name in PLAN_MODELS if name not in self.exports]
        if "base" in absent or len(absent) == len(PLAN_MODELS):
            self.missing = {**self.missing, "evaluation": f"nothing to evaluate: no export of {', '.join(absent)}"}
            return
        found = self._evaluated({name: self.exports[name] for name in PLAN_MODELS if name in self.exports})
        if isinstance(found, str):
            self.missing = {**self.missing, "evaluation": found}
        else:
            self.evaluation = found

    def _evaluated(self, exports: Mapping[str, Mapping[str, Any]], *, speed: bool = True) -> Evaluation | str:
        """The evaluation of these models, made now if it is not there, or why there is none."""
        from grit_impl.evaluate.session import EvaluationOptions, evaluate

        aqi, knowledge = self._questions()
        models = {
            "models": {name: export["sha256"] for name, export in exports.items()},
            "items": [fingerprint(aqi.items), fingerprint(knowledge.items)],
        }
        if self.options.reuse_runs:
            return self._stored_evaluation(models)
        inputs = {
            **models,
            "source": source_fingerprint("evaluate"),
            "versions": versions(),
            "url": self.ollama_url,
        }
        out = self.reports / "evaluation" / fingerprint({**inputs, "speed": speed})[:12]
        with self._server(exports) as (url, names):
            # On a terminal it shows bars of its own; a log gets one line when it is done.
            how = EvaluationOptions(
                aqi_metric=self.options.aqi_metric, stop=self.format.stop, progress=sys.stderr.isatty()
            )
            how = how if speed else replace(how, speed_rounds=0)
            self.progress("evaluating", 0, 1)
            found = evaluate(url, names, aqi, knowledge, out, how, inputs)
            self.progress("evaluating", 1, 1)
        return found

    def _stored_evaluation(self, inputs: Mapping[str, Any]) -> Evaluation | str:
        """The latest finished evaluation of just these files and questions."""
        from grit_impl.evaluate.results import Evaluation

        folder = self.reports / "evaluation"
        done = sorted(folder.glob("*/evaluation.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in done:
            found = Evaluation.load(path.parent, self.options.aqi_metric)
            if all(found.meta.get("inputs", {}).get(name) == value for name, value in inputs.items()):
                return found
        if done:
            return f"none of the {len(done)} evaluations in {folder} is of these exports and questions"
        return "no finished evaluation, and --reuse-runs makes none"

    def _questions(self) -> tuple[ItemSet, ItemSet]:
        """The AQI questions that were asked for, none of them in the training data, and those about knowledge.

        Raises:
            GRITError: unusable questions.
        """
        from grit_impl.evaluate.items import aqi_fields, load_aqi, load_knowledge

        options, own = self.options, not self.options.aqi_dataset
        aqi = load_aqi(
            FIXTURES / "aqi_test.jsonl" if own else options.aqi_dataset,
            aqi_fields(options.features_field, options.answer_field),
            # The frozen set is not in the training data by construction, and a test holds it to that.
            training=() if own else self._trained_on(),
            allow_overlap=options.allow_overlap,
        )
        return aqi, load_knowledge(FIXTURES / "knowledge_test.jsonl")

    def _trained_on(self) -> list[str]:
        """The AQI questions of the training data of every seed."""
        from grit_impl import aqi

        frozen = aqi.frozen_items()
        training = default_training(self.options.base_model, cuda=has_gpu(), steps=self.options.steps)
        size = training.steps * training.batch_size * training.accumulation
        return [item["features"] for seed in self._all_seeds for item in aqi.generate(size, seed, frozen)]

    # Seeds

    @property
    def _all_seeds(self) -> range:
        return range(self.options.seed, self.options.seed + self.options.seeds)

    def _train_ahead(self, arms: list[str], pool: Executor) -> dict[int, Future[Any]]:
        """Start training the other seeds' arms, where `--jobs` allows that many at the same time."""
        others = [seed for seed in self._all_seeds if seed != self.options.seed] if arms else []
        return {seed: pool.submit(self._runs, arms, seed) for seed in others if self._all_at_once}

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
        # Answers do not depend on what else is running; four cores are enough for one seed's server and its client.
        together = len(others) > 1 and not self.ollama_url and (os.cpu_count() or 1) >= 4 * len(others)
        evaluations = dict(
            zip(others, (pool.map if together else map)(self._evaluate_seed, runs.values()), strict=True)
        )
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

    def _evaluate_seed(self, runs: Mapping[str, RunRecord | str]) -> Evaluation | str:
        records = {name: run for name, run in runs.items() if isinstance(run, RunRecord)}
        if why := "; ".join(run for run in runs.values() if isinstance(run, str)):
            return why
        exports: dict[str, dict[str, Any]] = {"base": dict(self.exports["base"])}
        for name, record in records.items():
            found = self._exported(name, record)
            if isinstance(found, str):
                return found
            exports[name] = found
        return self._evaluated(exports, speed=False)

    # Serving

    @property
    def ollama_url(self) -> str:
        """The Ollama that was asked for; empty for the embedded server."""
        return self.options.ollama_url or os.environ.get("OLLAMA_HOST", "")

    @contextlib.contextmanager
    def _server(self, exports: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, str]]]:
        """A server that holds the models: the embedded one, or a real Ollama to which they are deployed."""
        files = {name: Path(export["modelfile"]) for name, export in exports.items()}
        if url := self.ollama_url:
            from grit_impl.export.deploy import deploy

            names = {name: f"grit-{name}" for name in exports}
            for name in exports:
                self.progress(f"deploying {name}", 0, 1)
                deploy(url, names[name], files[name])
            yield url, names
            return
        from grit_impl.serve.server import EmbeddedOllama

        with EmbeddedOllama(files, port=0) as server:
            yield server.url, {name: name for name in exports}
