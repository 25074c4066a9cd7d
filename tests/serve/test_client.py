"""The client against a scripted server: what is an answer, what is a fault, and what the user is told."""

from __future__ import annotations

import time

import pytest

from grit_impl.errors import GRITError
from grit_impl.serve.client import Endpoint, Fault, Unanswered, _read_reply, full_name, server_url

GREEDY = {"temperature": 0.0, "num_predict": 8}


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost", "http://localhost:11434"),
        ("localhost:80", "http://localhost:80"),
        (":9000", "http://127.0.0.1:9000"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://gpu.example", "http://gpu.example"),
        ("https://gpu.example:8443/ollama/", "https://gpu.example:8443/ollama"),
        ("[::1]:11434", "http://[::1]:11434"),
    ],
)
def test_addresses(given: str, url: str) -> None:
    """Oracle: what Ollama's own envconfig.Host makes of them (a bare host has port 11434, an http URL port 80)."""
    assert server_url(given) == url


@pytest.mark.parametrize("given", ["ftp://x", "http://x:port", "http://x:99999"])
def test_bad_addresses_are_named(given: str) -> None:
    """Oracle: one line with the address and the remedy."""
    with pytest.raises(GRITError, match="is not an Ollama address"):
        server_url(given)


def test_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: OLLAMA_HOST, as for every Ollama client; an argument wins."""
    monkeypatch.setenv("OLLAMA_HOST", "example:1234")
    assert server_url() == "http://example:1234"
    assert server_url("other") == "http://other:11434"


def test_names() -> None:
    """Oracle: Ollama's rule; a colon in the registry's host is no tag."""
    assert full_name("llama") == "llama:latest"
    assert full_name("llama:8b") == "llama:8b"
    assert full_name("host:5000/llama") == "host:5000/llama:latest"


def test_unreachable_server_is_one_line() -> None:
    """Oracle: nothing listens on port 1; the message names the address and three remedies, after a bounded wait."""
    start = time.monotonic()
    with Endpoint("127.0.0.1:1", attempts=3, backoff=0.01) as endpoint, pytest.raises(GRITError) as caught:
        endpoint.version()
    assert "no Ollama server answers at http://127.0.0.1:1" in str(caught.value)
    assert "ollama serve" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5


def test_missing_model_is_one_line(fake_ollama) -> None:
    """Oracle: the server has base and baseline, not pure."""
    server = fake_ollama(lambda model, prompt: "x")
    with Endpoint(server.url) as endpoint:
        assert endpoint.require(["base", "baseline:latest"]) == {"base": "d0", "baseline:latest": "d1"}
        with pytest.raises(GRITError, match=r"model 'pure' is not on .*base:latest, baseline:latest"):
            endpoint.require(["pure"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_answer(fake_ollama, stream: bool) -> None:
    """Oracle: what the fake was asked and what it said, word for word."""
    server = fake_ollama(lambda model, prompt: f"{model} heard {prompt}")
    with Endpoint(server.url) as endpoint:
        reply = endpoint.generate("base", "one two", GREEDY, stream=stream)
    assert reply.text == "base heard one two"
    assert (reply.eval_count, reply.done_reason, reply.faults) == (4, "stop", [])
    assert reply.tokens_per_second == pytest.approx(100)
    (request,) = server.requests
    assert request["prompt"] == "one two"
    assert request["truncate"] is False
    assert request["shift"] is False
    assert "raw" not in request, "the model's template must be applied"
    assert request["options"] == GREEDY


@pytest.mark.parametrize("kept", [1, 4])
def test_faults_are_retried(fake_ollama, chaos, kept: int) -> None:
    """Oracle: with k faults before it, the good answer comes at attempt k + 1 and the faults are on record."""
    server = fake_ollama(lambda model, prompt: "right")
    proxy = chaos(server.url, lambda n: "503" if n < kept else None)
    with Endpoint(proxy.url, backoff=0.01) as endpoint:
        reply = endpoint.generate("base", "one", GREEDY)
    assert (reply.text, reply.faults) == ("right", ["http-503"] * kept)


def test_attempts_are_bounded(fake_ollama, chaos) -> None:
    """Oracle: the proxy's own count of requests."""
    proxy = chaos(fake_ollama(lambda model, prompt: "x").url, lambda n: "reset")
    with Endpoint(proxy.url, attempts=3, backoff=0.01) as endpoint, pytest.raises(Unanswered, match="3 attempts"):
        endpoint.generate("base", "one", GREEDY)
    assert proxy.requests == 3


@pytest.mark.parametrize("stream", [False, True])
def test_every_fault_kind_is_noticed(fake_ollama, chaos, stream: bool) -> None:
    """Oracle: the fault was injected, so an answer would be wrong; one good reply after it must be accepted."""
    server = fake_ollama(lambda model, prompt: "AQI 57 (Moderate) as asked")
    missed = []
    for fault in chaos.faults:
        proxy = chaos(server.url, lambda n, fault=fault: fault if n == 0 else None)
        with Endpoint(proxy.url, backoff=0.001) as endpoint:
            reply = endpoint.generate("base", "one two three", GREEDY, stream=stream)
        if reply.text != "AQI 57 (Moderate) as asked" or len(reply.faults) != 1:
            missed.append((fault, reply))
    assert not missed


def test_slow_servers_cost_one_timeout(fake_ollama, chaos) -> None:
    """Oracle: the clock; a server that dribbles bytes for twenty seconds resets a read timeout each time, but not the
    deadline."""
    server = fake_ollama(lambda model, prompt: "right")
    for fault in chaos.slow:
        proxy = chaos(server.url, lambda n, fault=fault: fault if n == 0 else None)
        start = time.monotonic()
        with Endpoint(proxy.url, timeout=0.5, backoff=0.001) as endpoint:
            reply = endpoint.generate("base", "one", GREEDY)
        assert (reply.text, reply.faults) == ("right", ["timeout"]), fault
        assert time.monotonic() - start < 3


def test_refused_requests_are_not_repeated(fake_ollama) -> None:
    """Oracle: 400 says that this very request is impossible (here: too long), so one try is enough."""
    server = fake_ollama(lambda model, prompt: "x")
    server.reply = lambda request: (_ for _ in ()).throw(AssertionError)
    seen = []

    class Refusing(Endpoint):
        def _send(self, method, path, body):
            seen.append(path)
            raise Fault("http-400", "HTTP 400: input exceeds the context", retry=False)

    with Refusing(server.url) as endpoint, pytest.raises(Unanswered, match="exceeds the context"):
        endpoint.generate("base", "one", GREEDY)
    assert len(seen) == 1


def test_an_immediate_end_is_an_answer_once_it_is_confirmed(fake_ollama) -> None:
    """Oracle: a model whose first token is the end says nothing, every time; lost text comes with its counters."""
    server = fake_ollama(lambda model, prompt: "")
    with Endpoint(server.url, backoff=0.001) as endpoint:
        reply = endpoint.generate("base", "one", GREEDY)
        assert (reply.text, reply.faults, len(server.requests)) == ("", ["empty"], 2)
        server.edit = lambda request, whole: {**whole, "eval_count": 7}
        with pytest.raises(Unanswered, match="no text"):
            endpoint.generate("base", "one", GREEDY)


def test_a_cut_prompt_is_no_measurement() -> None:
    """Oracle: llama.cpp's tokenizers never join words, so 10 words are at least 10 tokens."""
    body = b'{"model": "m", "response": "x", "done": true, "prompt_eval_count": %d, "eval_count": 1}'
    assert _read_reply(body % 10, "m", "w " * 10, GREEDY)["text"] == "x"
    with pytest.raises(Fault, match="only 9 prompt tokens"):
        _read_reply(body % 9, "m", "w " * 10, GREEDY)


def test_one_token_has_no_speed(fake_ollama) -> None:
    """Oracle: Ollama reports 1000 ns for the first token, which would read as a million tokens per second."""
    server = fake_ollama(lambda model, prompt: "one")
    server.edit = lambda request, whole: {**whole, "eval_duration": 1000}
    with Endpoint(server.url) as endpoint:
        rate = endpoint.generate("base", "x", GREEDY).tokens_per_second
    assert rate != rate
