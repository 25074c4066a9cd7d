"""OpenAI's API over the same models: /v1/models, /v1/chat/completions and /v1/completions.

Requests become Ollama's and are answered by the same code, as in Ollama's `openai/openai.go` and
`middleware/openai.go`. Beyond those, `/v1/completions` is what evaluation harnesses need: the prompt is a text or token
ids, one or several, and goes to the model as it is, without a template; with `echo` and `logprobs` the prompt's own
log-probabilities come back.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from grit_impl.serve import wire
from grit_impl.serve.models import Model, Models
from grit_impl.serve.wire import APIError, decode

Json = dict[str, Any]
Ask = Callable[[str, Json, Request], Awaitable[AsyncIterator[Json]]]
"""Answers one request of Ollama's API (`generate` or `chat`) in chunks, of which the last is done."""
_KINDS = {400: "invalid_request_error", 404: "not_found_error"}
_OPTIONS = {"max_tokens": "num_predict", "max_completion_tokens": "num_predict", "seed": "seed"} | {
    name: name for name in ("frequency_penalty", "presence_penalty")
}


def routes(models: Models, ask: Ask, body: Callable[[Request], Awaitable[bytes]]) -> list[Route]:
    """The endpoints.

    Args:
        models: What can be asked.
        ask: Answers a request.
        body: Reads a request's bytes.
    """

    async def listing(_: Request) -> Response:
        newest = sorted(models.by_key.values(), key=lambda model: model.modified, reverse=True)
        return JSONResponse({"object": "list", "data": [_model(model) for model in newest]})

    async def one(request: Request) -> Response:
        name = request.path_params["model"]
        model = models.find(name)
        if model is None:
            raise APIError(404, f"model '{name}' not found")
        return JSONResponse(_model(model) | {"id": name})

    async def chat(request: Request) -> Response:
        given = decode(await body(request), wire.OPENAI_CHAT, "ChatCompletionRequest")
        return await _answer(_Chat(given), [_from_chat(given)], ask, request)

    async def completions(request: Request) -> Response:
        given = decode(await body(request), wire.OPENAI_COMPLETION, "CompletionRequest")
        asked = _from_completion(given)
        if given.get("stream") and len(asked) > 1:
            raise APIError(400, "a stream answers one prompt")
        return await _answer(_Completion(given), asked, ask, request)

    return [
        Route("/v1/models", _guarded(listing), methods=["GET"]),
        Route("/v1/models/{model:path}", _guarded(one), methods=["GET"]),
        Route("/v1/chat/completions", _guarded(chat), methods=["POST"]),
        Route("/v1/completions", _guarded(completions), methods=["POST"]),
    ]


def error(failure: APIError) -> Json:
    """OpenAI's form of an error."""
    return {
        "error": {
            "message": failure.message,
            "type": _KINDS.get(failure.status, "api_error"),
            "param": None,
            "code": None,
        }
    }


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except APIError as failure:
            return JSONResponse(error(failure), status_code=failure.status)
        except ClientDisconnect:
            return JSONResponse(error(APIError(499, "request canceled")), status_code=499)

    return run


# -- requests ---------------------------------------------------------------------------------------------------------


def _shared(given: Json) -> Json:
    """What both kinds of request say in the same words."""
    if given.get("n", 1) != 1:
        raise APIError(400, "n must be 1")
    # OpenAI's defaults, whatever the model's parameters are.
    options: Json = {"temperature": given.get("temperature", 1.0), "top_p": given.get("top_p", 1.0)}
    options |= {theirs: given[ours] for ours, theirs in _OPTIONS.items() if ours in given}
    stop = given.get("stop")
    if stop is not None:
        texts = stop if isinstance(stop, list) else [stop]
        if not all(isinstance(text, str) for text in texts):
            raise APIError(400, "invalid type for 'stop' field")
        options["stop"] = texts
    return {"model": given.get("model", ""), "stream": bool(given.get("stream")), "options": options}


def _from_chat(given: Json) -> Json:
    request = _shared(given) | {"messages": [_message(each) for each in given.get("messages") or []]}
    if not request["messages"]:
        raise APIError(400, "messages must not be empty")
    kind = given.get("response_format") or {}
    if kind.get("type") == "json_object":
        request["format"] = "json"
    elif kind.get("type") == "json_schema":
        request["format"] = (kind.get("json_schema") or {}).get("schema")
    if given.get("tools"):
        request["tools"] = given["tools"]
    if given.get("reasoning_effort") not in (None, "", "none"):
        request["think"] = given["reasoning_effort"]
    if given.get("logprobs"):
        request |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    return request


def _message(value: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("content"), list):
        return value
    parts = value["content"]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise APIError(400, "invalid message format")
    return value | {"content": "\n".join(part["text"] for part in parts)}


def _from_completion(given: Json) -> list[Json]:
    prompts = given.get("prompt", "")
    several = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
    shared = _shared(given)
    if not given.get("echo") and given.get("max_tokens") == 0:
        raise APIError(400, "max_tokens is 0, so there is nothing to answer without echo")
    top = given.get("logprobs")
    if top is not None:
        shared |= {"logprobs": True, "top_logprobs": top}
    asked = []
    for prompt in prompts if several else [prompts]:
        ids = isinstance(prompt, list)
        if not (isinstance(prompt, str) or (ids and all(_token(each) for each in prompt))) or not prompt:
            raise APIError(400, "prompt must be a text, token ids, or a list of them, and none of them empty")
        asked.append(shared | {"prompt": prompt, "raw": True, "echo": bool(given.get("echo"))})
    return asked


def _token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


# -- answers ----------------------------------------------------------------------------------------------------------


class _Form:
    """How chunks are told: by subclass, that of a conversation or of a continued text."""

    kind, object, chunk_object = "", "", ""

    def __init__(self, given: Json) -> None:
        self.usage = bool((given.get("stream_options") or {}).get("include_usage"))
        self.head: Json = {
            "id": f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{secrets.token_hex(6)}",
            "object": self.chunk_object if given.get("stream") else self.object,
            "created": int(time.time()),
            "model": given.get("model", ""),
            "system_fingerprint": "fp_ollama",
        }
        self.begun = False

    def whole(self, chunks: list[Json], index: int) -> Json:
        """The choice that an answer makes."""
        raise NotImplementedError

    def part(self, chunk: Json) -> list[Json]:
        """The choices that a chunk of a stream makes, each an event of its own."""
        raise NotImplementedError


class _Chat(_Form):
    kind, object, chunk_object = "chat", "chat.completion", "chat.completion.chunk"

    def whole(self, chunks: list[Json], index: int) -> Json:
        text = "".join(chunk["message"]["content"] for chunk in chunks)
        choice: Json = {"index": index, "message": {"role": "assistant", "content": text}}
        return choice | {"finish_reason": chunks[-1].get("done_reason")} | self._logprobs(chunks)

    def part(self, chunk: Json) -> list[Json]:
        text, found = chunk["message"]["content"], self._logprobs([chunk])
        choices: list[Json] = []
        if text or found or not self.begun:
            delta = ({} if self.begun else {"role": "assistant"}) | {"content": text}
            choices.append({"index": 0, "delta": delta, "finish_reason": None, **found})
            self.begun = True
        if chunk["done"]:
            choices.append({"index": 0, "delta": {}, "finish_reason": chunk["done_reason"]})
        return choices

    def _logprobs(self, chunks: list[Json]) -> Json:
        found = [entry for chunk in chunks for entry in chunk.get("logprobs", [])]
        return {"logprobs": {"content": [{"top_logprobs": [], **entry} for entry in found]}} if found else {}


class _Completion(_Form):
    kind, object, chunk_object = "generate", "text_completion", "text_completion"

    def __init__(self, given: Json) -> None:
        super().__init__(given)
        self.offset = 0

    def whole(self, chunks: list[Json], index: int) -> Json:
        self.offset = 0
        text = "".join(chunk["response"] for chunk in chunks)
        choice = {"index": index, "text": text, "finish_reason": chunks[-1].get("done_reason")}
        return choice | {"logprobs": self._logprobs(chunks)}

    def part(self, chunk: Json) -> list[Json]:
        reason = chunk.get("done_reason") if chunk["done"] else None
        choice = {"index": 0, "text": chunk["response"], "finish_reason": reason}
        return [choice | {"logprobs": self._logprobs([chunk])}]

    def _logprobs(self, chunks: list[Json]) -> Json | None:
        """OpenAI's first form: columns; the likeliest tokens of each place by their text."""
        found = [entry for chunk in chunks for entry in chunk.get("logprobs", [])]
        if not found:
            return None
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in found:
            top: dict[str, float] = {}
            # Tokens of equal text: the likelier one counts. The token itself is always there, as OpenAI has it.
            for other in [*entry.get("top_logprobs", []), entry]:
                if other["logprob"] is not None:
                    top[other["token"]] = max(other["logprob"], top.get(other["token"], other["logprob"]))
            columns["tokens"].append(entry["token"])
            columns["token_logprobs"].append(entry["logprob"])
            columns["top_logprobs"].append(top or None)
            columns["text_offset"].append(self.offset)
            self.offset += len(entry["token"])
        return columns


async def _answer(form: _Form, asked: list[Json], ask: Ask, request: Request) -> Response:
    if asked[0]["stream"]:
        return StreamingResponse(_events(form, await ask(form.kind, asked[0], request)), media_type="text/event-stream")
    choices, counts = [], [0, 0]
    for index, each in enumerate(asked):
        chunks = [chunk async for chunk in await ask(form.kind, each, request)]
        choices.append(form.whole(chunks, index))
        counts = [a + b for a, b in zip(counts, _counts(chunks[-1]), strict=True)]
    return JSONResponse(form.head | {"choices": choices, "usage": _usage(counts)})


async def _events(form: _Form, chunks: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            for choice in form.part(chunk):
                yield _event(form.head | {"choices": [choice]})
            if chunk["done"] and form.usage:
                yield _event(form.head | {"choices": [], "usage": _usage(_counts(chunk))})
        yield b"data: [DONE]\n\n"
    except APIError as failure:
        yield _event(error(failure))
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


def _event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _counts(chunk: Json) -> list[int]:
    return [int(chunk.get("prompt_eval_count", 0)), int(chunk.get("eval_count", 0))]


def _usage(counts: list[int]) -> dict[str, int]:
    return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}


def _model(model: Model) -> Json:
    created = int(datetime.fromisoformat(model.modified).timestamp())
    return {"id": model.name.full, "object": "model", "created": created, "owned_by": model.name.namespace or "library"}
