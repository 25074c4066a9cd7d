"""What Ollama answers, row by row, for any server that speaks its API.

A row's source is the documentation (`docs/api.md`) or the code of Ollama at fb3076099 (after 0.33.0-rc2); `seen` is
what a server of that version answered. The rows run on the embedded server in every test session, and on another one
with `pytest tests/serve/test_conformance.py --ollama-url http://127.0.0.1:11434`. By itself it prints the table.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx

from grit_impl.recipes.datasets import ALPACA_TEMPLATE

GREEDY = {"temperature": 0, "seed": 1, "num_predict": 8, "num_ctx": 512}
Response = httpx.Response


class Check(NamedTuple):
    """What is expected of an answer, in words and as code."""

    words: str
    holds: Callable[[Response], bool]


class Row(NamedTuple):
    """One request and what Ollama makes of it."""

    method: str
    path: str
    body: Any
    status: int
    check: Check
    source: str


def error(text: str) -> Check:
    """The answer is exactly this error."""
    return Check(f"error `{text}`", lambda r: r.json() == {"error": text})


def has(**fields: Any) -> Check:
    """The answer holds these fields."""
    words = ", ".join(f"`{key}` {json.dumps(value)}" for key, value in fields.items())
    return Check(words, lambda r: all(r.json().get(key) == value for key, value in fields.items()))


def openai(kind: str, text: str) -> Check:
    """OpenAI's form of an error, with this text in it."""
    return Check(
        f"OpenAI's error, `{kind}`",
        lambda r: r.json()["error"]["type"] == kind and text in r.json()["error"]["message"],
    )


M = {"model": "grit-test"}
P = {**M, "prompt": "the air", "stream": False, "options": GREEDY}
C = {**M, "messages": [{"role": "user", "content": "the air"}], "stream": False, "options": GREEDY}
TOO_LONG = {**P, "prompt": "the air quality index " * 400}
RENDERED = ALPACA_TEMPLATE.replace("{instruction}", "the air")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
GEN, CHAT = "/api/generate", "/api/chat"
DOC, SEEN = "docs/api.md", "seen"
ROUTES, LLAMA, OPENAI = "server/routes.go", "llm/llama_server.go", "openai/openai.go"
OVER = "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the "
OVER += "context length in settings, or use a model with a longer context length"

ROWS: dict[str, Row] = {
    "root": Row("GET", "/", None, 200, Check("Ollama is running", lambda r: r.text == "Ollama is running"), SEEN),
    "version": Row("GET", "/api/version", None, 200, Check("`version`", lambda r: set(r.json()) == {"version"}), SEEN),
    "unknown path": Row("GET", "/api/nothing", None, 404, Check("plain text", lambda r: r.text[:3] == "404"), SEEN),
    "wrong method": Row("GET", GEN, None, 405, Check("plain text", lambda r: r.text[:3] == "405"), SEEN),
    "GET embed": Row("GET", "/api/embed", None, 405, Check("plain text", lambda r: r.text[:3] == "405"), SEEN),
    "tags": Row(
        "GET", "/api/tags", None, 200,
        Check("name with its tag", lambda r: "grit-test:latest" in [m["name"] for m in r.json()["models"]]), SEEN,
    ),
    "tags, fields": Row(
        "GET", "/api/tags", None, 200,
        Check(
            "`name`, `model`, `modified_at`, `size`, `digest`, `details`",
            lambda r: {"name", "model", "modified_at", "size", "digest", "details"} <= set(r.json()["models"][0]),
        ), DOC,
    ),
    "show": Row(
        "POST", "/api/show", M, 200,
        Check("`model_info`", lambda r: r.json()["model_info"]["general.architecture"] == "llama"), SEEN,
    ),
    "show, tensors": Row(
        "POST", "/api/show", M, 200,
        Check(
            "`tensors`, innermost dimension first",
            lambda r: {t["name"]: t for t in r.json()["tensors"]}["token_embd.weight"]["shape"][0]
            == r.json()["model_info"]["llama.embedding_length"],
        ), SEEN,
    ),
    "show, Modelfile": Row(
        "POST", "/api/show", M, 200,
        Check("how to build on it", lambda r: "# To build a new Modelfile" in r.json()["modelfile"]), ROUTES,
    ),
    "show unknown": Row("POST", "/api/show", {"model": "x"}, 404, error("model 'x:latest' not found"), SEEN),
    "show nothing": Row("POST", "/api/show", {}, 400, error("model is required"), SEEN),
    "generate": Row("POST", GEN, P, 200, has(done=True, done_reason="length", eval_count=8), SEEN),
    "generate, durations": Row(
        "POST", GEN, P, 200,
        Check(
            "whole nanoseconds, the total the largest",
            lambda r: all(isinstance(r.json()[f"{x}_duration"], int) for x in ("total", "prompt_eval", "eval"))
            and r.json()["total_duration"] >= r.json()["eval_duration"],
        ), DOC,
    ),
    "generate unknown": Row("POST", GEN, {"model": "x"}, 404, error("model 'x' not found"), SEEN),
    "generate nothing": Row("POST", GEN, {}, 404, error("model '' not found"), SEEN),
    "load": Row("POST", GEN, M, 200, has(done=True, done_reason="load", response=""), SEEN),
    "unload": Row("POST", GEN, {**M, "keep_alive": 0}, 200, has(done=True, done_reason="unload"), SEEN),
    "raw": Row("POST", GEN, {**P, "raw": True}, 200, Check("no `context`", lambda r: "context" not in r.json()), SEEN),
    "raw with template": Row(
        "POST", GEN, {**P, "raw": True, "template": "x"}, 400,
        error("raw mode does not support template, system, or context"), SEEN,
    ),
    "template that does not parse": Row(
        "POST", GEN, {**P, "template": "{{ .Prompt"}, 500, Check("an error", lambda r: bool(r.json()["error"])), ROUTES,
    ),
    "system": Row(
        "POST", GEN, {**P, "system": "A", "template": "{{ .System }}|{{ .Prompt }}", "_debug_render_only": True}, 200,
        Check("in its place", lambda r: r.json()["_debug_info"]["rendered_template"] == "A|the air"), ROUTES,
    ),
    "render generate": Row(
        "POST", GEN, {**P, "_debug_render_only": True}, 200,
        Check("the template's text", lambda r: r.json()["_debug_info"]["rendered_template"] == RENDERED), SEEN,
    ),
    "render chat": Row(
        "POST", CHAT, {**C, "_debug_render_only": True}, 200,
        Check("the template's text", lambda r: r.json()["_debug_info"]["rendered_template"] == RENDERED), SEEN,
    ),
    "suffix": Row("POST", GEN, {**P, "suffix": "x"}, 400, error("grit-test:latest does not support insert"), ROUTES),
    "think": Row("POST", GEN, {**P, "think": True}, 400, error('"grit-test" does not support thinking'), SEEN),
    "think, not": Row("POST", GEN, {**P, "think": False}, 200, has(done=True), ROUTES),
    "num_predict 0": Row(
        "POST", GEN, {**P, "options": {**GREEDY, "num_predict": 0, "num_ctx": 64, "stop": [" ", "e", "a", "\n"]}}, 200,
        Check("is no limit", lambda r: r.json()["done_reason"] == "stop"), LLAMA,
    ),
    "cut silently": Row("POST", GEN, TOO_LONG, 200, has(prompt_eval_count=259), SEEN),
    "not cut": Row(
        "POST", GEN, {**TOO_LONG, "truncate": False}, 400,
        Check(
            "llama.cpp's answer, as a text",
            lambda r: json.loads(r.json()["error"])["error"]["type"] == "exceed_context_size_error",
        ), LLAMA,
    ),
    "not shifted": Row("POST", GEN, {**TOO_LONG, "shift": False}, 400, error(OVER), LLAMA),
    "one token costs nothing": Row(
        "POST", GEN, {**P, "options": {**GREEDY, "num_predict": 1}}, 200, has(eval_count=1), SEEN,
    ),
    "unknown option": Row("POST", GEN, {**P, "options": {**GREEDY, "foo": 1}}, 200, has(done=True), SEEN),
    "wrong option": Row(
        "POST", GEN, {**P, "options": {"temperature": "x"}}, 500,
        error('option "temperature" must be of type float32'), SEEN,
    ),
    "float for int": Row("POST", GEN, {**P, "options": {**GREEDY, "num_predict": 3.7}}, 200, has(eval_count=3), SEEN),
    "bad keep_alive": Row("POST", GEN, {**P, "keep_alive": "abc"}, 400, error('time: invalid duration "abc"'), SEEN),
    "keep_alive without unit": Row(
        "POST", GEN, {**P, "keep_alive": "10"}, 400, error('time: missing unit in duration "10"'), "Go's time",
    ),
    "no body": Row("POST", GEN, b"", 400, error("missing request body"), SEEN),
    "not JSON": Row("POST", GEN, b"{", 400, error("unexpected EOF"), SEEN),
    "wrong type": Row(
        "POST", GEN, {**P, "stream": "x"}, 400,
        error("json: cannot unmarshal string into Go struct field GenerateRequest.stream of type bool"), SEEN,
    ),
    "logprobs": Row(
        "POST", GEN, {**P, "logprobs": True, "top_logprobs": 3}, 200,
        Check("three per token", lambda r: all(len(each["top_logprobs"]) == 3 for each in r.json()["logprobs"])), SEEN,
    ),
    "top_logprobs": Row(
        "POST", GEN, {**P, "top_logprobs": 21}, 400, error("top_logprobs must be between 0 and 20"), SEEN,
    ),
    "chat": Row("POST", CHAT, C, 200, has(done=True, done_reason="length", eval_count=8), SEEN),
    "chat, message": Row(
        "POST", CHAT, C, 200, Check("of the assistant", lambda r: r.json()["message"]["role"] == "assistant"), DOC,
    ),
    "chat nothing": Row("POST", CHAT, {}, 400, error("model is required"), SEEN),
    "chat load": Row(
        "POST", CHAT, M, 200, has(done_reason="load", message={"role": "assistant", "content": ""}), SEEN,
    ),
    "tools": Row("POST", CHAT, {**C, "tools": TOOLS}, 400, error("grit-test:latest does not support tools"), ROUTES),
    "format, unknown": Row(
        "POST", CHAT, {**C, "format": "yaml"}, 500,
        Check("an error", lambda r: "invalid format" in r.json()["error"]), SEEN,
    ),
    "embed": Row(
        "POST", "/api/embed", {**M, "input": "the air"}, 501,
        Check("llama.cpp's answer", lambda r: "does not support embeddings" in r.json()["error"]), LLAMA,
    ),
    "embed nothing": Row("POST", "/api/embed", M, 200, has(embeddings=[]), ROUTES),
    "embed a number": Row("POST", "/api/embed", {**M, "input": 3}, 400, error("invalid input type"), ROUTES),
    "embed unknown": Row("POST", "/api/embed", {"model": "x"}, 404, error("model 'x' not found"), ROUTES),
    "embeddings": Row(
        "POST", "/api/embeddings", {**M, "prompt": "the air"}, 500,
        Check("llama.cpp's answer", lambda r: "does not support embeddings" in r.json()["error"]), ROUTES,
    ),
    "copy unknown": Row(
        "POST", "/api/copy", {"source": "x", "destination": "y"}, 404, error('model "x" not found'), SEEN,
    ),
    "delete unknown": Row("DELETE", "/api/delete", {"model": "x"}, 404, error("model 'x' not found"), SEEN),
    "create nothing": Row(
        "POST", "/api/create", {"model": "y"}, 400, error("neither 'from' or 'files' was specified"), SEEN,
    ),
    "create without name": Row(
        "POST", "/api/create", {"from": "grit-test"}, 400, error("invalid model name"), SEEN,
    ),
    "create missing blob": Row(
        "POST", "/api/create", {"model": "y", "files": {"m.gguf": f"sha256:{'0' * 64}"}}, 200,
        Check("the error is in the stream", lambda r: "error" in json.loads(r.text.splitlines()[-1])), SEEN,
    ),
    "create absolute path": Row(
        "POST", "/api/create", {"model": "y", "files": {"/m.gguf": f"sha256:{'0' * 64}"}}, 400,
        error("file path must be relative"), SEEN,
    ),
    "blob missing": Row("HEAD", f"/api/blobs/sha256:{'0' * 64}", None, 404, Check("nothing", lambda r: True), SEEN),
    "blob bad digest": Row("HEAD", "/api/blobs/sha256:xyz", None, 400, Check("nothing", lambda r: True), SEEN),
    "blob wrong content": Row(
        "POST", f"/api/blobs/sha256:{'0' * 64}", b"abc", 400,
        Check("digest mismatch", lambda r: r.json()["error"].startswith("digest mismatch")), SEEN,
    ),
    "/v1/models": Row(
        "GET", "/v1/models", None, 200,
        Check("a list", lambda r: "grit-test:latest" in [each["id"] for each in r.json()["data"]]), OPENAI,
    ),
    "/v1/models, one": Row("GET", "/v1/models/grit-test", None, 200, has(id="grit-test", object="model"), OPENAI),
    "/v1/models, unknown": Row("GET", "/v1/models/x", None, 404, openai("not_found_error", "not found"), OPENAI),
    "/v1/chat/completions": Row(
        "POST", "/v1/chat/completions", {**M, "messages": C["messages"], "max_tokens": 4, "temperature": 0}, 200,
        Check("`finish_reason` length", lambda r: r.json()["choices"][0]["finish_reason"] == "length"), OPENAI,
    ),
    "/v1/chat/completions, unknown": Row(
        "POST", "/v1/chat/completions", {"model": "x", "messages": C["messages"]}, 404,
        openai("not_found_error", "model 'x' not found"), OPENAI,
    ),
    "/v1/completions": Row(
        "POST", "/v1/completions", {**M, "prompt": "the air", "max_tokens": 4, "temperature": 0}, 200,
        has(object="text_completion"), OPENAI,
    ),
}  # fmt: skip


def send(url: str, method: str, path: str, body: Any) -> Response:
    """One request; bytes as they are, anything else as JSON."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    return httpx.request(method, url + path, content=content, timeout=60, trust_env=False)


def ask(url: str, body: dict[str, Any], path: str = GEN) -> dict[str, Any]:
    """One question's answer, which must have succeeded."""
    return dict(send(url, "POST", path, body).raise_for_status().json())


# -- what takes more than one request ---------------------------------------------------------------------------------

Step = Callable[[str, SimpleNamespace], None]
STEPS: dict[str, tuple[Step, str]] = {}


def step(name: str, source: str) -> Callable[[Step], Step]:
    """Give a row its name in the table."""

    def keep(function: Step) -> Step:
        STEPS[name] = (function, source)
        return function

    return keep


def ended(statuses: Response) -> str:
    """The last status of a stream of them."""
    last = json.loads(statuses.text.splitlines()[-1])
    return str(last.get("status") or last)


@step("streams", DOC)
def streams(url: str, lab: SimpleNamespace) -> None:
    """A chunk per token, the last one done, with the counters; together they are the whole answer; for chat, too."""
    for path, body in ((GEN, P), (CHAT, C)):
        whole = ask(url, body, path)
        lines = [json.loads(line) for line in send(url, "POST", path, {**body, "stream": True}).text.splitlines()]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        said = [line["message"]["content"] if path == CHAT else line["response"] for line in lines]
        assert "".join(said) == (whole["message"]["content"] if path == CHAT else whole["response"])
        assert lines[-1]["eval_count"] == whole["eval_count"]
        assert "eval_count" not in lines[0]


@step("/v1 streams", OPENAI)
def events(url: str, lab: SimpleNamespace) -> None:
    """Server-sent events: the role first, the reason last, then [DONE]."""
    body = {**M, "messages": C["messages"], "max_tokens": 4, "temperature": 0, "stream": True}
    lines = [x[6:] for x in send(url, "POST", "/v1/chat/completions", body).text.splitlines() if x.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


@step("context", DOC)
def context(url: str, lab: SimpleNamespace) -> None:
    """The tokens of an answer, put before the next prompt, are read with it."""
    first = ask(url, P)
    room = {**P, "prompt": "again", "options": {**GREEDY, "num_ctx": 2048}}
    longer, alone = ask(url, {**room, "context": first["context"]}), ask(url, room)
    assert abs(longer["prompt_eval_count"] - alone["prompt_eval_count"] - len(first["context"])) <= 1


@step("format", DOC)
def schema(url: str, lab: SimpleNamespace) -> None:
    """An answer in a JSON schema."""
    assert isinstance(json.loads(ask(url, {**C, "format": {"type": "boolean"}}, CHAT)["message"]["content"]), bool)


@step("history", DOC)
def history(url: str, lab: SimpleNamespace) -> None:
    """Earlier messages are part of the prompt."""
    more = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the air"}, *C["messages"]]
    longer = ask(url, {**C, "messages": more}, CHAT)["prompt_eval_count"]
    assert longer > ask(url, C, CHAT)["prompt_eval_count"]


@step("create, copy, delete", DOC)
def create(url: str, lab: SimpleNamespace) -> None:
    """From a blob with template, system prompt, messages and lists of parameters; shown, copied, deleted."""
    data = lab.gguf.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert send(url, "POST", f"/api/blobs/{digest}", data).status_code in (200, 201)
    assert send(url, "HEAD", f"/api/blobs/{digest}", None).status_code == 200
    parameters = {"stop": ["x", "y"], "temperature": 0.5}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    wanted = {"system": "Be short.", "template": "{{ .System }} {{ .Prompt }}", "messages": messages}
    made = {"model": "grit-made", "files": {"m.gguf": digest}, "parameters": parameters, **wanted}
    assert ended(send(url, "POST", "/api/create", made)) == "success"
    shown = ask(url, {"model": "grit-made"}, "/api/show")
    assert {key: shown[key] for key in wanted} == wanted
    lines = sorted(line.split(None, 1)[1].strip('"') for line in shown["parameters"].splitlines())
    assert lines == ["0.5", "x", "y"]
    assert (
        ended(send(url, "POST", "/api/create", {"model": "grit-child", "from": "grit-made", "system": "Go."}))
        == "success"
    )
    assert ask(url, {"model": "grit-child"}, "/api/show")["system"] == "Go."
    assert send(url, "POST", "/api/copy", {"source": "grit-child", "destination": "grit-twin"}).status_code == 200
    for name in ("grit-made", "grit-child", "grit-twin"):
        assert send(url, "DELETE", "/api/delete", {"model": name}).status_code == 200
        assert send(url, "POST", "/api/show", {"model": name}).status_code == 404


@step("adapter", DOC)
def adapter(url: str, lab: SimpleNamespace) -> None:
    """A model from a base and an adapter answers, and otherwise than the base."""
    data = lab.adapter.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert send(url, "POST", f"/api/blobs/{digest}", data).status_code in (200, 201)
    made = {"model": "grit-adapted", "from": "grit-test", "adapters": {"a.gguf": digest}}
    assert ended(send(url, "POST", "/api/create", made)) == "success"
    assert ask(url, {**P, "model": "grit-adapted"})["response"] != ask(url, P)["response"]
    send(url, "DELETE", "/api/delete", {"model": "grit-adapted"})


@step("keep_alive", DOC)
def keep_alive(url: str, lab: SimpleNamespace) -> None:
    """Seconds, durations and for ever are listed with their end by /api/ps; 0 unloads."""
    ends = []
    for value in (60, "10m", -1, "-1s"):
        ask(url, {**P, "keep_alive": value})
        listed = {m["name"]: m for m in send(url, "GET", "/api/ps", None).json()["models"]}
        ends.append(listed["grit-test:latest"]["expires_at"])
    assert ends[0] < ends[1] < ends[2][:4] + "-99"
    assert min(int(each[:4]) for each in ends[2:]) > int(ends[0][:4]) + 50
    ask(url, {**M, "keep_alive": 0, "stream": False})
    for _ in range(50):
        if "grit-test:latest" not in [m["name"] for m in send(url, "GET", "/api/ps", None).json()["models"]]:
            return
        time.sleep(0.1)
    raise AssertionError("it is still loaded")


@step("cancelled clients", ROUTES)
def cancelled(url: str, lab: SimpleNamespace) -> None:
    """A client that hangs up in the middle of a stream leaves the server as it was."""
    before = ask(url, P)["response"]
    long = {**P, "stream": True, "options": {**GREEDY, "num_predict": 400, "temperature": 5.0}}
    for _ in range(3):
        with httpx.stream("POST", url + GEN, json=long, timeout=60, trust_env=False) as reply:
            next(reply.iter_lines())
    start = time.monotonic()
    assert ask(url, P)["response"] == before
    assert time.monotonic() - start < 30


@step("concurrent models", ROUTES)
def concurrent(url: str, lab: SimpleNamespace) -> None:
    """Two models asked at the same time answer as each does alone; one is deleted while it answers."""
    assert send(url, "POST", "/api/copy", {"source": "grit-test", "destination": "grit-second"}).status_code == 200
    bodies = [P, {**P, "model": "grit-second", "prompt": "hello"}]
    alone = [ask(url, body)["response"] for body in bodies]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert [reply["response"] for reply in pool.map(lambda body: ask(url, body), bodies)] == alone
    long = {**bodies[1], "stream": True, "options": {**GREEDY, "num_predict": 200, "temperature": 5.0}}
    with httpx.stream("POST", url + GEN, json=long, timeout=60, trust_env=False) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert send(url, "DELETE", "/api/delete", {"model": "grit-second"}).status_code == 200
        assert any(json.loads(line).get("done") or "error" in json.loads(line) for line in lines)
    assert send(url, "POST", GEN, bodies[1]).status_code == 404
    assert ask(url, P)["response"] == alone[0]


@step("template", ROUTES)
def template(url: str, lab: SimpleNamespace) -> None:
    """A TEMPLATE goes before the chat template that the GGUF has; without one, the GGUF's own is used."""
    assert lab.chat_template
    rendered = ask(url, {**C, "_debug_render_only": True}, CHAT)["_debug_info"]["rendered_template"]
    assert rendered == RENDERED


def table() -> str:
    """Markdown."""
    lines = [
        "| row | request | answer | source |", "|---|---|---|---|",
        *(
            f"| {name} | `{row.method} {row.path[:40]}` | {row.status}, {row.check.words} | {row.source} |"
            for name, row in ROWS.items()
        ),
        *(
            f"| {name} | several | {' '.join(str(function.__doc__).split())} | {source} |"
            for name, (function, source) in STEPS.items()
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
