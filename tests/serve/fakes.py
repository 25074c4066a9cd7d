"""A scripted Ollama and a proxy that breaks things, for the evaluator's tests.

`FakeOllama` answers from a table, so that every accuracy is known in advance. `ChaosProxy` is a TCP-level proxy with a
script of faults: it sits where the network sits, and can do what a network and a broken server can do.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeOllama:
    """Answers `/api/generate` with `answer(model, prompt)`; counts requests; no template, no model.

    Args:
        answer: The text, by model and prompt.
        models: Digest by full name.
        rate: Tokens per second that it claims, by model name.
    """

    def __init__(
        self,
        answer: Callable[[str, str], str],
        models: dict[str, str] | None = None,
        rate: Callable[[str], float] = lambda model: 100.0,
    ) -> None:
        self.answer, self.rate = answer, rate
        self.models = models or {"base:latest": "d0", "baseline:latest": "d1"}
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.capabilities = ["completion"]
        self.copies: dict[str, str] = {}
        self.room, self.version = 8, "0.33.0"
        self.loaded: list[str] = []
        self.delay = 0.0
        self.active = self.most_active = 0
        self.lock = threading.Lock()
        self.edit: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda request, reply: reply
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def send(self, status: int, body: bytes) -> None:
                # One write: two would wait for each other (Nagle's algorithm against delayed acknowledgements).
                head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                self.wfile.write(head.encode() + body)

            def do_GET(self) -> None:
                if self.path == "/api/version":
                    self.send(200, json.dumps({"version": fake.version}).encode())
                elif self.path == "/api/tags":
                    listed = [{"name": n, "model": n, "digest": d} for n, d in fake.models.items()]
                    self.send(200, json.dumps({"models": listed}).encode())
                elif self.path == "/api/ps":
                    self.send(200, json.dumps({"models": [{"name": name} for name in fake.loaded]}).encode())
                else:
                    self.send(404, b"404 page not found")

            def do_DELETE(self) -> None:
                fake.copies.pop(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"])
                self.send(200, b"")

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/api/copy":
                    fake.copies[request["destination"]] = request["source"]
                    self.send(200, b"")
                    return
                if request.get("keep_alive") == 0:
                    fake.unload(request["model"])
                    self.send(200, b'{"done": true, "done_reason": "unload"}')
                    return
                fake.headers.append(dict(self.headers))
                if self.path == "/api/show":
                    self.send(200, json.dumps({"capabilities": fake.capabilities}).encode())
                    return
                with fake.lock:
                    fake.requests.append(request)
                    fake.active += 1
                    fake.most_active = max(fake.most_active, fake.active)
                try:
                    time.sleep(fake.delay)
                    self.send(200, fake.reply(request))
                finally:
                    with fake.lock:
                        fake.active -= 1

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args: object) -> None:
                """A client that hung up is what these tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def unload(self, model: str) -> None:
        """Take a model out of memory."""
        name = model if ":" in model else f"{model}:latest"
        self.loaded = [each for each in self.loaded if each != name]

    def reply(self, request: dict[str, Any]) -> bytes:
        self.unload(request["model"])
        self.loaded = [*self.loaded, request["model"] + ("" if ":" in request["model"] else ":latest")][-self.room :]
        original = self.copies.get(request["model"], request["model"])
        text = self.answer(original, request["prompt"])
        limit = int(request["options"]["num_predict"])
        # The speed test asks for babble of a fixed length.
        count = limit if request["options"]["temperature"] > 1 else min(limit, max(1, len(text.split())))
        model = request["model"]
        whole = {
            "model": model,
            "created_at": "2026-01-01T00:00:00Z",
            "response": text,
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": len(request["prompt"].split()) + 20,
            "prompt_eval_duration": 1_000_000,
            "eval_count": count,
            "eval_duration": int(1e9 * max(count - 1, 0) / self.rate(original)),
        }
        whole = self.edit(request, whole)
        if not request["stream"]:
            return json.dumps(whole).encode()
        middle = len(text) // 2
        lines = [{"model": model, "response": part, "done": False} for part in (text[:middle], text[middle:])]
        return "".join(json.dumps(line) + "\n" for line in [*lines, {**whole, "response": ""}]).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake_ollama() -> Iterator[Callable[..., FakeOllama]]:
    """Start fake servers that end with the test."""
    running: list[FakeOllama] = []

    def start(*args: Any, **kwargs: Any) -> FakeOllama:
        running.append(FakeOllama(*args, **kwargs))
        return running[-1]

    yield start
    for server in running:
        server.close()


def _reset(client: socket.socket) -> None:
    """Close with RST, as a killed process does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _http(status: str, body: bytes, length: int | None = None) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def _edited(body: bytes, **fields: Any) -> bytes:
    """The last JSON line of a reply with other fields; a field set to None is left out."""
    lines = body.strip().split(b"\n")
    last = {**json.loads(lines[-1]), **fields}
    lines[-1] = json.dumps({k: v for k, v in last.items() if v is not None}).encode()
    return b"\n".join(lines)


def _blank(body: bytes) -> bytes:
    """Every text removed, the counters kept."""
    return b"\n".join(json.dumps({**json.loads(line), "response": ""}).encode() for line in body.strip().split(b"\n"))


# What arrives at the client instead of a good reply `body`; None: no bytes, the connection is reset.
FAULTS: dict[str, Callable[[bytes], bytes | None]] = {
    "reset": lambda body: None,
    "close without a byte": lambda body: b"",
    "cut header": lambda body: b"HTTP/1.1 200 OK\r\nContent-Le",
    "cut body": lambda body: _http("200 OK", body[: len(body) // 2], len(body)),
    "cut body with a fitting length": lambda body: _http("200 OK", body[: len(body) // 2]),
    "500": lambda body: _http("500 Internal Server Error", b'{"error": "llama runner process has terminated"}'),
    "502": lambda body: _http("502 Bad Gateway", b"<html>bad gateway</html>"),
    "503": lambda body: _http("503 Service Unavailable", b'{"error": "server busy, please try again"}'),
    "429": lambda body: _http("429 Too Many Requests", b"slow down"),
    "404 for a model that exists": lambda body: _http("404 Not Found", b'{"error": "model not found"}'),
    "redirect": lambda body: _http("302 Found", b""),
    "html with status 200": lambda body: _http("200 OK", b"<html>maintenance</html>"),
    "garbage bytes": lambda body: _http("200 OK", bytes(range(256))),
    "not HTTP": lambda body: b"SSH-2.0-OpenSSH_9.2\r\n",
    "error with status 200": lambda body: _http("200 OK", b'{"error": "an error was encountered while running"}'),
    "error after half an answer": lambda body: _http("200 OK", body.split(b"\n")[0] + b'\n{"error": "unexpected EOF"}'),
    "wrong model": lambda body: _http("200 OK", _edited(body, model="other:latest")),
    "empty text": lambda body: _http("200 OK", _blank(body)),
    "empty object": lambda body: _http("200 OK", b"{}"),
    "empty body": lambda body: _http("200 OK", b""),
    "a list": lambda body: _http("200 OK", b"[" + body.split(b"\n")[-1] + b"]"),
    "not finished": lambda body: _http("200 OK", _edited(body, done=False)),
    "no counters": lambda body: _http("200 OK", _edited(body, eval_count=None)),
    "counters are text": lambda body: _http("200 OK", _edited(body, eval_count="many")),
    "negative counter": lambda body: _http("200 OK", _edited(body, eval_duration=-5)),
    "too many tokens": lambda body: _http("200 OK", _edited(body, eval_count=10**6)),
    "prompt cut": lambda body: _http("200 OK", _edited(body, prompt_eval_count=2)),
    "only loaded": lambda body: _http("200 OK", _edited(body, done_reason="load", response="")),
    "the reply twice": lambda body: _http("200 OK", body + b"\n" + body),
}
SLOW = ("never answers", "one byte at a time")


class ChaosProxy:
    """Forwards one request per connection to `upstream` and, by script, ruins the reply.

    Args:
        upstream: URL of the real server.
        choose: Fault of the n-th generation request, or None for an undisturbed one; names from FAULTS or SLOW.
        spare: Leave GET requests alone.
    """

    def __init__(self, upstream: str, choose: Callable[[int], str | None]) -> None:
        host, port = upstream.removeprefix("http://").split(":")
        self.upstream = (host, int(port))
        self.choose = choose
        self.served: Counter[str] = Counter()
        self.requests = 0
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while self.open:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                client.settimeout(30)
                request = _read_message(client)
                if request is None:
                    return
                fault = None
                if request.startswith(b"POST"):
                    with self.lock:
                        number, self.requests = self.requests, self.requests + 1
                    fault = self.choose(number)
                    with self.lock:
                        self.served[fault or "none"] += 1
                if fault == "never answers":
                    client.recv(1)
                    return
                with socket.create_connection(self.upstream, timeout=30) as server:
                    server.sendall(request.replace(b"Connection: keep-alive", b"Connection: close"))
                    reply = _read_message(server) or b""
                head, _, body = reply.partition(b"\r\n\r\n")
                if fault is None:
                    status = head.split(b"\r\n")[0].split(b" ", 1)[1].decode()
                    client.sendall(_http(status, body))
                elif fault == "one byte at a time":
                    for byte in _http("200 OK", body):
                        client.sendall(bytes([byte]))
                        time.sleep(0.05)
                elif (ruined := FAULTS[fault](body)) is None:
                    _reset(client)
                else:
                    client.sendall(ruined)
        except OSError:
            pass

    def close(self) -> None:
        self.open = False
        self.listener.close()


def _read_message(connection: socket.socket) -> bytes | None:
    """One HTTP message with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := connection.recv(65536)):
            return None
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < (int(lengths[0]) if lengths else 0):
        if not (chunk := connection.recv(65536)):
            break
        body += chunk
    return head + b"\r\n\r\n" + body


@pytest.fixture
def chaos() -> Iterator[Callable[..., ChaosProxy]]:
    """Start proxies that end with the test; `chaos.faults` are the kinds that cost no time, `chaos.slow` the others."""
    running: list[ChaosProxy] = []

    def start(upstream: str, choose: Callable[[int], str | None]) -> ChaosProxy:
        running.append(ChaosProxy(upstream, choose))
        return running[-1]

    start.faults, start.slow = tuple(FAULTS), SLOW  # type: ignore[attr-defined]
    yield start
    for proxy in running:
        proxy.close()


@pytest.fixture
def seeded() -> random.Random:
    """A seeded random generator."""
    return random.Random(20240506)
