"""Evaluate models behind Ollama's API: ask everything once, keep every answer, resume after an interruption.

The instruction is sent as `prompt`, so that the model's own template is exercised, greedily (temperature 0), with
`truncate: false`. Answers go to `answers.jsonl` as they arrive; a later call with the same models (by digest),
questions and options asks only what is missing. An item that no attempt could answer makes the evaluation incomplete
and is named; it is never scored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from grit_impl.errors import GRITError
from grit_impl.evaluate import noise, speed
from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.items import ItemSet, load_aqi, load_knowledge
from grit_impl.evaluate.likelihood import likeliest
from grit_impl.evaluate.results import SCORE_FIELD, Evaluation, appending, as_line, read_lines
from grit_impl.evaluate.scoring import score, score_aqi, truths_of
from grit_impl.record import fingerprint, write_atomic
from grit_impl.serve.client import Endpoint, Unanswered
from grit_impl.serve.openai_client import open_endpoint
from grit_impl.serve.versions import called, exact, quirks, require

logger = logging.getLogger(__name__)
Row = dict[str, Any]
FIRST = 10
"""Questions that the base is asked before the full run."""
SWEEPS = 2
"""Unanswered items are asked once more at the end: a server that was restarting has had its time."""


def evaluate(
    url: str | None,
    models: Mapping[str, str],
    aqi_items: ItemSet | Path | str,
    knowledge_items: ItemSet | Path | str | None,
    out: Path | str,
    options: EvaluationOptions | None = None,
    inputs: Mapping[str, Any] | None = None,
    preview: Callable[[list[Row]], None] | None = None,
    beside: str | None = None,
) -> Evaluation:
    """Ask all models all questions, a sample of them twice, measure their speed, and store all in `out`.

    Args:
        url: The server, or None for OLLAMA_HOST.
        models: Name on the server by label; `options.base` is the label of the reference.
        aqi_items: Questions about the air quality index, or their file.
        knowledge_items: Questions about general knowledge, or their file, or None.
        out: Folder; an interrupted evaluation in it is continued.
        options: How to ask.
        inputs: What the models were made from, to be stored with the answers.
        preview: Given the base's rows of the first questions, before the others are asked.
        beside: Another server with models of the same names, which is asked the sample, too.

    Returns:
        The evaluation; `complete` is False if some items have no trustworthy answer.

    Raises:
        GRITError: no server, a missing model, unusable questions, a full disk, or a model that changed meanwhile.
    """
    options = options or EvaluationOptions()
    if not models:
        raise GRITError("no models to evaluate")
    if options.base not in models:
        raise GRITError(f"no model is labelled {options.base!r}: delta_AQI needs the base (have: {', '.join(models)})")
    suites = {"aqi": aqi_items if isinstance(aqi_items, ItemSet) else load_aqi(aqi_items)}
    if (facts := knowledge_items) is not None:
        suites["knowledge"] = facts if isinstance(facts, ItemSet) else load_knowledge(facts)
    folder, started = Path(out), datetime.now(UTC).isoformat(timespec="seconds")
    how = {"timeout": options.timeout, "attempts": options.attempts, "backoff": options.backoff}
    beside_it = noise.open_beside(beside, list(models.values()), **how)
    with open_endpoint(url, **how, connections=options.in_flight + 1) as endpoint, beside_it as other:
        version = endpoint.version()
        if knowledge_items is not None and options.knowledge_by == "likelihood":
            require(version, "schema", "logprobs")
        digests = endpoint.require(list(models.values()))
        manner = f"can think before it answers: asked {'' if options.think else 'not '}to"
        notes = [*quirks(version), *(f"{name} {manner}" for name in endpoint.find_thinking(models.values()))]
        for note in notes:
            logger.warning("%s", note)
        asked = [version, options.greedy(), options.fields(), options.knowledge_by]
        keys = {label: fingerprint([name, digests[name], *asked])[:16] for label, name in models.items()}
        session = _Session(endpoint, dict(models), suites, keys, folder, options)
        if preview is not None and (first := session.first()):
            preview(first)
        session.ask()
        notes += session.ask_again(endpoint)
        notes += session.ask_again(other, called(other.url, other.version())) if other else []
        session.measure()
        if endpoint.require(list(models.values())) != digests:
            raise GRITError(f"a model on {endpoint.url} was replaced during the evaluation: run it again")
        meta = {
            "url": endpoint.url,
            "server_version": version,
            "exact": exact(version),
            "digests": digests,
            "keys": keys,
            "inputs": dict(inputs or {}),
            "options": asdict(options),
            "speed": {"looks": options.schedule.looks, "ended": session.ended},
            "details": {label: endpoint.details(name) for label, name in models.items()},
            "items": {name: {"source": suite.source, "n": len(suite.items)} for name, suite in suites.items()},
            "notes": [*notes, *(f"{name}: {note}" for name, suite in suites.items() for note in suite.notes)],
            "started": started,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    evaluation = Evaluation(
        models,
        [*session.answers.values(), *session.failures.values()],
        session.speed,
        meta,
        base=options.base,
        baseline=options.baseline,
        aqi_metric=options.metric,
        path=folder,
        again=session.again,
    )
    evaluation.save()
    return evaluation


class _Session:
    """The state of one run: what is answered, what failed, and the files behind it."""

    def __init__(
        self,
        endpoint: Endpoint,
        models: dict[str, str],
        suites: Mapping[str, ItemSet],
        keys: Mapping[str, str],
        folder: Path,
        options: EvaluationOptions,
    ) -> None:
        self.endpoint, self.models, self.keys, self.folder, self.options = endpoint, models, keys, folder, options
        asked = [(name, item) for name, suite in suites.items() for item in suite.items]
        order = ((label, *each) for each in asked for label in models)
        if not options.in_turn:
            order = ((label, *each) for label in models for each in asked)
        self.tasks = {(label, name, item["id"]): item for label, name, item in order}
        self.speed_prompt = suites["aqi"].items[0]["prompt"]
        self.answers: dict[tuple[str, str, str], Row] = {}
        self.failures: dict[tuple[str, str, str], Row] = {}
        self.again: list[Row] = []
        self.speed: list[Row] = []
        self.ended = ""
        self._resume()

    def _resume(self) -> None:
        """Take over earlier answers to the same questions by the same models, scored afresh; forget the others."""
        for name in ("answers.jsonl", noise.FILE):
            for row in read_lines(self.folder / name, missing=True):
                task = (row["label"], row.get("suite", ""), row.get("item", ""))
                item = self.tasks.get(task)
                if not item or row.get("key") != self.keys[row["label"]] or row.get("prompt") != item["prompt"]:
                    continue
                scored = {**row, **self._scored(task, item, row)}
                if name == noise.FILE:
                    self.again.append(scored)
                else:
                    self.answers[task] = scored
        self.speed = [
            row
            for row in read_lines(self.folder / "speed.jsonl", missing=True)
            if row.get("key") == self._speed_key(row["label"])
            and row["round"] < max(self.options.schedule.looks, default=0)
        ]
        # A stale verdict must not outlive the answers it was made from.
        (self.folder / "evaluation.json").unlink(missing_ok=True)
        write_atomic(self.folder / "answers.jsonl", "".join(map(as_line, self.answers.values())))
        write_atomic(self.folder / noise.FILE, "".join(map(as_line, self.again)))
        write_atomic(self.folder / "speed.jsonl", "".join(map(as_line, self.speed)))

    def _speed_key(self, label: str) -> str:
        key = self.keys.get(self.options.base if label == speed.CLONE else label)
        return fingerprint([key, self.options.speed_tokens, self.speed_prompt, speed.EPOCH])[:16]

    def _scored(self, task: tuple[str, str, str], item: Row, row: Row) -> Row:
        answer = row["answer"]
        if task[1] == "aqi" and self.options.scorer == "aqi":
            scores = score_aqi(item, answer)
            groups = {"true_category": item.get("category"), "pollutant": item.get("pollutant")}
            return {"correct": scores[SCORE_FIELD[self.options.aqi_metric]], "scores": scores, **groups}
        if "likelihoods" in row:
            scores = {"correct": answer in truths_of(item), "unparsable": False, "note": ""}
        else:
            scores = score(self.options.scorer if task[1] == "aqi" else self.options.knowledge_scorer, item, answer)
        return {"correct": scores["correct"], "scores": scores}

    # -- questions ----------------------------------------------------------------------------------------------------

    def first(self) -> list[Row]:
        """The base's rows of the first questions, asked now; they are kept like all others."""
        tasks = [task for task in self.tasks if task[:2] == (self.options.base, "aqi")][:FIRST]
        missing = [task for task in tasks if task not in self.answers]
        with appending(self.folder / "answers.jsonl") as write, tqdm(disable=True) as bar:
            self._sweep(missing, write, bar, last=False)
        return [self.answers[task] for task in tasks if task in self.answers]

    def ask(self) -> None:
        """Ask what is missing, at most `in_flight` at a time, and once more what failed."""
        with (
            appending(self.folder / "answers.jsonl") as write,
            tqdm(
                total=len(self.tasks), initial=len(self.answers), unit="item", disable=not self.options.progress
            ) as bar,
        ):
            for sweep in range(SWEEPS):
                missing = [task for task in self.tasks if task not in self.answers]
                if not missing or not self._sweep(missing, write, bar, last=sweep == SWEEPS - 1):
                    break

    def _sweep(self, missing: list[tuple[str, str, str]], write: Callable[[Row], None], bar: Any, last: bool) -> bool:
        """One pass over these items; False if the server stopped answering altogether."""
        failed_in_a_row = 0
        queue: Iterator[tuple[str, str, str]] = iter(missing)
        pool = ThreadPoolExecutor(self.options.in_flight)
        try:
            running = {pool.submit(self._one, task): task for task in islice(queue, self.options.in_flight)}
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    task = running.pop(future)
                    row = future.result()
                    if row.get("error"):
                        self.failures[task] = row
                        failed_in_a_row += 1
                    else:
                        write(row)
                        self.answers[task] = row
                        self.failures.pop(task, None)
                        failed_in_a_row = 0
                        bar.update()
                    bar.set_description(f"evaluate {task[0]}", refresh=False)
                    if failed_in_a_row < self.options.give_up_after and (following := next(queue, None)):
                        running[pool.submit(self._one, following)] = following
        finally:
            pool.shutdown(cancel_futures=True)
        if failed_in_a_row < self.options.give_up_after:
            return True
        for task in queue:
            self.failures[task] = self._row(task, error="not asked: the server stopped answering", faults=[])
        return False

    def ask_again(self, endpoint: Endpoint, beside: str = "") -> list[str]:
        """A sample once more, one at a time, of the same server or of the one `beside` it; notes on what failed."""
        failed: list[str] = []
        done = {(row["label"], row["suite"], row["item"]) for row in self.again if row["beside"] == beside}
        with appending(self.folder / noise.FILE) as write:
            drawn = noise.sample(self.answers, self.options.repeats, self.options.seed)
            for task in (each for each in drawn if each not in done and len(failed) <= noise.MOST_FAILURES):
                row = {**self._one(task, endpoint), "beside": beside}
                if "error" in row:
                    failed.append(row["error"])
                    continue
                said = self.answers[task]["answer"], row["answer"]
                if said[0] != said[1] and "likelihoods" not in row:
                    row["lead"] = noise.lead_at_parting(self.endpoint, self._request(task), *said)
                write(row)
                self.again.append(row)
        return [f"{len(failed)} questions got no second answer {beside}, e.g. because: {failed[0]}"] if failed else []

    def _request(self, task: tuple[str, str, str]) -> Row:
        """A question as `Endpoint.generate` takes it."""
        how = {"options": self.options.greedy(), "stream": self.options.stream, **self.options.fields()}
        return {"model": self.models[task[0]], "prompt": self.tasks[task]["prompt"], **how}

    def _one(self, task: tuple[str, str, str], other: Endpoint | None = None) -> Row:
        item, model, endpoint = self.tasks[task], self.models[task[0]], other or self.endpoint
        try:
            if task[1] == "knowledge" and self.options.knowledge_by == "likelihood":
                texts, how = [*truths_of(item), *item["wrong"]], self.options.engine()
                chosen, found = likeliest(endpoint, model, item["prompt"], texts, how, **self.options.fields())
                row: Row = {"answer": chosen, "likelihoods": found, "faults": []}
            else:
                reply = endpoint.generate(**self._request(task))
                said = {name: value for name, value in asdict(reply).items() if name not in ("text", "logprobs")}
                row = {"answer": reply.text, **said}
        except Unanswered as error:
            return self._row(task, error=str(error), faults=error.faults)
        return self._row(task, **row, **self._scored(task, item, row))

    def _row(self, task: tuple[str, str, str], **values: Any) -> Row:
        label, suite, item = task
        return {
            "label": label,
            "model": self.models[label],
            "suite": suite,
            "item": item,
            "key": self.keys[label],
            "prompt": self.tasks[task]["prompt"],
            **values,
        }

    # -- speed --------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Speed samples that are missing; none from a server that has stopped answering."""
        silent = any(str(row["error"]).startswith("not asked") for row in self.failures.values())
        if silent or not self.endpoint.counts_time:
            return
        schedule = self.options.schedule
        targets = [look * (len(self.models) + 1) for look in schedule.looks]
        with (
            speed.copy_of(self.endpoint, self.models[self.options.base] if targets else "") as copy,
            appending(self.folder / "speed.jsonl") as write,
            tqdm(
                total=next((target for target in targets if target > len(self.speed)), 0),
                initial=len(self.speed),
                unit="sample",
                desc="measure speed",
                disable=not self.options.progress or not targets,
            ) as bar,
        ):

            def keep(row: Row) -> None:
                write({**row, "key": self._speed_key(row["label"])})
                # A look that does not end it sets the next mark.
                bar.total = next((target for target in targets if target > bar.n), bar.total)
                bar.update()

            self.speed, self.ended = speed.measure(
                self.endpoint,
                {**self.models, **copy},
                self.speed_prompt,
                base=self.options.base,
                schedule=schedule,
                tokens=self.options.speed_tokens,
                options=self.options.engine(),
                seed=self.options.seed,
                earlier=self.speed,
                keep=keep,
            )
