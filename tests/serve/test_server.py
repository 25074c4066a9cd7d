"""The embedded server against Ollama's documented and observed behaviour, and driven by Ollama's own clients.

The same cases run against a real Ollama with `--ollama-url` (or OLLAMA_HOST); differences are listed in
`reports/conformance.md`. Oracles: answers read off an Ollama 0.33 server, Ollama's API documentation, the PyPI clients.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import ollama
import pytest
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_adapter, export_merged, write_modelfile
from grit_impl.export.deploy import delete, deploy
from grit_impl.recipes.datasets import ALPACA_TEMPLATE
from grit_impl.serve.server import EmbeddedOllama

GREEDY = {"temperature": 0, "seed": 1, "num_predict": 8, "num_ctx": 512}


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


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest, lab: SimpleNamespace) -> Iterator[str | None]:
    """A real Ollama with the same model, if there is one."""
    url = request.config.getoption("--ollama-url", default=None) or os.environ.get("OLLAMA_HOST")
    if not url:
        yield None
        return
    from grit_impl.serve.client import server_url

    address = server_url(url)
    deploy(address, "grit-test", lab.modelfile)
    yield address
    delete(address, "grit-test")


def error(text: str) -> Callable[[httpx.Response], bool]:
    """The answer is exactly this error."""
    return lambda r: r.json() == {"error": text}


def has(**fields: Any) -> Callable[[httpx.Response], bool]:
    """The answer holds these fields."""
    return lambda r: all(r.json().get(key) == value for key, value in fields.items())


M = {"model": "grit-test"}
P = {**M, "prompt": "the air", "stream": False, "options": GREEDY}
C = {**M, "messages": [{"role": "user", "content": "the air"}], "stream": False, "options": GREEDY}
TOO_LONG = {**P, "prompt": "the air quality index " * 400}
RENDERED = ALPACA_TEMPLATE.replace("{instruction}", "the air")
# id: method, path, body, status, check
CASES: dict[str, tuple[str, str, Any, int, Callable[[httpx.Response], bool]]] = {
    "root": ("GET", "/", None, 200, lambda r: r.text == "Ollama is running"),
    "version": ("GET", "/api/version", None, 200, lambda r: set(r.json()) == {"version"}),
    "unknown path": ("GET", "/api/nothing", None, 404, lambda r: r.text.startswith("404")),
    "wrong method": ("GET", "/api/generate", None, 405, lambda r: r.text.startswith("405")),
    "tags": ("GET", "/api/tags", None, 200, lambda r: "grit-test:latest" in [m["name"] for m in r.json()["models"]]),
    "show": ("POST", "/api/show", M, 200, lambda r: r.json()["model_info"]["general.architecture"] == "llama"),
    "show unknown": ("POST", "/api/show", {"model": "x"}, 404, error("model 'x:latest' not found")),
    "show nothing": ("POST", "/api/show", {}, 400, error("model is required")),
    "generate": ("POST", "/api/generate", P, 200, has(done=True, done_reason="length", eval_count=8)),
    "generate unknown": ("POST", "/api/generate", {"model": "x"}, 404, error("model 'x' not found")),
    "generate nothing": ("POST", "/api/generate", {}, 404, error("model '' not found")),
    "load": ("POST", "/api/generate", M, 200, has(done=True, done_reason="load", response="")),
    "unload": ("POST", "/api/generate", {**M, "keep_alive": 0}, 200, has(done=True, done_reason="unload")),
    "chat": ("POST", "/api/chat", C, 200, has(done=True, done_reason="length", eval_count=8)),
    "chat nothing": ("POST", "/api/chat", {}, 400, error("model is required")),
    "chat load": ("POST", "/api/chat", M, 200, has(done_reason="load", message={"role": "assistant", "content": ""})),
    "no body": ("POST", "/api/generate", b"", 400, error("missing request body")),
    "not JSON": ("POST", "/api/generate", b"{", 400, error("unexpected EOF")),
    "wrong type": (
        "POST", "/api/generate", {**P, "stream": "x"}, 400,
        error("json: cannot unmarshal string into Go struct field GenerateRequest.stream of type bool"),
    ),
    "wrong option": (
        "POST", "/api/generate", {**P, "options": {"temperature": "x"}}, 500,
        error('option "temperature" must be of type float32'),
    ),
    "unknown option": ("POST", "/api/generate", {**P, "options": {**GREEDY, "foo": 1}}, 200, has(done=True)),
    "float for int": (
        "POST", "/api/generate", {**P, "options": {**GREEDY, "num_predict": 3.7}}, 200, has(eval_count=3),
    ),
    "bad keep_alive": (
        "POST", "/api/generate", {**P, "keep_alive": "abc"}, 400, error('time: invalid duration "abc"'),
    ),
    "raw with template": (
        "POST", "/api/generate", {**P, "raw": True, "template": "x"}, 400,
        error("raw mode does not support template, system, or context"),
    ),
    "top_logprobs": (
        "POST", "/api/generate", {**P, "top_logprobs": 21}, 400, error("top_logprobs must be between 0 and 20"),
    ),
    "think": ("POST", "/api/generate", {**P, "think": True}, 400, error('"grit-test" does not support thinking')),
    "render generate": (
        "POST", "/api/generate", {**P, "_debug_render_only": True}, 200,
        lambda r: r.json()["_debug_info"]["rendered_template"] == RENDERED,
    ),
    "render chat": (
        "POST", "/api/chat", {**C, "_debug_render_only": True}, 200,
        lambda r: r.json()["_debug_info"]["rendered_template"] == RENDERED,
    ),
    "cut silently": ("POST", "/api/generate", TOO_LONG, 200, has(prompt_eval_count=259)),
    "not cut": ("POST", "/api/generate", {**TOO_LONG, "truncate": False}, 400, lambda r: "error" in r.json()),
    "one token costs nothing": (
        "POST", "/api/generate", {**P, "options": {**GREEDY, "num_predict": 1}}, 200, has(eval_count=1),
    ),
    "logprobs": (
        "POST", "/api/generate", {**P, "logprobs": True, "top_logprobs": 3}, 200,
        lambda r: all(len(entry["top_logprobs"]) == 3 for entry in r.json()["logprobs"]),
    ),
    "copy unknown": (
        "POST", "/api/copy", {"source": "x", "destination": "y"}, 404, error('model "x" not found'),
    ),
    "delete unknown": ("DELETE", "/api/delete", {"model": "x"}, 404, error("model 'x' not found")),
    "create nothing": (
        "POST", "/api/create", {"model": "y"}, 400, error("neither 'from' or 'files' was specified"),
    ),
    "create without name": ("POST", "/api/create", {"from": "grit-test"}, 400, error("invalid model name")),
    "create missing blob": (
        "POST", "/api/create", {"model": "y", "files": {"m.gguf": f"sha256:{'0' * 64}"}}, 200,
        lambda r: "error" in json.loads(r.text.splitlines()[-1]),
    ),
    "create absolute path": (
        "POST", "/api/create", {"model": "y", "files": {"/m.gguf": f"sha256:{'0' * 64}"}}, 400,
        error("file path must be relative"),
    ),
    "blob missing": ("HEAD", f"/api/blobs/sha256:{'0' * 64}", None, 404, lambda r: True),
    "blob bad digest": ("HEAD", "/api/blobs/sha256:xyz", None, 400, lambda r: True),
    "blob wrong content": (
        "POST", f"/api/blobs/sha256:{'0' * 64}", b"abc", 400,
        lambda r: r.json()["error"].startswith("digest mismatch"),
    ),
}  # fmt: skip


def send(url: str, method: str, path: str, body: Any) -> httpx.Response:
    """One request; bytes as they are, anything else as JSON."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    return httpx.request(method, url + path, content=content, timeout=60, trust_env=False)


@pytest.mark.parametrize("case", CASES)
def test_answers_as_ollama(server: EmbeddedOllama, case: str) -> None:
    """Oracle: what Ollama answers, status and body (recorded from a 0.33 server)."""
    method, path, body, status, check = CASES[case]
    reply = send(server.url, method, path, body)
    assert reply.status_code == status, reply.text
    assert check(reply), reply.text


def test_table_of_differences(server: EmbeddedOllama, real: str | None, pytestconfig: pytest.Config) -> None:
    """Oracle: a real Ollama, case by case. The table goes to reports/conformance.md."""
    if real is None:
        pytest.skip("needs a real Ollama: pytest --ollama-url http://127.0.0.1:11434; found none")
    rows = []
    for case, (method, path, body, _, check) in CASES.items():
        ours, theirs = (send(url, method, path, body) for url in (server.url, real))
        if ours.status_code != theirs.status_code or not check(theirs):
            cells = [case, *(f"{reply.status_code} {reply.text[:80]!r}" for reply in (ours, theirs))]
            rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(["| case | embedded | Ollama |", "|---|---|---|", *rows])
    out = pytestconfig.rootpath / "reports" / "conformance.md"
    out.write_text(table + "\n")
    assert len(rows) <= 0.1 * len(CASES), f"{len(rows)} differences, see {out}"


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
