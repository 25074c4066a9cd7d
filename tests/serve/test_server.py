"""The embedded server driven by Ollama's own clients; what Ollama answers, row by row, is in `conformance.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ollama
import pytest
import tiny
from conformance import GREEDY, RENDERED, C, P, send

from grit_impl.errors import GRITError
from grit_impl.export import export_adapter, export_merged, write_modelfile
from grit_impl.export.deploy import delete, deploy
from grit_impl.serve.server import EmbeddedOllama


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random Llama as GGUF (f16, which Ollama can quantise), its adapter, and Modelfiles."""
    root = tmp_path_factory.mktemp("served")
    base = tiny.make_base(root / "base")
    model = export_merged(base, None, root / "m.gguf", "f16")
    lora = tiny.make_adapter(base, root / "lora")
    adapter = export_adapter(base, lora, root / "lora.gguf")
    modelfile = write_modelfile(model.path, root / "Modelfile", stop=model.stops)
    with_adapter = write_modelfile(model.path, root / "Modelfile.lora", stop=model.stops, adapter=adapter.path)
    return SimpleNamespace(
        root=root, base=base, gguf=model.path, adapter=adapter.path, modelfile=modelfile, with_adapter=with_adapter
    )


@pytest.fixture(scope="module")
def server(lab: SimpleNamespace) -> Iterator[EmbeddedOllama]:
    """The embedded server with one model under the name `grit-test`."""
    with EmbeddedOllama({"grit-test": lab.modelfile}) as running:
        yield running


def test_stream_and_whole_answer_agree(server: EmbeddedOllama) -> None:
    """Oracle: the answer in one piece."""
    whole = send(server.url, "POST", "/api/generate", P).json()
    lines = [json.loads(x) for x in send(server.url, "POST", "/api/generate", {**P, "stream": True}).text.splitlines()]
    assert "".join(line["response"] for line in lines) == whole["response"]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["context"] == whole["context"]
    assert lines[-1]["eval_count"] == whole["eval_count"] == 8
    assert all(isinstance(lines[-1][f"{x}_duration"], int) for x in ("total", "eval", "prompt_eval"))


def test_prompt_tokens_are_hugging_faces(server: EmbeddedOllama, lab: SimpleNamespace) -> None:
    """Oracle: the HF tokenizer's count of the training format, BOS included."""
    from transformers import AutoTokenizer

    reply = send(server.url, "POST", "/api/generate", P).json()
    assert reply["prompt_eval_count"] == len(AutoTokenizer.from_pretrained(lab.base)(RENDERED).input_ids)


def test_seed_and_temperature(server: EmbeddedOllama) -> None:
    """Oracle: equal seeds give equal answers, another seed or temperature 0 another."""

    def say(**options: Any) -> str:
        body = {**P, "options": {**GREEDY, **options}}
        return str(send(server.url, "POST", "/api/generate", body).json()["response"])

    hot = say(temperature=1.5, seed=7)
    assert hot == say(temperature=1.5, seed=7)
    assert len({hot, say(temperature=1.5, seed=8), say()}) == 3
    assert say(temperature=1.5, seed=8, top_k=1) == say()
    assert say(temperature=1.5, seed=8, min_p=1.0) == say()


def test_stop_ends_the_answer(server: EmbeddedOllama) -> None:
    """Oracle: the same answer without stop, cut before the stop text."""
    free = send(server.url, "POST", "/api/generate", P).json()["response"]
    stop = free[len(free) // 2 :][:3]
    reply = send(server.url, "POST", "/api/generate", {**P, "options": {**GREEDY, "stop": [stop, ""]}}).json()
    assert reply["response"] == free[: free.index(stop)]
    assert reply["done_reason"] == "stop"


def test_context_continues_a_conversation(server: EmbeddedOllama) -> None:
    """Oracle: with the tokens of the first answer in front, the prompt is longer by exactly them."""
    first = send(server.url, "POST", "/api/generate", P).json()
    second = {**P, "prompt": "again", "context": first["context"], "options": {**GREEDY, "num_ctx": 2048}}
    alone = {**P, "prompt": "again", "options": {**GREEDY, "num_ctx": 2048}}
    longer, shorter = (send(server.url, "POST", "/api/generate", body).json() for body in (second, alone))
    assert abs(longer["prompt_eval_count"] - shorter["prompt_eval_count"] - len(first["context"])) <= 1


def test_format_constrains_the_answer(server: EmbeddedOllama) -> None:
    """Oracle: a JSON parser. Random weights never write JSON by themselves."""
    properties = {"ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["ok"], "additionalProperties": False}
    body = {**C, "format": schema, "options": {**GREEDY, "num_predict": 40}}
    answer = json.loads(send(server.url, "POST", "/api/chat", body).json()["message"]["content"])
    assert isinstance(answer["ok"], bool)
    assert send(server.url, "POST", "/api/chat", {**C, "format": "yaml"}).status_code == 500


def test_ps_and_keep_alive(server: EmbeddedOllama) -> None:
    """Oracle: a loaded model is listed until it is unloaded."""
    client = ollama.Client(server.url)
    client.generate("grit-test", "hello", options=GREEDY, keep_alive=-1)
    assert [m.model for m in client.ps().models] == ["grit-test:latest"]
    assert client.generate("grit-test", "", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []


def test_ollama_client_creates_from_an_uploaded_blob(lab: SimpleNamespace) -> None:
    """Oracle: the PyPI client, unmodified: upload, create, list, show, generate, chat, stream, copy, delete, errors."""
    with EmbeddedOllama({}) as server:
        client = ollama.Client(server.url)
        assert client.list().models == []
        digest = client.create_blob(lab.gguf)
        assert digest == f"sha256:{hashlib.sha256(lab.gguf.read_bytes()).hexdigest()}"
        adapter = client.create_blob(lab.adapter)
        done = client.create(
            "mine:v1",
            files={"m.gguf": digest},
            adapters={"a.gguf": adapter},
            template="{{ .Prompt }}",
            parameters={"stop": ["x"]},
        )
        assert done.status == "success"
        assert [m.model for m in client.list().models] == ["mine:v1"]
        shown = client.show("mine:v1")
        assert shown.template == "{{ .Prompt }}"
        assert shown.capabilities == ["completion"]
        text = client.generate("mine:v1", "the air", options=GREEDY).response
        parts = [part.response for part in client.generate("mine:v1", "the air", options=GREEDY, stream=True)]
        assert "".join(parts) == text
        assert client.chat("mine:v1", [{"role": "user", "content": "the air"}], options=GREEDY).message.content == text
        small = client.create("small", from_="mine:v1", quantize="q8_0")
        assert small.status == "success"
        assert client.show("small").details.quantization_level == "Q8_0"
        client.copy("small", "other")
        client.delete("small")
        assert sorted(str(m.model) for m in client.list().models) == ["mine:v1", "other:latest"]
        with pytest.raises(ollama.ResponseError, match="not found") as caught:
            client.generate("small", "x")
        assert caught.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="not found"):
            list(client.create("broken", files={"m.gguf": f"sha256:{'1' * 64}"}, stream=True))


def test_langchain_drives_it(server: EmbeddedOllama) -> None:
    """Oracle: langchain-ollama, unmodified, validating the model first."""
    from langchain_ollama import ChatOllama, OllamaLLM

    options: dict[str, Any] = {"base_url": server.url, "temperature": 0, "seed": 1, "num_predict": 8, "num_ctx": 512}
    chat = ChatOllama(model="grit-test", validate_model_on_init=True, **options)
    text = chat.invoke("the air").content
    assert text == send(server.url, "POST", "/api/chat", C).json()["message"]["content"]
    assert "".join(str(part.content) for part in chat.stream("the air")) == text
    assert OllamaLLM(model="grit-test", **options).invoke("the air")
    with pytest.raises(ValueError, match="absent"):
        ChatOllama(model="absent", validate_model_on_init=True, base_url=server.url)


def test_deploy_uploads_once_and_checks_what_arrived(lab: SimpleNamespace) -> None:
    """Oracle: the server's own list, and the bytes sent the second time (none)."""
    with EmbeddedOllama({}) as server:
        seen: list[tuple[str, int, int]] = []
        first = deploy(server.url, "tuned", lab.with_adapter, progress=lambda *step: seen.append(step))
        assert first.uploaded == lab.gguf.stat().st_size + lab.adapter.stat().st_size
        assert {name for name, _, _ in seen} == {"m.gguf", "lora.gguf"}
        assert first.statuses[-1] == "success"
        assert first.warnings == []
        again = deploy(server.url, "tuned", lab.modelfile, quantize="q8_0")
        assert again.uploaded == 0
        assert again.quantization == "Q8_0"
        delete(server.url, "tuned")
        with pytest.raises(GRITError, match="404"):
            delete(server.url, "tuned")
        with pytest.raises(GRITError, match="unsupported quantization"):
            deploy(server.url, "tuned", lab.modelfile, quantize="q3_X")
    with pytest.raises(GRITError, match=r"no Ollama at|cannot upload"):
        deploy(server.url, "tuned", lab.modelfile, attempts=1)


@pytest.mark.parametrize("flaw", ["stream error", "other template", "no success"])
def test_deploy_notices_a_server_that_errs(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, flaw: str) -> None:
    """Oracle: the planted flaw; all three come with HTTP 200."""
    from grit_impl.serve.models import Models
    from grit_impl.serve.wire import APIError

    create = Models.create

    def broken(self: Models, name: Any, request: dict[str, Any]) -> Iterator[str]:
        if flaw == "stream error":
            yield "parsing GGUF"
            raise APIError(500, "disk on fire")
        if flaw == "other template":
            yield from create(self, name, {**request, "template": "<|user|>{{ .Prompt }}"})
        else:
            yield from (status for status in create(self, name, request) if status != "success")

    monkeypatch.setattr(Models, "create", broken)
    expected = {"stream error": "disk on fire", "other template": "chat-template", "no success": "without success"}
    with EmbeddedOllama({}) as server, pytest.raises(GRITError, match=expected[flaw]):
        deploy(server.url, "tuned", lab.modelfile)
