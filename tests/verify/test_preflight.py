"""What a session will need later is tried before anything is trained: each failure is one line, and nothing is left."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grit_impl.errors import GRITError
from grit_impl.evaluate.items import ItemSet
from grit_impl.evaluate.results import Evaluation
from grit_impl.machine import available_memory
from grit_impl.recipes.arms import RunSpec, TrainingSettings
from grit_impl.recipes.bases import TINY
from grit_impl.record import RunRecord
from grit_impl.runs.execute import with_tokens
from grit_impl.verify.evidence import live, preflight, products
from grit_impl.verify.evidence.live import LiveEvidence
from grit_impl.verify.evidence.questions import spread
from grit_impl.verify.options import Options

NEEDS = ["evaluation:pure", "record:pure"]
STEP = preflight.Rehearsal(seconds=2.0, start=20.0, peak=3 << 30, total=None, heavier=2.0, adapter=1 << 20)
ONCE = TrainingSettings(steps=2, batch_size=2, accumulation=1, max_length=256)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the tiny base, to be damaged."""
    return shutil.copytree(TINY, tmp_path / "base")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a session that must not come as far as training."""

    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("training was begun")

    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.setattr(live, "run_arms", train)

    def make(**options: Any) -> LiveEvidence:
        return LiveEvidence(Options(**{"reports_dir": tmp_path / "reports", "steps": 2, **options}))

    return make


@pytest.mark.slow
def test_a_base_that_works_is_trained(session: Any) -> None:
    """Oracle: the tiny base; without this the other tests would show nothing. It is tried once."""
    evidence = session()
    for _ in range(2):
        with pytest.raises(AssertionError, match="training was begun"):
            evidence.gather(NEEDS)
    assert evidence._tried


def test_a_base_that_cannot_be_exported_is_refused(session: Any, base: Path) -> None:
    """Oracle: a tokenizer that llama.cpp has no name for."""
    content = json.loads((base / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(GRITError, match=r"untrained base cannot be exported, so nothing is trained: .*Whitespace"):
        session(base_model=str(base)).gather(NEEDS)


@pytest.mark.slow
def test_an_export_that_is_another_model_is_refused(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the last bytes of the file, weights of the last layer's norm, are zeroed after it was written."""
    import grit_impl.export as room

    real = room.export_merged

    def damaged(base: Path, adapter: Path | None, out: Path, *rest: Any) -> Any:
        made = real(base, adapter, out, *rest)
        data = out.read_bytes()
        out.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
        return made

    monkeypatch.setattr(room, "export_merged", damaged, raising=False)
    with pytest.raises(GRITError, match="export of the untrained base is not the base, so nothing is") as caught:
        session().gather(NEEDS)
    assert "\n" not in str(caught.value)


def test_an_export_too_large_to_verify_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 1 MB of q8_0 are 4 MB of float32, and the file itself is mapped: 6 MB with what is computed."""
    (tmp_path / "model.gguf").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(preflight, "available_memory", lambda: 5 << 20)
    note = {"path": str(tmp_path / "model.gguf"), "modelfile": ""}
    assert "is not verified: that needs" in str(preflight.require_export(TINY, note, "", lambda *_: None))


@pytest.mark.slow
def test_a_base_that_cannot_answer_is_refused(session: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: all logits are equal, so that one token is repeated until the server gives up, as Ollama does."""
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros_like(weights["model.norm.weight"])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(preflight, "require_export", lambda *_: None)
    with pytest.raises(GRITError, match=r"does not answer, so nothing is trained: .*repeat limit"):
        session(base_model=str(base)).gather(NEEDS)


def test_a_full_disk_is_found_first(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 100 MB are free."""
    usage = shutil.disk_usage("/")._replace(free=100_000_000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(GRITError, match=r"disk: runs and exports need about 0\.2 GiB, 0\.1 GiB are free in .*reports"):
        session().gather(NEEDS)


@pytest.mark.slow
def test_nothing_is_tried_where_nothing_is_trained(session: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Oracle: the runs are there already, or only stored ones are judged."""
    monkeypatch.setattr(products.ProductEvidence, "_exported", lambda *_: pytest.fail("it was tried"))
    evidence = session(reuse_runs=True).gather(["record:pure"])
    assert "reuse-runs trains none" in evidence.lacks("record:pure")


@pytest.mark.parametrize(
    ("together", "total", "free", "message"),
    [
        (2, None, 7 << 30, None),
        (2, None, 5 << 30, r"2 arms at the same time need 6\.0 GiB, 5\.0 GiB are free: use --jobs 1"),
        (1, None, 2 << 30, r"1 arm at the same time need 3\.0 GiB, 2\.0 GiB are free: use a smaller"),
        (2, 5 << 30, 99 << 30, r"5\.0 GiB the GPU has"),
        (2, 7 << 30, 0, None),
        (9, None, None, None),
    ],
)
def test_memory(monkeypatch: Any, together: int, total: int | None, free: int | None, message: str | None) -> None:
    """Oracle: what one arm took, times the arms; where the machine does not tell, nothing is refused."""
    monkeypatch.setattr(preflight, "available_memory", lambda: free)
    step = preflight.Rehearsal(2.0, 0.0, 3 << 30, total, 2.0, 0)
    if message is None:
        preflight.require_memory(step, together)
        return
    with pytest.raises(GRITError, match=message):
        preflight.require_memory(step, together)


def test_the_machine_tells_what_is_free() -> None:
    """Oracle: psutil, within what other processes do meanwhile; a container's own limit may lie below."""
    psutil = pytest.importorskip("psutil")
    found = available_memory()
    assert found is not None
    assert 0 < found <= 1.1 * psutil.virtual_memory().available


class TestRehearsal:
    """A real step of the longest rows."""

    def spec(self, folder: Path, **changes: Any) -> RunSpec:
        return with_tokens(RunSpec(**{"arm": "pure", "training": ONCE, "grit": {}, **changes}), folder)

    @pytest.mark.slow
    def test_it_is_a_step_of_the_longest_rows(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Oracle: the lengths in the session's tokens; a Python with torch is above 100 MB; no run is left."""
        monkeypatch.setattr(preflight, "SMALL", 0)
        spec = self.spec(tmp_path)
        rows = json.loads((tmp_path / ".tokens" / f"{spec.tokens}.json").read_text())["input_ids"]
        lengths = sorted(map(len, rows))
        found = preflight.rehearse([spec], tmp_path, tmp_path / "trial", lambda *_: None)
        assert found is not None
        assert found.heavier == pytest.approx(sum(lengths[-2:]) / 2 / (sum(lengths) / 4))
        assert found.peak > 100 << 20
        assert found.adapter > 100_000
        assert 0 < found.seconds < 60
        assert [each.name for each in (tmp_path / "trial").iterdir()] == ["took.json"]

        def train(*_: Any, **__: Any) -> None:
            raise AssertionError("an interrupted session tries the same step once")

        monkeypatch.setattr(preflight, "run_arms", train)
        assert preflight.rehearse([spec], tmp_path, tmp_path / "trial", lambda *_: None) == found
        with pytest.raises(AssertionError, match="once"):
            preflight.rehearse([self.spec(tmp_path, seed=7)], tmp_path, tmp_path / "trial", lambda *_: None)

    @pytest.mark.slow
    def test_a_step_that_fails_is_told(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Oracle: an optimizer that does not exist."""
        monkeypatch.setattr(preflight, "SMALL", 0)
        wrong = TrainingSettings(steps=2, batch_size=2, accumulation=1, optimizer="adamw_apex_fused")
        spec = self.spec(tmp_path, training=wrong)
        with pytest.raises(GRITError, match="pure cannot make a single step of the longest rows, so nothing"):
            preflight.rehearse([spec], tmp_path, tmp_path / "trial", lambda *_: None)

    def test_a_small_base_needs_none(self, tmp_path: Path) -> None:
        """Oracle: no process is started."""
        assert preflight.rehearse([self.spec(tmp_path)], tmp_path, tmp_path / "trial", lambda *_: None) is None

    def test_what_lies_ahead_is_counted(self) -> None:
        """Oracle: by hand. (3 x 200 steps of 1 s + 3 x 20 s) x 3 seeds / 2 at a time; 240 x 4 s x 3 / 2 at a time."""
        said = preflight.minutes(STEP, [RunSpec("pure")] * 3, 2, 3, 4.0, 240)
        assert said == "about 16 min of training and at most 24 min of questions lie ahead"
        assert preflight.minutes(None, [RunSpec("pure")], 1, 1, 1.0, 240) is None


@pytest.mark.parametrize(("n", "kept"), [(None, 10), (20, 10), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (1, [0])])
def test_fewer_questions_come_from_all_over_the_set(n: int | None, kept: Any) -> None:
    """Oracle: places by hand; a set that is sorted by its answers is not asked for one answer only."""
    items = ItemSet("aqi", [{"id": i} for i in range(10)], "")
    found = [item["id"] for item in spread(items, n).items]
    assert found == (list(range(10)) if kept == 10 else kept)


def test_a_base_says_how_much_is_asked_of_it(monkeypatch: Any) -> None:
    """Oracle: what is registered; what was asked for counts more, and a GPU has time for all."""
    monkeypatch.setattr("grit_impl.verify.options.has_gpu", lambda: False)
    assert (Options().steps, Options().limit) == (200, None)
    small = Options(base_model="smollm2")
    assert (small.steps, small.limit) == (60, 100)
    assert Options.parse({"base_model": "smollm2", "steps": "7", "limit": "9"}).to_dict()["limit"] == 9
    monkeypatch.setattr("grit_impl.verify.options.has_gpu", lambda: True)
    large = Options(base_model="smollm2")
    assert (large.steps, large.limit) == (200, None)


def test_questions_that_fail_are_told() -> None:
    """Oracle: a request's error, and ten empty answers."""
    row = {"label": "base", "suite": "aqi", "item": "1", "prompt": "?"}
    with pytest.raises(GRITError, match="does not answer, so nothing is trained: connection refused"):
        preflight.require_answers(Evaluation({"base": "base"}, [{**row, "error": "connection refused"}], [], {}))
    with pytest.raises(GRITError, match="answers nothing to 1 questions"):
        preflight.require_answers(Evaluation({"base": "base"}, [{**row, "answer": " "}], [], {}))
    answered = [{**row, "answer": "x", "seconds": seconds} for seconds in (1.0, 3.0)]
    assert preflight.require_answers(Evaluation({"base": "base"}, answered, [], {})) == 2.0


def test_seeds_begin_in_turn_and_end_together(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the script: one seed fails, the others would train for a minute; no two may begin at once."""
    inside: list[int] = []

    def alone(*_: Any) -> None:
        inside.append(1)
        time.sleep(0.05)
        assert len(inside) == 1, "two threads import and try at the same time"
        inside.pop()

    def train(specs: list[Any], *_: Any, progress: Any, **__: Any) -> dict[str, str]:
        if specs[0].seed == seeds[1]:
            raise GRITError("this seed cannot be trained")
        for step in range(600):
            progress("training", step, 600)
            time.sleep(0.1)
        return {spec.arm: "never stopped" for spec in specs}

    evidence = session(seeds=3, jobs=24)
    seeds = list(evidence._all_seeds)
    monkeypatch.setattr(live, "run_arms", train)
    monkeypatch.setattr(live, "with_tokens", lambda spec, _: spec)
    monkeypatch.setattr(LiveEvidence, "_preflight", alone)
    began = time.monotonic()
    with pytest.raises(GRITError, match="this seed cannot be trained"):
        evidence.gather(["seeds:baseline", "seeds:pure"])
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ({"sha256": "0"}, {"seeds": "seed 3407: no evaluation"}),
        ("no such shape", {"export:base": "no such shape", "seeds": "seed 3407: no evaluation"}),
    ],
    ids=["base", "no base"],
)
def test_seeds_are_exported_in_turn_and_evaluated_together(
    session: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Any, why: dict[str, str]
) -> None:
    """Oracle: the script: no two exports at once; an evaluation waits until another one has begun, too."""
    inside: list[str] = []
    both = threading.Barrier(2)

    def export(self: Any, name: str, record: Any) -> Any:
        inside.append(name)
        time.sleep(0.02)
        assert inside == [name], "two threads build models at the same time"
        inside.pop()
        return {"sha256": f"{name} {record.path}"} if record else base

    def evaluated(self: Any, exports: Any, *, speed: bool = True, only: Any = None) -> str:
        if not speed:
            both.wait(timeout=20)
        return f"{len(exports)} models"

    def train(specs: list[Any], *_: Any, **__: Any) -> dict[str, RunRecord]:
        return {spec.arm: RunRecord(tmp_path / f"{spec.arm}-{spec.seed}") for spec in specs}

    monkeypatch.setattr(live, "run_arms", train)
    monkeypatch.setattr(live, "with_tokens", lambda spec, _: spec)
    monkeypatch.setattr(live, "cores", lambda: 8)
    monkeypatch.setattr(RunRecord, "diverged", None)
    monkeypatch.setattr(LiveEvidence, "_preflight", lambda *_: None)
    monkeypatch.setattr(LiveEvidence, "_exported", export)
    monkeypatch.setattr(LiveEvidence, "_evaluated", evaluated)
    evidence = session(seeds=3, jobs=24).gather(["seeds:baseline", "seeds:pure"])
    assert evidence.failed == why
