"""What a verification trains, exports and evaluates, with stand-ins for the training and the server."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.export import export_merged, write_modelfile
from grit_impl.files import FIXTURES
from grit_impl.record import RunRecord
from grit_impl.serve import completion
from grit_impl.serve.server import EmbeddedOllama
from grit_impl.verify.claims import find
from grit_impl.verify.evidence import products
from grit_impl.verify.evidence.live import LiveEvidence
from grit_impl.verify.evidence.stored import stored_evidence
from grit_impl.verify.options import MODELS, Options
from grit_impl.verify.store.database import Database, Session

ITEMS = aqi.generate(40, seed=5, exclude=aqi.frozen_items())
NEEDS = ["evaluation:baseline", "evaluation:pure", "seeds:baseline", "seeds:pure"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """40 AQI questions as somebody else keeps them."""
    path = tmp_path / "mine.csv"
    lines = [f'"{item["features"]}","{aqi.answer(item)}"' for item in ITEMS]
    path.write_text("\n".join(["text,truth", *lines]))
    return path


@pytest.fixture
def live(tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, fake_ollama) -> Any:
    """Makes evidence whose runs cost nothing; pure knows 30 of the 40 answers, the others 20."""
    place = {aqi.instruction(item): number for number, item in enumerate(ITEMS)}

    def answer(model: str, prompt: str) -> str:
        if prompt not in place or place[prompt] >= (30 if model == "pure" else 20):
            return "no idea"
        return aqi.answer(ITEMS[place[prompt]])

    server = fake_ollama(answer, {f"{name}:latest": name for name in MODELS})
    trained: list[tuple[str, int]] = []

    def runs(self: LiveEvidence, arms, seed: int) -> dict[str, Any]:
        found = {}
        for arm in arms:
            path = self.reports / "runs" / f"{arm}-seed{seed}"
            if not (path / "COMPLETE").exists():
                trained.append((arm, seed))
                record = RunRecord.create(path, arm=arm, seed=seed, started=f"t{seed}", fingerprint=f"{arm}{seed}")
                for step in range(1, 41):
                    record.append_step({"step": step, "loss": 1.0 - 0.01 * (arm == "pure"), "seconds": 0.1})
                record.finish()
            found[arm] = RunRecord(path)
        return found

    def exported(self: LiveEvidence, name: str, record: RunRecord | None) -> dict[str, Any]:
        sha = f"{name}-{record.run['seed']}" if record else name
        return {"sha256": sha, "modelfile": "Modelfile", "path": str(tmp_path / "none.gguf")}

    @contextlib.contextmanager
    def serve(self: LiveEvidence, exports):
        yield server.url, {name: name for name in exports}

    monkeypatch.setattr(LiveEvidence, "_runs", runs)
    monkeypatch.setattr(LiveEvidence, "_exported", exported)
    monkeypatch.setattr(LiveEvidence, "_server", serve)
    mine = {"aqi_dataset": str(questions), "features_field": "text", "answer_field": "truth"}

    def make(**options: Any) -> LiveEvidence:
        return LiveEvidence(Options(**{"reports_dir": tmp_path / "reports", "steps": 40, **mine, **options}))

    make.trained, make.server = trained, server  # type: ignore[attr-defined]
    return make


def test_every_arm_is_run_with_every_seed(live, tmp_path: Path) -> None:
    """Oracle: the table of runs; answers of the other seeds in the database under a name of their own."""
    evidence = live(seeds=3)
    evidence.gather(NEEDS)
    assert set(live.trained) >= {(arm, seed) for arm in ("baseline", "pure") for seed in (3407, 3408, 3409)}
    assert ("hybrid", 3408) not in live.trained, "no claim asked for it"
    assert list(evidence.seeds) == [3407, 3408, 3409]
    assert evidence.seeds[3407].evaluation is evidence.evaluation
    assert len({each.evaluation.path for each in evidence.seeds.values()}) == 3
    assert evidence.evaluation.speed
    assert not evidence.seeds[3408].evaluation.speed
    judged = find("hypotheses.pure-beats-lora").judge(evidence)
    assert judged.metrics[0].estimate == pytest.approx(25)
    assert (judged.verdict, judged.needed) == ("inconclusive", 6), "three seeds cannot decide"
    assert "3 seeds" in find("hypotheses.pure-lower-loss").judge(evidence).summary
    with Database(tmp_path / "results.db") as store:
        store.add(Session("a", "b", None, {}, {}), [], evidence)
        found = {row["model"] for row in store.query("SELECT DISTINCT model FROM items")}
        assert found == {*MODELS, "baseline-seed3408", "pure-seed3408", "baseline-seed3409", "pure-seed3409"}
        assert len(store.query("SELECT * FROM runs")) == 4 + 2 + 2


def test_all_seeds_train_at_once_where_enough_jobs_are_allowed(live, monkeypatch) -> None:
    """Oracle: a barrier that only three seeds' trainings, running at the same time, can pass."""
    original, barrier = LiveEvidence._runs, threading.Barrier(3)

    def runs(self, arms, seed):
        if self.options.jobs:
            barrier.wait(timeout=20)
        return original(self, arms, seed)

    monkeypatch.setattr(LiveEvidence, "_runs", runs)
    evidence = live(seeds=3, jobs=9)
    evidence.gather(NEEDS)
    assert list(evidence.seeds) == [3407, 3408, 3409]


def test_what_is_there_is_not_made_again(live) -> None:
    """Oracle: the server's count of questions and the list of trainings."""
    live(seeds=2).gather(NEEDS)
    trained, asked = len(live.trained), len(live.server.requests)
    live(seeds=2).gather(NEEDS)
    assert (len(live.trained), len(live.server.requests)) == (trained, asked)
    live(seeds=3).gather(NEEDS)
    assert live.trained[trained:] == [("baseline", 3409), ("pure", 3409)]


def test_the_untrained_base_is_asked_once_for_all_seeds(live) -> None:
    """Oracle: the server's requests; the base is the same model with every seed."""

    def asked_of_base() -> int:
        return sum(request["model"].startswith("base") for request in live.server.requests)

    live().gather(NEEDS)
    before = asked_of_base()
    assert before >= 40
    evidence = live(seeds=3)
    evidence.gather(NEEDS)
    assert asked_of_base() == before
    answers = [
        {row["item"]: row["answer"] for row in each.evaluation.answers if row["label"] == "base"}
        for each in evidence.seeds.values()
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) > 40, "about the air, and about knowledge"


def test_a_seed_that_broke_leaves_nothing_to_pair(live, monkeypatch) -> None:
    """Oracle: pure ends with status 1 at the second seed; the hypothesis says so and its test fails."""
    original = LiveEvidence._runs

    def runs(self, arms, seed):
        found = original(self, arms, seed)
        return {**found, "pure": "its process ended with status 1"} if seed == 3408 else found

    monkeypatch.setattr(LiveEvidence, "_runs", runs)
    evidence = live(seeds=3)
    evidence.gather(NEEDS)
    assert not evidence.seeds
    judged = find("hypotheses.pure-beats-lora").judge(evidence)
    assert judged.verdict == "not exercised"
    assert "seed 3408: its process ended with status 1" in judged.summary
    assert judged.evidence["broken"]


def test_questions_of_the_users_own(live) -> None:
    """Oracle: 40 questions of which pure knows 30; scored by the metric that was asked for."""
    evidence = live(aqi_metric="exact")
    evidence.gather(NEEDS)
    assert evidence.evaluation.metrics["pure"].aqi_accuracy.estimate == 75
    assert evidence.evaluation.aqi_metric == "exact"
    assert evidence.evaluation.meta["items"]["aqi"]["n"] == 40


def test_questions_from_the_training_data_are_refused_before_training(live, questions: Path) -> None:
    """Oracle: the third question of seed 3408's training set; nothing is trained."""
    frozen = aqi.frozen_items()
    known = aqi.generate(320, 3408, frozen)[2]
    with questions.open("a") as handle:
        handle.write(f'\n"{known["features"]}","{aqi.answer(known)}"')
    with pytest.raises(GRITError, match=r"1 of 41 questions are in the training data .*--allow-overlap"):
        live(seeds=2).gather(NEEDS)
    assert not live.trained
    evidence = live(seeds=2, allow_overlap=True)
    evidence.gather(NEEDS)
    assert evidence.evaluation.meta["notes"] == ["aqi: 1 questions are also in the training data (allowed)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aqi_dataset": "nowhere.csv"}, "nowhere.csv: there is no such file"),
        ({"features_field": "question"}, "no field 'question' .it has: text, truth."),
        ({"answer_field": "text"}, "'text' is .* which names no air quality index|contradicts|names no"),
    ],
)
def test_unusable_questions_are_found_before_training(live, options: dict[str, str], message: str) -> None:
    """Oracle: the message; nothing is trained."""
    with pytest.raises(GRITError, match=message):
        live(**options).gather(NEEDS)
    assert not live.trained


def test_a_stored_evaluation_is_tied_to_the_exports(live, monkeypatch) -> None:
    """Oracle: the same exports find the evaluation again; another file of pure, or other questions, do not."""
    live().gather(NEEDS)
    asked = len(live.server.requests)
    again = live(reuse_runs=True, aqi_metric="within5")
    again.gather(NEEDS)
    assert again.evaluation.metrics["pure"].aqi_accuracy.estimate == 75
    assert again.evaluation.aqi_metric == "within5"
    # Where another process judged (xdist), and in a report afterwards, the session's metric counts, too.
    found = stored_evidence(again.options, NEEDS, again.evaluation.path)
    assert found.evaluation.aqi_metric == "within5"
    original = LiveEvidence._exported
    monkeypatch.setattr(
        LiveEvidence, "_exported", lambda self, name, record: {**original(self, name, record), "sha256": "other"}
    )
    other = live(reuse_runs=True)
    other.gather(NEEDS)
    assert other.evaluation is None
    assert "of these exports and questions, by this server" in str(other.lacks("evaluation:pure"))
    monkeypatch.setattr(LiveEvidence, "_exported", original)
    elsewhere = live(reuse_runs=True, ollama_url="127.0.0.1:1")
    elsewhere.gather(NEEDS)
    assert "by this server" in str(elsewhere.lacks("evaluation:pure"))
    assert len(live.server.requests) == asked


def test_an_address_without_a_scheme_is_as_good(live, monkeypatch) -> None:
    """Oracle: the evaluation that the same address with its scheme makes, and finds again."""
    address = live.server.url.removeprefix("http://")
    monkeypatch.setenv("OLLAMA_HOST", address)
    evidence = live(ollama_url="")
    evidence.gather(NEEDS)
    assert evidence.evaluation.meta["url"] == evidence.evaluation.meta["inputs"]["url"] == live.server.url
    assert evidence.evaluation.meta["inputs"]["server"] == "Ollama 0.33.0"
    asked = len(live.server.requests)
    again = live(reuse_runs=True, ollama_url=f"http://{address}/")
    again.gather(NEEDS)
    assert again.evaluation is not None
    assert len(live.server.requests) == asked


def test_the_embedded_server_is_asked_beside_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the other one reads questions in capitals: there, and only there, the answers of the sample differ."""
    gguf = export_merged(FIXTURES / "tiny_llama", None, tmp_path / "m.gguf", "q8_0").path
    modelfile = write_modelfile(gguf, tmp_path / "Modelfile")
    few = [replace(suite, items=suite.items[:5]) for suite in products.questions(Options())]
    monkeypatch.setattr(products, "questions", lambda options: few)
    exports = {name: {"sha256": name, "modelfile": str(modelfile), "path": str(gguf)} for name in ("base", "pure")}
    with EmbeddedOllama({}) as server:
        evidence = LiveEvidence(Options(reports_dir=tmp_path / "reports", ollama_url=server.url))
        prompt, served = completion._prompt, server.models

        async def loud(engine: Any, job: Any) -> Any:
            text = await prompt(engine, job)
            return text.upper() if job.kind == "generate" and job.model in served.by_key.values() else text

        monkeypatch.setattr(completion, "_prompt", loud)
        found = evidence._evaluated(exports, speed=False)
    same, other = found.noises().items()
    assert (same[1].asked, same[1].changed) == (20, 0)
    assert (other[0], other[1].asked) == ("the embedded server, 0.33.0+grit", 20)
    assert other[1].changed > 10


def test_what_another_version_answered_is_not_judged_without_a_word(live, monkeypatch) -> None:
    """Oracle: the server's version; and a server that has gone is said to have."""
    noted: list[str | None] = []
    monkeypatch.setattr(LiveEvidence, "_note", lambda self, text: noted.append(text))
    address = live.server.url
    live(ollama_url=address).gather(NEEDS)
    live.server.version = "0.34.0"
    other = live(reuse_runs=True, ollama_url=address)
    other.gather(NEEDS)
    assert other.evaluation is None
    said = "Ollama 0.33.0 answered in the evaluation that is there, and now it would be Ollama 0.34.0"
    assert said in str(other.lacks("evaluation:pure"))
    live.server.close()
    noted.clear()
    gone = live(reuse_runs=True, ollama_url=address)
    gone.gather(NEEDS)
    assert gone.evaluation is not None
    assert noted == [f"{address} does not answer: judged is what Ollama 0.33.0 answered there before"]
