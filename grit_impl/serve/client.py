"""A distrustful client for the Ollama HTTP API: an answer is either whole and coherent, or it is a fault.

A measurement must not depend on the weather between two processes. Every reply is therefore checked: it is JSON, it is
finished, it comes from the model that was asked, its counters fit its text, and the prompt was not cut. Anything else
is a `Fault`, which is retried with exponential backoff and full jitter (tenacity) and, at worst, reported as a fault;
it never becomes an answer.

API: https://github.com/ollama/ollama/blob/main/docs/api.md. The `ollama` package speaks it as well, but cannot send
`truncate: false` to /api/generate, without which the server cuts long prompts silently; so this is `httpx`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import httpx
from anyio.from_thread import start_blocking_portal
from tenacity import RetryError, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from grit_impl.errors import GRITError
from grit_impl.serve.connection import client_options, find_server, reason
from grit_impl.serve.wire import REPEATS

MAX_BODY = 8 * 2**20
"""Bytes: no evaluation answer is longer, an endless stream of garbage is."""
T = TypeVar("T")
PREFLIGHT = 4
"""Attempts at a server that may not be there at all: the user waits for the message."""


class Fault(Exception):
    """One request that gave no trustworthy answer.

    Attributes:
        kind: Short id, e.g. `timeout`, `http-503`, `not-json`, `incomplete`, `wrong-model`, `empty`.
        retry: Whether the same request may succeed later.
    """

    def __init__(self, kind: str, message: str, retry: bool = True) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry = retry


class Unanswered(Exception):
    """A request that stayed faulty through all attempts; `faults` are the kinds, in order."""

    def __init__(self, message: str, faults: list[str]) -> None:
        super().__init__(message)
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Reply:
    """One finished generation.

    Attributes:
        text: What the model wrote; empty only if the server confirmed it in a second request.
        done_reason: `stop` or `length` (the answer was cut at `num_predict`).
        prompt_eval_count: Prompt tokens, with the template's; 0 if the server does not tell.
        eval_count: Generated tokens.
        eval_duration: Nanoseconds spent on generating; the first token is free, so the rate is
            `(eval_count - 1) / eval_duration`.
        prompt_eval_duration: Nanoseconds spent on the prompt.
        load_duration: Nanoseconds spent on loading the model.
        seconds: Wall time of the successful request.
        logprobs: The tokens of the text, their log-probabilities and leads over the likeliest other token (nats), where
            they were asked for; without `top_logprobs` there is no lead.
        faults: Kinds of the failed attempts before it.
        thinking: What it wrote before the answer, where a model thinks although it was asked not to.
    """

    text: str
    done_reason: str
    prompt_eval_count: int
    eval_count: int
    eval_duration: int
    prompt_eval_duration: int
    load_duration: int
    seconds: float
    logprobs: list[tuple[str, float, float | None]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    thinking: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Generation rate by the server's own counters; NaN below two tokens, whose duration means nothing."""
        if self.eval_count < 2 or self.eval_duration <= 0:
            return float("nan")
        return (self.eval_count - 1) / self.eval_duration * 1e9


def server_url(value: str | None = None) -> str:
    """The base URL, without credentials, from an argument, else from OLLAMA_HOST, else Ollama's default.

    Raises:
        GRITError: the value is not a http(s) address.
    """
    return find_server(value).url


def full_name(model: str) -> str:
    """Ollama's name for a model: without a tag it is `:latest`."""
    return model if ":" in model.rsplit("/", 1)[-1] else f"{model}:latest"


class Endpoint:
    """One Ollama server. Safe to use from several threads.

    Args:
        url: Address, see `connection.find_server`.
        timeout: Seconds that one request may take as a whole, loading the model included.
        attempts: How often a faulty request is sent before it counts as unanswered.
        backoff: Seconds; the wait before attempt k is uniform in [0, backoff * 2**k].
        backoff_max: Seconds; upper limit of one wait.
        connections: Requests in flight at most.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 0.25,
        backoff_max: float = 8.0,
        connections: int = 16,
    ) -> None:
        if timeout <= 0 or attempts < 1 or backoff < 0 or connections < 1:
            raise GRITError("timeout, attempts and connections must be positive, backoff not negative")
        server = find_server(url)
        options = client_options(server)
        self.url = server.url
        self._thinking: set[str] = set()
        self.timeout, self.attempts = timeout, attempts
        self._wait = wait_random_exponential(multiplier=backoff, max=backoff_max)
        # Asynchronous inside, because only cancellation bounds a whole request: a server that sends a byte now and then
        # never runs into a read timeout.
        self._exit = ExitStack()
        self._portal = self._exit.enter_context(start_blocking_portal())
        self._http = httpx.AsyncClient(
            **options,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0)),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    counts_time = True
    """Whether the server says how long it took to generate, without which there is no speed."""

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        try:
            self._portal.call(self._http.aclose)
        finally:
            self._exit.close()

    # -- what the server has ------------------------------------------------------------------------------------------

    def version(self) -> str:
        """The server's version.

        Raises:
            GRITError: nothing that speaks Ollama's API answers.
        """
        return str(self._get("/api/version", "version"))

    def models(self) -> dict[str, str]:
        """Digest of every model on the server, by full name (`name:tag`).

        Raises:
            GRITError: nothing that speaks Ollama's API answers.
        """
        listed = self._get("/api/tags", "models")
        return {full_name(str(m.get("model") or m.get("name"))): str(m.get("digest", "")) for m in listed or []}

    def require(self, names: list[str]) -> dict[str, str]:
        """Digests of the named models.

        Raises:
            GRITError: one of them is not on the server.
        """
        present = self.models()
        for name in names:
            if full_name(name) not in present:
                have = ", ".join(sorted(present)) or "none"
                raise GRITError(f"model {name!r} is not on {self.url} (it has: {have}): create it with `ollama create`")
        return {name: present[full_name(name)] for name in names}

    def loaded(self) -> set[str] | None:
        """Full names of the models that are in memory; None if the server does not say."""
        with suppress(GRITError):
            return {full_name(str(m.get("model") or m.get("name"))) for m in self._get("/api/ps", "models") or []}
        return None

    def details(self, name: str) -> dict[str, str]:
        """What the server says of a model's `family`, `parameter_size` and `quantization_level`; empty if nothing."""
        with suppress(GRITError):
            found = self._ask("POST", "/api/show", {"model": name}).get("details")
            names = ("family", "parameter_size", "quantization_level")
            return {key: str(found[key]) for key in names if key in found} if isinstance(found, dict) else {}
        return {}

    def unload(self, name: str) -> None:
        """Have a model removed from memory; a server that cannot keeps it."""
        self._order("POST", "/api/generate", {"model": name, "keep_alive": 0, "stream": False})

    def copy(self, source: str, destination: str) -> bool:
        """Give a model a second name; whether there is one now."""
        return self._order("POST", "/api/copy", {"source": source, "destination": destination})

    def remove(self, name: str) -> None:
        """Take a name away."""
        self._order("DELETE", "/api/delete", {"model": name})

    def _order(self, method: str, path: str, body: dict[str, Any]) -> bool:
        with suppress(Unanswered):
            self._retry(lambda: self._send(method, path, body), [], min(self.attempts, PREFLIGHT))
            return True
        return False

    def find_thinking(self, names: Iterable[str]) -> list[str]:
        """Those of the named models that think before they answer, which `generate` then asks not to."""
        for name in names:
            # A server of before 2025 does not tell, and has no such models.
            with suppress(GRITError):
                found = self._ask("POST", "/api/show", {"model": name}).get("capabilities")
                if isinstance(found, list) and "thinking" in found:
                    self._thinking.add(name)
        return sorted(self._thinking)

    def _get(self, path: str, key: str) -> Any:
        return self._ask("GET", path, None, key)[key]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, key: str | None = None) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            value = one_json(self._send(method, path, body))
            if key is not None and key not in value:
                raise Fault("not-json", f"{path} has no {key!r}")
            return value

        try:
            return self._retry(ask, [], min(self.attempts, PREFLIGHT))
        except Unanswered as error:
            raise GRITError(
                f"no Ollama server answers at {self.url} ({error}): start `ollama serve` or `grit serve`, "
                "or set --ollama-url or OLLAMA_HOST"
            ) from None

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        model: str,
        prompt: str,
        options: Mapping[str, Any],
        *,
        stream: bool = False,
        keep_alive: str = "10m",
        **fields: Any,
    ) -> Reply:
        """Ask one prompt, through the model's own template.

        Args:
            model: Name on the server.
            prompt: The instruction, not wrapped in a template.
            options: Ollama's options; `num_predict` bounds the answer.
            stream: Ask for chunks instead of one object. The checks are the same.
            keep_alive: How long the server keeps the model loaded.
            **fields: Further fields of the request: `system`, `think`, `format`, `logprobs`.

        Raises:
            Unanswered: every attempt was faulty, or the server refuses this request (400, 413).
        """
        body = {
            "model": model,
            "prompt": prompt,
            "stream": stream,
            "truncate": False,
            "shift": False,
            "keep_alive": keep_alive,
            "options": dict(options),
            **({"think": False} if model in self._thinking else {}),
            **fields,
        }
        faults: list[str] = []
        empty_before = False

        def ask() -> Reply:
            nonlocal empty_before
            start = time.perf_counter()
            reply = self._exchange(body)
            if not reply["text"]:
                # A model may end its answer at once. A broken server may lose the text. Only the first is repeatable
                # with counters that say "nothing was generated".
                if reply["eval_count"] > 1 or not empty_before:
                    empty_before = reply["eval_count"] <= 1
                    raise Fault("empty", "the answer has no text")
            else:
                empty_before = False
            return Reply(**reply, seconds=time.perf_counter() - start, faults=faults)

        return self._retry(ask, faults, self.attempts)

    def _exchange(self, body: dict[str, Any]) -> dict[str, Any]:
        """One attempt at a question: the fields of its `Reply`, or a `Fault`."""
        received = self._send("POST", "/api/generate", body)
        return _read_reply(received, body["model"], body["prompt"], body["options"])

    def _retry(self, ask: Callable[[], T], faults: list[str], attempts: int) -> T:
        try:
            for attempt in Retrying(
                stop=stop_after_attempt(attempts),
                wait=self._wait,
                retry=retry_if_exception(lambda e: isinstance(e, Fault) and e.retry),
            ):
                with attempt:
                    try:
                        return ask()
                    except Fault as fault:
                        faults.append(fault.kind)
                        raise
        except RetryError as error:
            last = error.last_attempt.exception()
            raise Unanswered(f"{last}, {len(faults)} attempts", faults) from None
        except Fault as fault:
            raise Unanswered(str(fault), faults) from None
        raise AssertionError("tenacity returns or raises")

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """The body of a 200 reply, whole and in time; anything else raises `Fault`."""
        try:
            answer: tuple[int, bytes] = self._portal.call(self._receive, method, path, body)
        except (TimeoutError, httpx.TimeoutException):
            raise Fault("timeout", f"no whole answer within {self.timeout:g} s") from None
        except (httpx.ConnectError, httpx.ProxyError) as error:
            raise Fault("unreachable", reason(error)) from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise Fault("dropped", f"the connection broke ({type(error).__name__})") from None
        status, received = answer
        if status != 200:
            text = " ".join(received[:200].decode("utf-8", "replace").split())
            if status in (401, 403):
                text += "; OLLAMA_API_KEY, or user:password@ in the address, says who asks"
            raise Fault(f"http-{status}", f"HTTP {status}: {text}", retry=status not in (400, 401, 403, 405, 413))
        return received

    async def _receive(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        received = bytearray()
        with anyio.fail_after(self.timeout):
            async with self._http.stream(method, path, json=body) as response:
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > MAX_BODY:
                        raise Fault("oversized", f"more than {MAX_BODY} bytes")
                if response.has_redirect_location:
                    raise Fault("redirect", f"it redirects to {response.headers['location']}; use that address", False)
                return response.status_code, bytes(received)


def one_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, or a `Fault`."""
    try:
        value = json.loads(body)
    except ValueError:
        raise Fault("not-json", "the answer is not JSON") from None
    if not isinstance(value, dict):
        raise Fault("not-json", "the answer is not a JSON object")
    if "error" in value:
        raise Fault("streamed-error", f"the server reports {value['error']!r}")
    return value


def _read_reply(body: bytes, model: str, prompt: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Reply` from one JSON object or from a stream of them, or a `Fault`."""
    parts = [one_json(line) for line in body.splitlines() if line.strip()]
    text = "".join(part["response"] for part in parts if isinstance(part.get("response"), str))
    if parts and parts[-1].get("done") is False and _repeats(text):
        # Ollama ends such an answer in silence, every time.
        raise Fault("repeats", f"the model says {text.split()[-1:]} until the server's token repeat limit", retry=False)
    if not parts or parts[-1].get("done") is not True or any(p.get("done") is not False for p in parts[:-1]):
        raise Fault("incomplete", "the answer is not finished")
    for part in parts:
        if full_name(str(part.get("model"))) != full_name(model):
            raise Fault("wrong-model", f"asked {model!r}, {part.get('model')!r} answered")
        if not isinstance(part.get("response", "" if part["done"] else None), str):
            raise Fault("incomplete", "the answer has no 'response'")
    last = parts[-1]
    names = ("prompt_eval_count", "eval_count", "eval_duration", "prompt_eval_duration", "load_duration")
    # Go omits zero fields.
    counters = {name: last.get(name, 0) for name in names}
    if any(not isinstance(v, int) or isinstance(v, bool) or v < 0 for v in counters.values()):
        raise Fault("bad-counters", "a counter is not a whole number")
    ended = last.get("done_reason", "stop")
    if ended not in ("stop", "length"):
        raise Fault("incomplete", f"the server did not generate (done_reason {ended!r})")
    thinking = "".join(part["thinking"] for part in parts if isinstance(part.get("thinking"), str))
    limit = int(options.get("num_predict", -1))
    if (text and counters["eval_count"] < 1) or (0 <= limit < counters["eval_count"]):
        raise Fault("bad-counters", f"eval_count {counters['eval_count']} does not fit the answer")
    # Every word is at least one token, so a smaller count means that the server dropped a part of the prompt.
    if 0 < counters["prompt_eval_count"] < len(prompt.split()):
        raise Fault("truncated-prompt", f"only {counters['prompt_eval_count']} prompt tokens were read")
    logprobs = [_logprob(entry) for part in parts for entry in part.get("logprobs") or []]
    if not thinking and not text.lstrip().startswith("<think>") and "</think>" not in text:
        return {"text": text, "done_reason": ended, "logprobs": logprobs, **counters}
    # The server of such a model may leave the thoughts in the answer, and the template may have opened them.
    thought, closed, answer = text.rpartition("</think>")
    if not closed and text.lstrip().startswith("<think>"):
        thought, answer = text, ""
    if not answer.strip():
        raise Fault(
            "only-thought",
            f"the model only thought ({counters['eval_count']} tokens) and did not answer: allow it more tokens, "
            "or use a model that can be asked not to think",
            retry=False,
        )
    return {
        "text": answer.lstrip() if closed else answer,
        "thinking": thinking or thought,
        "done_reason": ended,
        **counters,
    }


def _repeats(text: str) -> bool:
    """Whether a text ends with the same token so often that Ollama stops it (`llm/llama_server.go`)."""
    said = "".join(text.split())
    return bool(re.search(rf"(.{{1,64}}?)\1{{{REPEATS - 1}}}$", said)) or len(text) - len(text.rstrip()) >= REPEATS


def _logprob(entry: Any) -> tuple[str, float, float | None]:
    try:
        token, logprob = str(entry["token"]), float(entry["logprob"])
        others = [float(each["logprob"]) for each in entry.get("top_logprobs") or () if each["token"] != token]
        return token, logprob, logprob - max(others) if others else None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Fault("bad-logprobs", "a log-probability is no number") from None
