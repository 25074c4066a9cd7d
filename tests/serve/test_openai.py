"""OpenAI's API on the embedded server: the real `openai` client, and log-likelihoods as transformers computes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from grit_impl.serve.server import EmbeddedOllama

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "tiny_llama"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
TEXT = "The capital of France is Paris."
TOLERANCE = 2e-2
"""Nats per token. llama.cpp keeps keys and values as float16: 25 tokens differed by 0.005 at most."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedOllama]:
    """The pretrained tiny base in float32, behind the Alpaca template."""
    from grit_impl.export import export_merged, write_modelfile

    folder = tmp_path_factory.mktemp("openai")
    made = export_merged(TINY, None, folder / "tiny.gguf", "f32")
    with EmbeddedOllama({"tiny": write_modelfile(made.path, folder / "Modelfile", stop=made.stops)}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: EmbeddedOllama) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def transformers_logprobs(ids: list[int]) -> list[float]:
    """Log-probability of every token but the first, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(table[place, token]) for place, token in enumerate(ids[1:])]


def tokens_of(text: str, special: bool = True) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(TINY)(text, add_special_tokens=special).input_ids)


def native(server: EmbeddedOllama, path: str, **body: Any) -> dict[str, Any]:
    """Ollama's own endpoint, asked the same greedy question."""
    options = {"temperature": 0, "top_p": 1.0, "num_predict": GREEDY["max_tokens"]}
    asked = {"model": "tiny", "stream": False, "options": options, **body}
    return dict(httpx.post(server.url + path, json=asked, timeout=60, trust_env=False).json())


def test_models(client: openai.OpenAI) -> None:
    """Oracle: the name that was registered."""
    assert [model.id for model in client.models.list()] == ["tiny:latest"]
    assert client.models.retrieve("tiny").owned_by == "library"
    with pytest.raises(openai.NotFoundError, match="model 'absent' not found") as caught:
        client.models.retrieve("absent")
    assert caught.value.type == "not_found_error"


def test_chat(client: openai.OpenAI, server: EmbeddedOllama) -> None:
    """Oracle: /api/chat: the same words whole and in parts, the same counts and log-probabilities."""
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 2 + 2?"}]
    theirs = native(server, "/api/chat", messages=messages, logprobs=True, top_logprobs=2)
    reply = client.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, top_logprobs=2, temperature=0, max_completion_tokens=12
    )
    choice = reply.choices[0]
    assert choice.message.content == theirs["message"]["content"]
    assert (choice.message.role, choice.finish_reason) == ("assistant", theirs["done_reason"])
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
        theirs["prompt_eval_count"],
        theirs["eval_count"],
    )
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [(e.token, e.logprob) for e in choice.logprobs.content] == [
        (e["token"], e["logprob"]) for e in theirs["logprobs"]
    ]
    assert all(len(each.top_logprobs) == 2 for each in choice.logprobs.content)

    parts = list(
        client.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    said = [part.choices[0].delta for part in parts if part.choices]
    assert "".join(delta.content or "" for delta in said) == choice.message.content
    assert [delta.role for delta in said] == ["assistant"] + [None] * (len(said) - 1)
    assert parts[-2].choices[0].finish_reason == choice.finish_reason
    assert parts[-1].usage == reply.usage


def test_chat_in_a_schema(client: openai.OpenAI) -> None:
    """Oracle: a JSON parser."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    asked: Any = [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}]
    reply = client.chat.completions.create(
        model="tiny", messages=asked, response_format=form, temperature=0, max_tokens=20
    )
    assert isinstance(json.loads(reply.choices[0].message.content or ""), bool)


def test_completions(client: openai.OpenAI, server: EmbeddedOllama) -> None:
    """Oracle: /api/generate in raw mode; as text, as ids, several at once, and in parts."""
    theirs = native(server, "/api/generate", prompt=TEXT, raw=True)["response"]
    ids: Any = tokens_of(TEXT)
    for prompt in (TEXT, ids):
        assert client.completions.create(model="tiny", prompt=prompt, **GREEDY).choices[0].text == theirs
    both = client.completions.create(model="tiny", prompt=[ids, tokens_of("What is")], **GREEDY)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == theirs
    assert both.usage is not None
    assert both.usage.prompt_tokens == len(ids) + len(tokens_of("What is"))
    parts = client.completions.create(model="tiny", prompt=TEXT, stream=True, echo=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == TEXT + theirs


@pytest.mark.parametrize("form", ["text", "ids", "an end within"])
def test_log_likelihoods_of_the_prompt(client: openai.OpenAI, form: str) -> None:
    """Oracle: transformers. A text's tokens are told without the BOS token that the model puts in front."""
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(TINY).eos_token_id
    ids = tokens_of(TEXT)
    if form == "an end within":
        ids = [*ids, end, *ids[1:]]
    prompt: Any = TEXT if form == "text" else ids
    told = client.completions.create(
        model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0
    ).choices[0]
    found = told.logprobs
    assert found is not None
    assert found.token_logprobs is not None
    expected = transformers_logprobs(ids)
    # What lm-evaluation-harness does: the last token is the generated one.
    values = found.token_logprobs[:-1] if form == "text" else found.token_logprobs[1:-1]
    assert values == pytest.approx(expected, abs=TOLERANCE)
    assert found.tokens is not None
    if form != "an end within":
        assert "".join(found.tokens[:-1]).endswith(TEXT)
        assert TEXT in told.text
    # Greedy or not is read off the likeliest token of each place.
    assert found.top_logprobs is not None
    best = [max(each.values()) for each in found.top_logprobs if each]
    assert all(top >= own for top, own in zip(best, [x for x in found.token_logprobs if x is not None], strict=True))


def test_only_the_prompt(client: openai.OpenAI) -> None:
    """Oracle: with no tokens asked for, the prompt comes back alone."""
    told = client.completions.create(model="tiny", prompt=TEXT, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert told.text == TEXT
    assert told.logprobs is not None
    assert len(told.logprobs.tokens or []) == len(tokens_of(TEXT)) - 1


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/chat/completions", {"model": "absent", "messages": [{"role": "user", "content": "x"}]}, 404, "not_found"),
        ("/chat/completions", {"model": "tiny", "messages": []}, 400, "invalid_request"),
        ("/chat/completions", {"model": "tiny", "messages": "x"}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, 400, "invalid_request"),
        (
            "/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "reasoning_effort": "high"},
            400,
            "invalid_request",
        ),
        (
            "/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "invalid_request",
        ),
        ("/completions", {"model": "tiny", "prompt": ""}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": ["a", ""]}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": [1, "x"]}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": [10**6]}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": "x", "n": 2}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": "x", "stop": [1]}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": "x", "temperature": "hot"}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": "x", "max_tokens": 0}, 400, "invalid_request"),
        ("/completions", {"model": "tiny", "prompt": "x " * 9000, "echo": True}, 400, "invalid_request"),
        ("/completions", b"{", 400, "invalid_request"),
    ],
)
def test_errors_have_openais_form(server: EmbeddedOllama, path: str, body: Any, status: int, kind: str) -> None:
    """Oracle: status and type as OpenAI documents them, each with one line of text."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(f"{server.url}/v1{path}", content=content, timeout=60, trust_env=False)
    assert reply.status_code == status, reply.text
    told = reply.json()["error"]
    assert told["type"] == f"{kind}_error"
    assert told["message"]
    assert "\n" not in told["message"]
    assert set(told) == {"message", "type", "param", "code"}


def test_an_evaluation_over_openais_api(server: EmbeddedOllama, tmp_path: Path) -> None:
    """Oracle: the same evaluation over Ollama's API: equal answers and counts; only speed is not measured."""
    from grit_impl.evaluate.asking import EvaluationOptions
    from grit_impl.evaluate.items import load_aqi, load_knowledge
    from grit_impl.evaluate.session import evaluate

    aqi = load_aqi(FIXTURES / "aqi_test.jsonl", limit=8)
    facts = load_knowledge(FIXTURES / "knowledge_test.jsonl", limit=8)
    options = EvaluationOptions(progress=False, speed_rounds=1, system="Be short.")
    found = [
        evaluate(server.url + tail, {"base": "tiny"}, aqi, facts, tmp_path / str(n), options)
        for n, tail in enumerate(("", "/v1"))
    ]
    for suite in ("aqi", "knowledge"):
        fields = ("answer", "done_reason", "prompt_eval_count", "eval_count")
        told = [
            {item: [row[field] for field in fields] for item, row in each.rows("base", suite).items()} for each in found
        ]
        assert told[0] == told[1]
        assert len(told[0]) == 8
    assert found[1].complete
    assert [bool(each.speed) for each in found] == [True, False]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ({"choices": []}, "not-json"),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}, "incomplete"),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}, "trunc"),
        ({"error": {"message": "no"}}, "streamed-error"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, "empty"),
    ],
)
def test_what_is_no_answer_over_openais_api(monkeypatch: pytest.MonkeyPatch, reply: Any, kind: str) -> None:
    """Oracle: the planted reply; it becomes a fault, never an answer."""
    from grit_impl.serve.client import Unanswered
    from grit_impl.serve.openai_client import OpenAIEndpoint

    monkeypatch.setattr(OpenAIEndpoint, "_send", lambda *_: json.dumps(reply).encode())
    with OpenAIEndpoint("http://127.0.0.1:1/v1", attempts=1) as endpoint, pytest.raises(Unanswered) as caught:
        endpoint.generate("m", "two words", {"num_predict": 5})
    assert caught.value.faults[0].startswith(kind)


@pytest.mark.nightly
def test_lm_evaluation_harness(server: EmbeddedOllama, tmp_path: Path) -> None:
    """Oracle: transformers' log-likelihoods of the same tokens, and the `openai` client's greedy answers."""
    pytest.importorskip("lm_eval", reason="needs lm_eval[api]; found none")
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    facts = [json.loads(line) for line in (FIXTURES / "knowledge_test.jsonl").read_text().splitlines()[:8]]
    answers = [fact["answer"] for fact in facts]
    rows = [{"q": fact["question"], "choices": answers[:4], "gold": i % 4} for i, fact in enumerate(facts)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "facts.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choose: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    say: dict[str, Any] = {"output_type": "generate_until", "doc_to_target": "gold", "generation_kwargs": {"until": [
        "\n"], "max_gen_toks": 8}}  # fmt: skip
    tasks = [ConfigurableTask(config={"task": name, **shared, **how}) for name, how in (("c", choose), ("s", say))]
    arguments = {"model": "tiny", "base_url": f"{server.url}/v1/completions", "tokenizer": str(TINY)}
    found = simple_evaluate(
        model="local-completions",
        model_args={**arguments, "tokenizer_backend": "huggingface", "num_concurrent": 1},
        tasks=tasks,
    )
    for sample in found["samples"]["c"]:
        for choice, (value, greedy) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            ids = tokens_of(f"{sample['doc']['q']} {choice}", special=False)
            own = transformers_logprobs(ids)[len(tokens_of(sample["doc"]["q"], special=False)) - 1 :]
            assert value == pytest.approx(sum(own), abs=len(own) * TOLERANCE)
            assert not greedy or value > -5 * len(own)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for sample in found["samples"]["s"]:
        prompt: Any = tokens_of(sample["doc"]["q"], special=False)
        told = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=8, stop=["\n"])
        assert sample["resps"][0][0].strip() == told.choices[0].text.strip()
