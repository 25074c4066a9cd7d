"""What live evidence is made of: exports, servers that hold them, evaluations; each kept as long as it is current."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.machine import cores, has_gpu, versions
from grit_impl.recipes.bases import BASES, find_base, resolve_base
from grit_impl.recipes.fetch import digest
from grit_impl.recipes.formats import Format, find_format
from grit_impl.record import RunRecord, fingerprint, sha256_file, write_atomic
from grit_impl.runs.execute import Progress, source_fingerprint
from grit_impl.runs.progress import ProgressLine
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.evidence.questions import questions
from grit_impl.verify.evidence.stored import stored_evaluation

if TYPE_CHECKING:
    from grit_impl.evaluate.items import ItemSet
    from grit_impl.evaluate.results import Evaluation


_COUNT_SECONDS = 2.0
_FOR_A_CPU = 2**28
"""Bytes of a model that answers a sample of questions in seconds without a GPU."""
_MOST_THREADS = 4


def no_progress(label: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass
class ProductEvidence(Evidence):
    """Makes exports and evaluations, and finds again what is already there.

    Attributes:
        progress: Told what is going on.
    """

    progress: Progress = no_progress

    @property
    def reports(self) -> Path:
        """The folder of run records and reports."""
        return Path(self.options.reports_dir)

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

    def _evaluated(
        self,
        exports: Mapping[str, Mapping[str, Any]],
        *,
        speed: bool = True,
        only: Callable[[ItemSet], ItemSet] | None = None,
    ) -> Evaluation | str:
        """The evaluation of these models, made now if it is not there, or why there is none.

        Args:
            exports: Their export notes, by name.
            speed: Measure the speed of answers, too.
            only: Takes some of the questions; speed is not measured then.
        """
        from grit_impl.evaluate.asking import EvaluationOptions
        from grit_impl.evaluate.session import evaluate
        from grit_impl.serve.client import server_url

        aqi, knowledge = map(only, questions(self.options)) if only else questions(self.options)
        models = {
            "models": {name: export["sha256"] for name, export in exports.items()},
            "items": [fingerprint(aqi.items), fingerprint(knowledge.items)],
            "url": server_url(self.ollama_url) if self.ollama_url else "",
        }
        if self.options.reuse_runs:
            try:
                server = self._server_version()
            except GRITError:
                server = ""
            found = stored_evaluation(self.reports / "evaluation", self.options.aqi_metric, models, server)
            if not server and not isinstance(found, str):
                answered = found.meta["inputs"]["server"]
                self._note(f"{models['url']} does not answer: judged is what {answered} answered there before")
            return found
        inputs = {
            **models,
            "source": source_fingerprint("evaluate"),
            "versions": versions(),
            "server": self._server_version(),
        }
        out = self.reports / ("preflight" if only else "evaluation") / fingerprint({**inputs, "speed": speed})[:12]
        with self._server(exports) as (url, names), self._beside(exports, names, bool(only)) as beside:
            how = EvaluationOptions(
                aqi_metric=self.options.aqi_metric,
                stop=self.format.stop,
                num_predict=self.format.room,
                # The embedded server holds all models, each with cores of its own; another may hold only one.
                in_flight=2 if self.ollama_url else max(2, min(len(names), cores())),
                in_turn=not self.ollama_url,
                max_speed_loss=self.options.max_speed_loss,
                progress=False,
            )
            if only:
                how = replace(how, speed_rounds=0, repeats=0, attempts=2, give_up_after=2)
            elif not speed:
                how = replace(how, speed_rounds=0)
            label = "asking the untrained base" if only else "evaluating"
            asked = len(names) * (len(aqi.items) + len(knowledge.items))
            self._begin_with_known_answers(out)
            with self._counting(label, out / "answers.jsonl", asked):
                found = evaluate(url, names, aqi, knowledge, out, how, inputs, beside=beside)
        return found

    def _begin_with_known_answers(self, out: Path) -> None:
        """Let another seed's evaluation begin with the first one's answers: those of models it has not, it forgets."""
        known = self.evaluation.path if self.evaluation else None
        if known and not out.exists():
            out.mkdir(parents=True)
            for name in ("answers.jsonl", "again.jsonl"):
                shutil.copyfile(known / name, out / name)

    @contextlib.contextmanager
    def _counting(self, label: str, path: Path, total: int) -> Iterator[None]:
        """Tell progress by the lines of a file, while something else writes it."""
        done = threading.Event()

        def count() -> None:
            while not done.wait(_COUNT_SECONDS):
                with contextlib.suppress(OSError):
                    self.progress(label, min(path.read_bytes().count(b"\n"), total - 1), total)

        counter = threading.Thread(target=count, daemon=True)
        self.progress(label, 0, total)
        counter.start()
        try:
            yield
        finally:
            done.set()
            counter.join()
        self.progress(label, total, total)

    def _note(self, text: str | None) -> None:
        if text and isinstance(self.progress, ProgressLine):
            self.progress.note(text)

    # Serving

    @property
    def ollama_url(self) -> str:
        """The Ollama that was asked for; empty for the embedded server."""
        return self.options.ollama_url or os.environ.get("OLLAMA_HOST", "")

    def _server_version(self) -> str:
        """What will answer: another version may answer otherwise."""
        from grit_impl.serve.client import Endpoint
        from grit_impl.serve.versions import IMITATED

        if not self.ollama_url:
            return f"embedded {IMITATED}, llama.cpp of xllamacpp {versions().get('xllamacpp', 'none')}"
        with Endpoint(self.ollama_url) as endpoint:
            return f"Ollama {endpoint.version()}"

    @contextlib.contextmanager
    def _beside(
        self, exports: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], skip: bool
    ) -> Iterator[str | None]:
        """The embedded server with the same models beside another one, where they are small enough for a CPU."""
        files = {name: Path(export["path"]) for name, export in exports.items()}
        sizes = [path.stat().st_size for path in files.values() if path.is_file()]
        if skip or not self.ollama_url or len(sizes) < len(files) or max(sizes) > _FOR_A_CPU:
            yield None
            return
        from grit_impl.serve.server import EmbeddedOllama

        with EmbeddedOllama({names[name]: exports[name]["modelfile"] for name in exports}, most=1) as server:
            yield server.url

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

        # Every model has cores of its own, also where two seeds are asked at the same time. How many threads there are
        # changed no answer (docs/evaluation.md); more than four gain little on models that fit a CPU.
        together = len(files) * max(1, self.options.seeds - 1)
        threads = max(1, min(_MOST_THREADS, cores() // together))
        with EmbeddedOllama(files, port=0, threads=threads) as server:
            yield server.url, {name: name for name in exports}
