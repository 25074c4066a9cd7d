"""Live evidence: trains, exports and evaluates what a claim requires, and finds again what is already there.

Nothing is done twice: a run record, an export and an evaluation are reused if they were made from the same inputs
by the same code, and only a finished one counts. Several processes (pytest-xdist) take turns through a lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.machine import has_gpu, versions
from grit_impl.recipes.arms import ARMS, RunSpec, default_training, find_arm, grit_options
from grit_impl.record import RunRecord, fingerprint, sha256_file, write_atomic
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.execute import Progress, finished, run_arms, source_fingerprint
from grit_impl.verify.options import PLAN_MODELS

# owner/name, as the hub spells it.
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
FIXTURES = Path(__file__).parent.parent.parent / "fixtures"


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
    config: GRITConfig = field(default_factory=lambda: GRITConfig.preset("recommended"))

    def __post_init__(self) -> None:
        self.records, self.verdicts, self.exports, self.missing, self.failed = {}, {}, {}, {}, {}

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
        self._refuse_early(evaluate)
        with self._lock():
            self._train([name for name in ARMS if name in arms])
            for name in [name for name in PLAN_MODELS if name in models]:
                self._export(name)
            if evaluate and self.evaluation is None and "evaluation" not in self.missing:
                self._evaluate()
        return self

    def _refuse_early(self, evaluate: bool) -> None:
        """Find bad input before minutes of training.

        Raises:
            GRITError: no such base model, or an Ollama that does not answer.
        """
        name = self.options.base_model
        if not (name == "tiny" or name.startswith("random:") or Path(name).is_dir() or HUB_ID.fullmatch(name)):
            raise GRITError(f"unknown base model {name!r}: give tiny, random:llama-1b, a model folder or a hub id")
        if evaluate and self.ollama_url and self.evaluation is None and not self.options.reuse_runs:
            from grit_impl.evaluate.client import Endpoint

            with Endpoint(self.ollama_url) as endpoint:
                endpoint.version()

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

    def _specs(self, arms: Iterable[str]) -> list[RunSpec]:
        options, base = self.options, self._prepare_base()
        training = default_training(options.base_model, cuda=has_gpu(), steps=options.steps)
        return [
            RunSpec(
                arm=name,
                base_model=base,
                seed=options.seed,
                training=training,
                grit=grit_options(find_arm(name), self.config),
            )
            for name in arms
        ]

    def _train(self, arms: list[str]) -> None:
        todo = [name for name in arms if name not in {**self.records, **self.missing, **self.failed}]
        if not todo:
            return
        specs = self._specs(todo)
        folder = self.reports / "runs"
        if self.options.reuse_runs:
            found: dict[str, RunRecord | str] = {}
            for spec in specs:
                record = finished(folder / f"{spec.arm}-seed{spec.seed}", None)
                found[spec.arm] = record or f"no finished run in {folder}, and --reuse-runs trains none"
            self.missing = {**self.missing, **{name: r for name, r in found.items() if isinstance(r, str)}}
        else:
            # One at a time where they would share a GPU; else one per core, for a run of one thread each.
            jobs = 1 if has_gpu() else max(1, min(2, os.cpu_count() or 1))
            found = run_arms(specs, folder, jobs=jobs, progress=self.progress)
        for name, result in found.items():
            if isinstance(result, str):
                if name not in self.missing:
                    self.failed = {**self.failed, name: result}
                continue
            self.records = {**self.records, name: result}
            self._judge(name, result)

    def _judge(self, name: str, record: RunRecord) -> None:
        from grit_impl.verify.verdict import judge_ledger

        if not record.ledger.is_file():
            self.missing = {**self.missing, f"verdict:{name}": f"{record.path} has no gradient ledger"}
            return
        self.verdicts = {**self.verdicts, name: judge_ledger(record)}

    # Export

    @property
    def base(self) -> Path | str:
        """The base model's folder or hub id; on a GPU random shapes get a folder, which Unsloth can load."""
        name = self.options.base_model
        if name == "tiny":
            return FIXTURES / "tiny_llama"
        if name.startswith("random:"):
            return self.reports / "bases" / name.removeprefix("random:") if has_gpu() else name
        return Path(name) if Path(name).is_dir() else name

    def _prepare_base(self) -> str:
        """What the arms load as their base model."""
        base = self.base
        if self.options.base_model.startswith("random:") and isinstance(base, Path) and not base.is_dir():
            self.progress(f"making {self.options.base_model}", 0, 1)
            command = [sys.executable, "-m", "grit_impl.recipes.random_base", self.options.base_model, str(base)]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise GRITError((made.stderr.strip().splitlines() or ["no message"])[-1])
        return self.options.base_model if self.options.base_model == "tiny" else str(base)

    def _export(self, name: str) -> None:
        key = f"export:{name}"
        if name in self.exports or key in self.missing or key in self.failed:
            return
        record = self.records.get(name)
        if name != "base" and record is None:
            return  # why is known under the arm's name
        base = self.base
        if not Path(base).is_dir():
            reason = f"{base} is not a folder: export it with `grit export` where its weights are"
            self.missing = {**self.missing, key: reason}
            return
        from grit_impl.export import export_merged, write_modelfile

        folder = record.gguf if record is not None else self.reports / "runs" / "base" / "gguf"
        adapter = record.adapter if record is not None else None
        inputs = fingerprint(
            {
                "base": [sha256_file(f) for f in sorted(Path(base).glob("*.safetensors"))],
                "adapter": sha256_file(adapter / "adapter_model.safetensors") if adapter else None,
                "source": source_fingerprint("export"),
            }
        )
        note, gguf, modelfile = folder / "export.json", folder / "model-q8_0.gguf", folder / "Modelfile"
        reuse = self.options.reuse_runs
        there = note.is_file() and gguf.is_file()
        if not there or not (reuse or json.loads(note.read_text()).get("inputs") == inputs):
            if reuse:
                self.missing = {**self.missing, key: f"no export in {folder}, and --reuse-runs makes none"}
                return
            folder.mkdir(parents=True, exist_ok=True)
            try:
                export = export_merged(
                    base, adapter, gguf, "q8_0", lambda done, total, _: self.progress(f"exporting {name}", done, total)
                )
            except GRITError as error:  # a finding about this arm; the others go on
                self.failed = {**self.failed, key: str(error)}
                return
            write_modelfile(gguf, modelfile, stop=export.stops or ("<|end_of_text|>",))
            # Written last: its presence says that the rest is whole.
            write_atomic(
                note, json.dumps({"inputs": inputs, **export.as_dict(), "modelfile": str(modelfile)}, indent=2)
            )
        self.exports = {**self.exports, name: json.loads(note.read_text())}

    # Evaluation

    def _evaluate(self) -> None:
        absent = [name for name in PLAN_MODELS if name not in self.exports]
        if "base" in absent or len(absent) == len(PLAN_MODELS):
            self.missing = {**self.missing, "evaluation": f"nothing to evaluate: no export of {', '.join(absent)}"}
            return
        if self.options.reuse_runs:
            from grit_impl.evaluate.results import Evaluation

            done = list((self.reports / "evaluation").glob("*/evaluation.json"))
            if done:
                self.evaluation = Evaluation.load(max(done, key=lambda path: path.stat().st_mtime).parent)
            else:
                self.missing = {**self.missing, "evaluation": "no finished evaluation, and --reuse-runs makes none"}
            return
        from grit_impl.evaluate.session import EvaluationOptions, evaluate

        models = [name for name in PLAN_MODELS if name in self.exports]
        items, knowledge = FIXTURES / "aqi_test.jsonl", FIXTURES / "knowledge_test.jsonl"
        inputs = fingerprint(
            {
                "models": {name: self.exports[name]["sha256"] for name in models},
                "items": [sha256_file(items), sha256_file(knowledge)],
                "source": source_fingerprint("evaluate"),
                "versions": versions(),
                "url": self.ollama_url,
            }
        )
        out = self.reports / "evaluation" / inputs[:12]
        with self._server(models) as (url, names):
            # On a terminal it shows bars of its own; a log gets one line when it is done.
            how = EvaluationOptions(progress=sys.stderr.isatty())
            self.progress("evaluating", 0, 1)
            self.evaluation = evaluate(url, names, items, knowledge, out, how)
            self.progress("evaluating", 1, 1)

    @property
    def ollama_url(self) -> str:
        """The Ollama that was asked for; empty for the embedded server."""
        return self.options.ollama_url or os.environ.get("OLLAMA_HOST", "")

    @contextlib.contextmanager
    def _server(self, models: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
        """A server that holds the models: the embedded one, or a real Ollama to which they are deployed."""
        files = {name: Path(self.exports[name]["modelfile"]) for name in models}
        if url := self.ollama_url:
            from grit_impl.export.deploy import deploy

            names = {name: f"grit-{name}" for name in models}
            for name in models:
                self.progress(f"deploying {name}", 0, 1)
                deploy(url, names[name], files[name])
            yield url, names
            return
        from grit_impl.evaluate.server import EmbeddedOllama

        with EmbeddedOllama(files, port=0) as server:
            yield server.url, {name: name for name in models}
