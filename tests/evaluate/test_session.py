"""Whole evaluations of a scripted server whose every accuracy is known in advance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from grit_impl import aqi
from grit_impl.errors import GRITError
from grit_impl.evaluate.asking import EvaluationOptions
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.session import evaluate

N, KNOWN = 60, 20
QUICK = EvaluationOptions(progress=False, backoff=0.001, speed_rounds=7, in_flight=4, repeats=0)
MODELS = {"base": "base", "baseline": "baseline", "pure": "pure"}
RIGHT = {"base": 15, "baseline": 45, "pure": 51}
"""AQI items that each model gets right: the first so many."""
KNOWS = {"base": 18, "baseline": 16, "pure": 9}
RATE = {"base": 100.0, "baseline": 98.0, "pure": 80.0}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """60 AQI questions and 20 about general knowledge."""
    questions, facts = tmp_path / "aqi.jsonl", tmp_path / "facts.jsonl"
    questions.write_text("".join(json.dumps(item) + "\n" for item in aqi.generate(N, seed=1)))
    rows = [{"id": f"f{i}", "question": f"What is fact {i}?", "answer": f"thing {i}"} for i in range(KNOWN)]
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions, facts


@pytest.fixture
def server(fake_ollama):
    """Answers the first RIGHT[model] items rightly, KNOWS[model] facts, the rest wrongly in parsable ways."""
    items = aqi.generate(N, seed=1)
    position = {aqi.instruction(item): i for i, item in enumerate(items)}

    def answer(model: str, prompt: str) -> str:
        if prompt in position:
            item = items[position[prompt]]
            if position[prompt] < RIGHT[model]:
                return aqi.answer(item)
            return "AQI 25 (Good)" if item["category"] != "Good" else "AQI 350 (Hazardous)"
        number = int(prompt.removeprefix("What is fact ").removesuffix("?"))
        return f"thing {number}" if number < KNOWS[model] else "no idea"

    return fake_ollama(answer, {f"{name}:latest": f"digest-{name}" for name in MODELS}, RATE.__getitem__)


def test_metrics_of_a_known_server(server, files, tmp_path: Path) -> None:
    """Oracle: the tables RIGHT, KNOWS and RATE; differences by hand."""
    evaluation = evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    assert evaluation.complete
    for label, metrics in evaluation.metrics.items():
        assert metrics.aqi_accuracy.estimate == pytest.approx(100 * RIGHT[label] / N)
        assert metrics.aqi_accuracy.low < metrics.aqi_accuracy.estimate < metrics.aqi_accuracy.high
        assert metrics.exact.estimate == pytest.approx(metrics.category.estimate)
        assert metrics.knowledge.estimate == pytest.approx(100 * KNOWS[label] / KNOWN)
        assert metrics.retention.estimate == pytest.approx(100 * KNOWS[label] / KNOWS["base"])
        assert metrics.tokens_per_second.estimate == pytest.approx(RATE[label], rel=1e-6)
        assert (metrics.unanswered, metrics.unparsable, metrics.faults) == ((), {}, {})
    base, baseline, pure = evaluation.metrics.values()
    assert base.delta_aqi is base.delta_speed is base.delta_over_baseline is None
    assert baseline.delta_aqi.estimate == pytest.approx(50)
    assert (baseline.delta_aqi.gained, baseline.delta_aqi.lost) == (30, 0)
    assert baseline.delta_aqi.p == pytest.approx(2 * 0.5**30)
    assert pure.delta_aqi.p_holm >= pure.delta_aqi.p
    assert pure.delta_over_baseline.estimate == pytest.approx(10)
    assert pure.delta_over_baseline.p == pytest.approx(2 * 0.5**6)
    assert pure.delta_speed.estimate == pytest.approx(-20, abs=1e-3)
    assert pure.delta_speed_absolute.estimate == pytest.approx(-20, abs=1e-3)
    assert evaluation.winner()[0] == "pure"


def test_the_servers_version_counts(server, files, tmp_path: Path) -> None:
    """Oracle: the version that the server says: what it does otherwise is noted, and another one is asked again."""
    quick = replace(QUICK, speed_rounds=0)
    assert evaluate(server.url, MODELS, *files, tmp_path / "out", quick).meta["notes"] == []
    asked = len(server.requests)
    evaluate(server.url, MODELS, *files, tmp_path / "out", quick)
    assert len(server.requests) == asked
    server.version = "0.12.0"
    old = evaluate(server.url, MODELS, *files, tmp_path / "out", quick)
    assert len(server.requests) == 2 * asked
    assert old.meta["server_version"] == "0.12.0"
    assert [note.split(" ", 2)[2][:20] for note in old.meta["notes"]] == [
        "gives no log-probabi",
        "computes with an eng",
    ]
    with pytest.raises(GRITError, match=r"Ollama 0.12.0 gives no log-probabilities, .*: use a newer one"):
        evaluate(server.url, MODELS, *files, tmp_path / "out", replace(quick, knowledge_by="likelihood"))


def test_a_stored_evaluation_says_the_same(server, files, tmp_path: Path) -> None:
    """Oracle: the evaluation in memory; and the stored answers can be judged by another metric."""
    evaluation = evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    loaded = Evaluation.load(tmp_path / "out")
    assert loaded.metrics == evaluation.metrics
    assert loaded.meta == json.loads(json.dumps(evaluation.meta))
    assert Evaluation.load(tmp_path / "out", "exact").aqi_metric == "exact"
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["metrics"]["pure"]["delta_aqi"]["difference"]["estimate"] == pytest.approx(60)
    row = evaluation.rows("pure")[aqi.generate(1, seed=1)[0]["id"]]
    assert {"prompt", "answer", "correct", "scores", "eval_count", "eval_duration", "seconds"} <= row.keys()


def test_tables_by_group(server, files, tmp_path: Path) -> None:
    """Oracle: counting the generated items; the groups of a table add up to the whole."""
    evaluation = evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    items = aqi.generate(N, seed=1)
    for by in ("category", "pollutant"):
        rows = [row for row in evaluation.table(by) if row["label"] == "pure"]
        assert {row["group"]: row["n"] for row in rows} == {
            group: sum(item[by] == group for item in items) for group in {item[by] for item in items}
        }
        assert sum(row["correct"] for row in rows) == RIGHT["pure"]


def test_an_interrupted_evaluation_resumes_at_the_item(server, files, tmp_path: Path) -> None:
    """Oracle: the server's own count of requests; every (model, question) is asked exactly once over both runs."""
    out = tmp_path / "out"
    asked = len(server.requests)
    original = server.reply

    def dying(request):
        if len(server.requests) > 70:
            raise ConnectionAbortedError
        return original(request)

    server.reply = dying
    patient = EvaluationOptions(progress=False, backoff=0.001, speed_rounds=0, in_flight=4, attempts=1, give_up_after=5)
    broken = evaluate(server.url, MODELS, *files, out, patient)
    assert not broken.complete
    with (out / "answers.jsonl").open("a") as handle:
        handle.write('{"label": "base", "suite": "aq')
    done = len([line for line in (out / "answers.jsonl").read_text().splitlines() if line.endswith("}")])
    assert 60 <= done <= 71
    server.reply, asked = original, len(server.requests)
    again = evaluate(server.url, MODELS, *files, out, QUICK)
    questions = [r for r in server.requests[asked:] if r["options"]["temperature"] == 0]
    assert len(questions) == 3 * (N + KNOWN) - done
    assert again.complete
    assert again.metrics["pure"].aqi_accuracy.estimate == pytest.approx(100 * RIGHT["pure"] / N)
    asked = len(server.requests)
    assert evaluate(server.url, MODELS, *files, out, QUICK).metrics == again.metrics
    assert len(server.requests) == asked, "a finished evaluation asks nothing"


def test_a_changed_model_is_asked_again(server, files, tmp_path: Path) -> None:
    """Oracle: the digest is the model's identity; the others' answers stay."""
    evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    asked = len(server.requests)
    server.models["pure:latest"] = "digest-new"
    evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    again = [request for request in server.requests[asked:] if request["options"]["temperature"] == 0]
    assert [request["model"] for request in again] == ["pure"] * (N + KNOWN)


def test_speed_on_another_prompt_is_measured_again(server, files, tmp_path: Path) -> None:
    """Oracle: the server's count of samples; the first question is the prompt of all of them."""
    evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    lines = files[0].read_text().splitlines()
    files[0].write_text("\n".join([*lines[1:], lines[0]]))
    asked = len(server.requests)
    again = evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    assert {request["options"]["temperature"] for request in server.requests[asked:]} == {100.0}
    assert len(server.requests) - asked >= len(again.speed) > 0


def test_a_model_replaced_meanwhile_is_refused(server, files, tmp_path: Path) -> None:
    """Oracle: answers of two different models under one name are no measurement."""
    original = server.reply

    def swap(request):
        server.models["pure:latest"] = "digest-new"
        return original(request)

    server.reply = swap
    with pytest.raises(GRITError, match="replaced during the evaluation"):
        evaluate(server.url, MODELS, *files, tmp_path / "out", QUICK)
    with pytest.raises(GRITError, match="no finished evaluation"):
        Evaluation.load(tmp_path / "out")


def test_a_dead_server_ends_the_evaluation_and_names_the_items(server, files, tmp_path: Path, chaos) -> None:
    """Oracle: after 5 items without an answer the rest is not asked; each item is answered, failed, or not asked."""
    proxy = chaos(server.url, lambda n: "reset" if n >= 30 else None)
    options = EvaluationOptions(progress=False, backoff=0.001, attempts=2, give_up_after=5, speed_rounds=5)
    evaluation = evaluate(proxy.url, MODELS, *files, tmp_path / "out", options)
    assert not evaluation.complete
    assert len(evaluation.answers) == 3 * (N + KNOWN)
    assert evaluation.metrics["base"].unanswered[0].startswith("aqi/aqi-1-")
    assert len(evaluation.metrics["pure"].unanswered) == N + KNOWN
    assert evaluation.metrics["pure"].aqi_accuracy is None
    assert evaluation.winner()[0] is None
    assert proxy.requests < 60
    assert Evaluation.load(tmp_path / "out").metrics == evaluation.metrics


def test_requests_in_flight_are_bounded(server, files, tmp_path: Path) -> None:
    """Oracle: the server's own maximum of simultaneous requests."""
    server.delay = 0.005
    evaluate(
        server.url, MODELS, *files, tmp_path / "out", EvaluationOptions(progress=False, in_flight=3, speed_rounds=0)
    )
    assert server.most_active == 3


def test_unparsable_answers_are_wrong_and_counted(fake_ollama, files, tmp_path: Path) -> None:
    """Oracle: a server that says nothing useful, in three known ways."""
    said = ["Sorry?", "good or moderate", "I am unable to say"]
    server = fake_ollama(lambda model, prompt: said[len(prompt) % 3])
    models = {"base": "base", "baseline": "baseline"}
    metrics = evaluate(server.url, models, files[0], None, tmp_path / "out", QUICK).metrics["base"]
    assert metrics.aqi_accuracy.estimate == 0
    assert set(metrics.unparsable) == {"no answer", "several categories", "refusal"}
    assert sum(metrics.unparsable.values()) == N
    assert metrics.knowledge is None
    assert metrics.retention is None


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "no models"),
        ({"pure": "pure"}, "no model is labelled 'base'"),
        ({"base": "nobody"}, "model 'nobody' is not on"),
    ],
)
def test_impossible_evaluations_are_one_line(server, files, tmp_path: Path, models, message: str) -> None:
    """Oracle: the message; and nothing is written."""
    with pytest.raises(GRITError, match=message):
        evaluate(server.url, models, *files, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_options_are_checked() -> None:
    """Oracle: the message names the option."""
    for bad in (
        {"aqi_metric": "mae"},
        {"knowledge_scorer": "x"},
        {"in_flight": 0},
        {"speed_tokens": 1},
        {"timeout": 0},
    ):
        with pytest.raises(GRITError, match=next(iter(bad)).split("_")[-1]):
            EvaluationOptions(**bad)


def test_damaged_files_are_named(server, files, tmp_path: Path) -> None:
    """Oracle: the file and the line that was damaged."""
    out = tmp_path / "out"
    evaluate(server.url, MODELS, *files, out, QUICK)
    good = (out / "answers.jsonl").read_text().splitlines()
    (out / "answers.jsonl").write_text("\n".join([*good[:2], "{oops", *good[3:]]) + "\n")
    with pytest.raises(GRITError, match=r"answers\.jsonl, line 3"):
        Evaluation.load(out)
    with pytest.raises(GRITError, match=r"answers\.jsonl, line 3"):
        evaluate(server.url, MODELS, *files, out, QUICK)
    (out / "evaluation.json").write_text("{")
    with pytest.raises(GRITError, match=r"evaluation\.json cannot be read"):
        Evaluation.load(out)


def test_how_a_model_is_asked(server, files, tmp_path: Path) -> None:
    """Oracle: every request says so; asking otherwise asks anew."""
    options = replace(QUICK, speed_rounds=0, system="Be brief.", think=False, num_predict=77)
    evaluate(server.url, {"base": "base"}, *files, tmp_path / "out", options)
    asked = [(each["system"], each["think"], each["options"]["num_predict"]) for each in server.requests]
    assert asked == [("Be brief.", False, 77)] * (N + KNOWN)
    evaluate(server.url, {"base": "base"}, *files, tmp_path / "out", replace(options, system="Be long."))
    assert len(server.requests) == 2 * (N + KNOWN)


def test_the_first_answers_are_seen_first_and_kept(server, files, tmp_path: Path) -> None:
    """Oracle: the base's first ten AQI questions, and no question is asked twice."""
    seen: list[str] = []

    def preview(rows: list[dict[str, object]]) -> None:
        seen.extend(str(row["item"]) for row in rows)
        assert len(server.requests) == len(rows) == 10

    evaluate(server.url, MODELS, *files, tmp_path / "out", replace(QUICK, speed_rounds=0), preview=preview)
    assert seen == [item["id"] for item in aqi.generate(N, seed=1)][:10]
    assert len(server.requests) == len(MODELS) * (N + KNOWN)
