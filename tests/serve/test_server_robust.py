"""The embedded server under load, abuse and failure. Oracles: its own answers when nothing else is going on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny

from grit_impl.errors import GRITError
from grit_impl.export import export_merged, write_modelfile
from grit_impl.serve import server as server_module
from grit_impl.serve import transport, wire
from grit_impl.serve.server import EmbeddedOllama

ROOT = Path(__file__).resolve().parents[2]
GREEDY = {"temperature": 0, "seed": 1, "num_predict": 12, "num_ctx": 512}


@pytest.fixture(scope="module")
def modelfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in q8_0, whose last bits depend on how products are batched."""
    root = tmp_path_factory.mktemp("robust")
    model = export_merged(tiny.make_base(root / "base"), None, root / "m.gguf")
    return write_modelfile(model.path, root / "Modelfile", num_ctx=512)


@pytest.fixture(scope="module")
def server(modelfile: Path) -> Iterator[EmbeddedOllama]:
    """The embedded server with two models."""
    with EmbeddedOllama({"one": modelfile, "two": modelfile}) as running:
        yield running


def say(url: str, prompt: str = "the air", model: str = "one", **extra: Any) -> str:
    """A greedy answer."""
    body = {"model": model, "prompt": prompt, "stream": False, "options": GREEDY, **extra}
    reply = httpx.post(f"{url}/api/generate", json=body, timeout=120, trust_env=False)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["response"])


def test_32_clients_get_the_answers_of_one(server: EmbeddedOllama) -> None:
    """Oracle: the same prompts one after another. An answer must not depend on its neighbours or its predecessors."""
    prompts = [f"Predict AQI given: PM2.5 {i * 7 % 90}.{i % 10} ug/m3" for i in range(32)]
    alone = [say(server.url, prompt) for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda prompt: say(server.url, prompt), prompts))
        backwards = list(pool.map(lambda prompt: say(server.url, prompt, model="two"), reversed(prompts)))
    assert together == alone
    assert backwards[::-1] == alone


def test_silent_and_slow_clients_stop_nobody(server: EmbeddedOllama) -> None:
    """Oracle: the answer and the time without them. Half a header, half a body, and a stream that nobody reads."""
    before = say(server.url)
    address = ("127.0.0.1", server.port)
    request = json.dumps({"model": "one", "prompt": "x", "options": {**GREEDY, "num_predict": 400}}).encode()
    head = b"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(request)
    sockets = []
    for opening in [b"", b"GET /api/ta", head, head + request[:10], head + request] * 8:
        connection = socket.create_connection(address)
        connection.sendall(opening)
        sockets.append(connection)
    start = time.monotonic()
    assert say(server.url, model="two") == before
    assert say(server.url) == before
    assert time.monotonic() - start < 60
    for connection in sockets:
        connection.close()


def test_silent_connections_are_closed(modelfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the end of the connection, in a second instead of fifteen."""
    monkeypatch.setattr(transport, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(server_module, "BODY_SECONDS", 0.5)
    with EmbeddedOllama({"one": modelfile}) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as silent:
            assert silent.recv(10) == b""
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as half:
            half.sendall(b"POST /api/show HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert half.recv(20).startswith(b"HTTP/1.1 408")


def test_client_that_leaves_stops_its_generation(server: EmbeddedOllama) -> None:
    """Oracle: a long generation, left at its start, does not delay the next one by its full length."""
    long = {"model": "one", "prompt": "x", "options": {"temperature": 1, "num_predict": 100000, "num_ctx": 512}}
    with httpx.stream("POST", f"{server.url}/api/generate", json=long, timeout=60, trust_env=False) as reply:
        next(reply.iter_lines())
    start = time.monotonic()
    assert say(server.url)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 400_000 + b"\r\n\r\n", b"400"),
        (b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"GET /api/blobs/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"POST /api/blobs/sha256:..%2f..%2fx HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"40"),
    ],
    ids=["tls", "long header", "bad length", "path", "digest path"],
)
def test_hostile_requests_are_refused(server: EmbeddedOllama, request_bytes: bytes, status: bytes) -> None:
    """Oracle: a status in the 400s, and a server that still answers."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        # A server that has seen enough does not read the rest.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request_bytes)
        assert connection.recv(100).split(b" ")[1].startswith(status)
    assert httpx.get(f"{server.url}/api/version", trust_env=False).status_code == 200


def test_bodies_have_limits(modelfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 413 for a request and for a blob beyond the limit; nothing of the blob is kept."""
    monkeypatch.setattr(server_module, "BODY_LIMIT", 10_000)
    with EmbeddedOllama({"one": modelfile}, blob_limit=10_000) as running:
        big = b'{"model": "' + b"x" * 20_000 + b'"}'
        assert httpx.post(f"{running.url}/api/show", content=big, trust_env=False).status_code == 413
        address = f"{running.url}/api/blobs/sha256:{'0' * 64}"
        assert httpx.post(address, content=iter([b"x" * 5000] * 4), trust_env=False).status_code == 413
        assert list(running.models.blobs.iterdir()) == []


def test_deep_json_and_hostile_templates(server: EmbeddedOllama) -> None:
    """Oracle: an error, quickly; no recursion error, no endless output."""
    deep = b'{"model": "one", "options": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert httpx.post(f"{server.url}/api/generate", content=deep, trust_env=False).status_code == 400
    bomb = "{{ range .Messages }}" * 200 + "{{ end }}" * 200
    for template in (bomb, "{{ if }}", "{{ .Prompt | nothing }}", "{{ (((((", "{{ printf `%d` .Prompt }}"):
        body = {"model": "one", "prompt": "x", "template": template, "options": GREEDY}
        assert httpx.post(f"{server.url}/api/generate", json=body, trust_env=False).status_code == 500


def test_a_full_queue_says_busy(modelfile: Path) -> None:
    """Oracle: Ollama's 503 for what does not fit, answers for the rest."""
    with EmbeddedOllama({"one": modelfile}, queue=2) as running:
        say(running.url)
        body = {"model": "one", "prompt": "x", "stream": False, "options": {**GREEDY, "num_predict": 300}}
        with ThreadPoolExecutor(8) as pool:
            send = lambda _: httpx.post(f"{running.url}/api/generate", json=body, timeout=120, trust_env=False)  # noqa: E731
            replies = list(pool.map(send, range(8)))
    codes = [reply.status_code for reply in replies]
    assert set(codes) == {200, 503}
    busy = next(reply for reply in replies if reply.status_code == 503)
    assert busy.json() == {"error": "server busy, please try again.  maximum pending requests exceeded"}


def test_a_crashed_model_is_loaded_again(server: EmbeddedOllama) -> None:
    """Oracle: the answer before llama.cpp was killed."""
    before = say(server.url)
    os.kill(server.engines.loaded["one:latest"].process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert say(server.url) == before


def test_models_unload_and_make_room(modelfile: Path) -> None:
    """Oracle: the processes. At most `most` models stay; keep_alive 0 and its expiry end them."""
    with EmbeddedOllama({name: modelfile for name in "abc"}, most=2) as running:
        for name in "abc":
            say(running.url, model=name)
        assert sorted(running.engines.loaded) == ["b:latest", "c:latest"]
        pids = [engine.process.pid for engine in running.engines.loaded.values()]
        say(running.url, model="b", keep_alive=0)
        say(running.url, model="c", keep_alive="100ms")
        deadline = time.monotonic() + 20
        while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert not running.engines.loaded


def test_bad_models_are_refused_at_the_start(tmp_path: Path, modelfile: Path) -> None:
    """Oracle: one line that names the file; no thread and no socket is left."""
    threads = threading.active_count()
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    (tmp_path / "Modelfile").write_text("FROM ./absent.gguf\n")
    (tmp_path / "Wrong").write_text(f"FROM {modelfile.parent / 'm.gguf'}\nPARAMETER temprature 1\n")
    for name, match in (("x.gguf", "GGUF"), ("Modelfile", "no such file"), ("Wrong", "temprature"), ("none", "exist")):
        with pytest.raises(GRITError, match=match):
            EmbeddedOllama({"x": tmp_path / name})
    with EmbeddedOllama({}) as running, pytest.raises(GRITError, match="cannot listen"):
        EmbeddedOllama({}, port=running.port)
    assert threading.active_count() == threads


def serve(modelfile: Path) -> tuple[subprocess.Popen[str], str]:
    """`grit serve` in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grit_impl.cli", "serve", f"one={modelfile}", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell that runs the tests in the background lets them ignore ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    match = re.search(r"http://\S+", process.stdout.readline())
    assert match
    return process, match[0]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_ending_leaks_a_process(modelfile: Path, ending: signal.Signals) -> None:
    """Oracle: the process table. ctrl-C and SIGTERM end with status 0; even SIGKILL takes the models along."""
    process, url = serve(modelfile)
    say(url)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(ending)
    assert process.wait(timeout=30) == (-9 if ending == signal.SIGKILL else 0)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert process.stdout is not None
    process.stdout.close()


# What Ollama itself answers with 500 (wrong option types, formats, templates) or 503.
OWN_500 = re.compile(
    r"option \"|invalid format|template|unsupported quantization|pull model|quantization is only|schema|samplers"
)


def specification() -> dict[str, Any]:
    """An OpenAPI description from the very tables by which requests are decoded."""
    kinds: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "maxLength": 40}, "bool": {"type": "boolean"}, "int": {"type": "integer"},
        "slice": {"type": "array", "maxItems": 3}, "map": {"type": "object"}, "any": {},
        "integer": {"type": "integer"}, "float32": {"type": "number"}, "boolean": {"type": "boolean"},
        "array": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    }  # fmt: skip
    options = {name: kinds[kind] for name, (kind, _) in wire.OPTIONS.items()}
    # Bounded, so that a random request is not a long one.
    options |= {"num_predict": {"type": "integer", "minimum": 0, "maximum": 4}, "num_ctx": {"enum": [64, 512]}}
    message = {"type": "object", "properties": {name: kinds[kind] for name, kind in wire.MESSAGE.items()}}
    special = {
        "model": {"enum": ["one", "two", "absent"]},
        "options": {"type": "object", "properties": options, "required": ["num_predict"]},
        "messages": {"type": "array", "items": message, "maxItems": 4},
        "keep_alive": {"enum": [0, -1, "5m", "1h2m", "x", "", None, 3.5, True]},
        "top_logprobs": {"type": "integer", "minimum": -2, "maximum": 25},
    }
    bodies = {
        "/api/generate": ("post", wire.GENERATE), "/api/chat": ("post", wire.CHAT), "/api/show": ("post", wire.SHOW),
        "/api/copy": ("post", wire.COPY), "/api/create": ("post", wire.CREATE), "/api/delete": ("delete", wire.DELETE),
    }  # fmt: skip
    paths: dict[str, Any] = {}
    for path, (method, fields) in bodies.items():
        keep = path in ("/api/generate", "/api/chat", "/api/show")
        properties = {name: special.get(name, kinds[kind]) if keep else kinds[kind] for name, kind in fields.items()}
        schema = {"type": "object", "properties": properties, "required": ["options", "model"] if keep else []}
        content = {"application/json": {"schema": schema}}
        paths[path] = {method: {"requestBody": {"required": True, "content": content}, "responses": {"default": {"description": "any"}}}}  # fmt: skip  # noqa: E501
    for path in ("/", "/api/version", "/api/tags", "/api/ps"):
        paths[path] = {"get": {"responses": {"200": {"description": "ok"}}}}
    return {"openapi": "3.0.3", "info": {"title": "Ollama", "version": "1"}, "paths": paths}


def fuzz(url: str, requests: int) -> int:
    """Send random valid and invalid requests; returns how many got an answer that Ollama would give."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_dict(specification())
    operations = [(o.ok().path, o.ok()) for o in schema.get_all_operations()]
    client = httpx.Client(base_url=url, timeout=120, trust_env=False)
    statuses: list[int] = []

    def checker(operation: Any) -> Any:
        def check(case: Any) -> None:
            try:
                content = case.body if isinstance(case.body, bytes) else json.dumps(case.body, default=str).encode()
            except (TypeError, ValueError):
                content = b""
            reply = client.request(operation.method, operation.path, content=content)
            statuses.append(reply.status_code)
            if reply.status_code >= 500:
                assert OWN_500.search(reply.json()["error"]), (operation.path, content, reply.text)
            elif reply.status_code >= 400 and reply.status_code not in (404, 405):
                assert isinstance(reply.json()["error"], str)

        return check

    for path, operation in operations:
        simple = path in ("/", "/api/version", "/api/tags", "/api/ps")
        # The invalid ones matter most where there is a body to get wrong.
        modes = [schemathesis.GenerationMode.POSITIVE] + ([] if simple else [schemathesis.GenerationMode.NEGATIVE])
        for mode in modes:
            bounded = settings(
                max_examples=max(1, int(requests * (0.01 if simple else 0.08))),
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            bounded(given(case=operation.as_strategy(generation_mode=mode))(checker(operation)))()
    # A fuzzer that only ever meets the front door proves nothing.
    assert {200, 400, 404} <= set(statuses)
    return len(statuses)


def test_fuzzed_requests(server: EmbeddedOllama) -> None:
    """Oracle: no status 500 but Ollama's own, always an error message, and the same answer afterwards."""
    before = say(server.url)
    assert fuzz(server.url, 250) >= 150
    assert say(server.url) == before


@pytest.mark.slow
def test_fuzzed_requests_leave_no_trace(modelfile: Path) -> None:
    """Oracle: the process table and resident memory (within 5%) of `grit serve` before and after.

    GRIT_FUZZ_REQUESTS sets how many; nightly 5,000.
    """
    requests = int(os.environ.get("GRIT_FUZZ_REQUESTS", "1200"))
    process, url = serve(modelfile)
    try:
        fuzz(url, 400)
        say(url)
        watched = psutil.Process(process.pid)
        before, size = say(url), watched.memory_info().rss
        assert fuzz(url, requests) >= 0.8 * requests
        assert say(url) == before
        assert watched.memory_info().rss < 1.05 * size
        assert len(watched.children(recursive=True)) <= 1
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()
