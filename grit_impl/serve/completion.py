"""/api/generate and /api/chat: from a request to a prompt, from llama.cpp's chunks to Ollama's.

Source: Ollama's `server/routes.go`, `server/prompt.go` and `llm/llama_server.go` (0.30 and later, where every GGUF runs
in llama.cpp's server).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from grit_impl.gguf.gotemplate import Message, Template, TemplateError
from grit_impl.serve.engine import Engine, Engines
from grit_impl.serve.models import Model, Models
from grit_impl.serve.wire import MESSAGE, REPEATS, APIError, now, parse_keep_alive, parse_options, typed

# A generation without num_predict ends after this many context windows (`openEndedGenerationContextMultiplier`).
OPEN_ENDED = 10
WHOLE = 512
"""Tokens up to which an answer that is not streamed comes as one reply. A chunk per token costs a fifth of the
throughput of a small model; a model that repeats itself is noticed when it has ended instead of on the way."""
REUSE = False
"""Whether the beginning that a prompt shares with the last one in its slot is kept. Ollama does. It changes the shapes
of the matrix products and with them the last bits: an answer then depends on what was asked before."""
CONTROL = 3
"""Type of a token that marks, as GGUF has it."""
FEW = 8
"""Distinct tokens, at most, in a run of one text with and without spaces around it."""
TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the "
    "context length in settings, or use a model with a longer context length"
)
JSON_GRAMMAR = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? ws "}"
array  ::= "[" ws ( value ("," ws value)* )? ws "]"
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F]) )* "\""
number ::= ("-"? ([0-9] | [1-9] [0-9]*)) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
ws     ::= ([ \t\n] ws)?
"""


@dataclass
class Job:
    """One request to generate or chat, validated as far as it can be without loading the model."""

    kind: str
    request: dict[str, Any]
    model: Model
    keep_alive: float | None
    options: dict[str, Any]
    started: float = field(default_factory=time.monotonic)

    @property
    def stream(self) -> bool:
        """Whether the answer comes in chunks."""
        return bool(self.request.get("stream", True))

    @property
    def truncate(self) -> bool:
        """Whether a prompt that is too long is cut (Ollama's default) or refused."""
        return bool(self.request.get("truncate", True))

    def envelope(self, text: str, *, done: bool, **extra: Any) -> dict[str, Any]:
        """A chunk in the shape of this endpoint."""
        body: dict[str, Any] = {"model": self.request["model"], "created_at": now()}
        if self.kind == "generate":
            body["response"] = text
        else:
            body["message"] = {"role": "assistant", "content": text}
        return {**body, "done": done, **extra}


def prepare(models: Models, kind: str, request: dict[str, Any]) -> Job | dict[str, Any]:
    """Validate a request. Raises `APIError` as Ollama does, in the same order."""
    if not 0 <= request.get("top_logprobs", 0) <= 20:
        raise APIError(400, "top_logprobs must be between 0 and 20")
    keep_alive = parse_keep_alive(request.get("keep_alive"))
    name = request.setdefault("model", "")
    if kind == "chat" and not name:
        raise APIError(400, "model is required")
    model = models.find(name)
    if model is None:
        raise APIError(404, f"model '{name}' not found")
    empty = not request.get("prompt") if kind == "generate" else not request.get("messages")
    job = Job(kind, request, model, keep_alive, model.options)
    if empty and keep_alive == 0:
        return job.envelope("", done=True, done_reason="unload")
    if request.get("raw") and (request.get("template") or request.get("system") or request.get("context")):
        raise APIError(400, "raw mode does not support template, system, or context")
    if kind == "chat":
        request["messages"] = [_message(m) for m in request.get("messages") or []]
    if request.get("think"):
        raise APIError(400, f'"{name}" does not support thinking')
    if model.metadata.get("general.type") == "adapter":
        raise APIError(400, f'"{name}" does not support {kind}')
    if request.get("tools"):
        raise APIError(400, f"{model.name.full} does not support tools")
    if request.get("suffix") and not (model.template and ".Suffix" in model.template.source):
        raise APIError(400, f"{model.name.full} does not support insert")
    job.options = parse_options(model.parameters, request.get("options") or {})
    _format(request.get("format"))
    return job


async def answer(engines: Engines, job: Job) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a job's answer; the last has `done: true`. Raises `APIError` before or between chunks."""
    model = job.model
    async with engines.use(
        model.name.key, model.gguf, model.adapter, model.trained_context, job.options, job.keep_alive
    ) as engine:
        loaded = time.monotonic()
        if not (job.request.get("prompt") if job.kind == "generate" else job.request["messages"]):
            yield job.envelope("", done=True, done_reason="load")
            return
        prompt = await _prompt(engine, job)
        if job.request.get("_debug_render_only"):
            chunk = job.envelope("", done=False)
            yield {**chunk, "_debug_info": {"rendered_template": prompt}}
            return
        if job.request.get("echo"):
            yield (chunk := await _echo(engine, job, prompt))
            if chunk["done"]:
                return
        body = await _body(engine, job, prompt)
        body["stream"] = job.stream or body["n_predict"] > WHOLE
        body["return_tokens"] = not body["stream"]
        said: list[str] = []
        repeats = Repeats()
        async for chunk in engine.complete(body):
            text = str(chunk.get("content", ""))
            said.append(text)
            pieces = [text] if body["stream"] else await _suspects(engine, chunk.get("tokens") or [])
            if (over := next((n for n, piece in enumerate(pieces) if repeats.over(piece)), None)) is not None:
                # Ollama ends such an answer in silence: its last chunk is not done.
                if not body["stream"] or not any(said[:-1]):
                    yield job.envelope("" if body["stream"] else "".join(pieces[:over]), done=False)
                return
            logprobs = _logprobs(chunk.get("completion_probabilities"), job.request.get("top_logprobs", 0))
            extra = {"logprobs": logprobs} if logprobs else {}
            if not chunk.get("stop"):
                if text or logprobs:
                    yield job.envelope(text, done=False, **extra)
                continue
            final = _metrics(chunk, job.started, loaded)
            if job.kind == "generate" and not job.request.get("raw"):
                final["context"] = await engine.tokenize(str(prompt) + "".join(said))
            yield job.envelope(text, done=True, **extra, **final)
            return
        raise APIError(500, "the model stopped without finishing its answer")


@dataclass
class Repeats:
    """Counts how often the same text, but for spaces around it, was said in a row."""

    last: str = ""
    count: int = 0

    def over(self, text: str) -> bool:
        """Whether this token's text ends the answer, as it does in Ollama's `llm/llama_server.go`."""
        self.count = self.count + 1 if text.strip() == self.last else 0
        self.last = text.strip()
        return self.count > REPEATS


async def _suspects(engine: Engine, tokens: list[int]) -> list[str]:
    """The texts of an answer's tokens, if it may repeat itself; most answers do not, and their tokens stay unread."""
    window = REPEATS + 1
    if not any(len(set(tokens[i : i + window])) <= FEW for i in range(len(tokens) - window + 1)):
        return []
    texts = {token: await engine.detokenize([token]) for token in dict.fromkeys(tokens)}
    return [texts[token] for token in tokens]


def gather(job: Job, chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The single answer of a request with `stream: false`."""
    whole = dict(chunks[-1])
    logprobs = [entry for chunk in chunks for entry in chunk.get("logprobs", [])]
    if job.kind == "generate":
        whole["response"] = "".join(chunk["response"] for chunk in chunks)
    else:
        whole["message"] = {"role": "assistant", "content": "".join(chunk["message"]["content"] for chunk in chunks)}
    return {**whole, "logprobs": logprobs} if logprobs else whole


async def _echo(engine: Engine, job: Job, prompt: str | list[int]) -> dict[str, Any]:
    """The prompt itself, as the first chunk; with `logprobs`, those of its tokens."""
    bos = isinstance(prompt, str) and job.model.leading_bos
    tokens = await engine.tokenize(prompt, special=True) if isinstance(prompt, str) else prompt
    if len(tokens) >= engine.settings.context:
        raise APIError(400, TOO_LONG)
    text = prompt if isinstance(prompt, str) else await engine.detokenize(tokens)
    extra: dict[str, Any] = {}
    if job.request.get("logprobs"):
        top = job.request["top_logprobs"]
        found = await _given(engine, job.model, tokens, max(top, 1))
        first = [] if bos else [{"token": await engine.detokenize(tokens[:1]), "logprob": None, "bytes": None}]
        extra["logprobs"] = [*first, *_logprobs(found, top)]
    if job.options["num_predict"] != 0:
        return job.envelope(text, done=False, **extra)
    return job.envelope(text, done=True, done_reason="length", prompt_eval_count=len(tokens), **extra)


async def _given(engine: Engine, model: Model, tokens: list[int], top: int) -> list[dict[str, Any]]:
    """What llama.cpp says of the probability of each token but the first, given those before it.

    It tells probabilities of what it generates, as they are before sampling, so it is left no choice: by a grammar of
    token ids, which may hold no token that ends texts; such a one, and its like, is generated alone.
    """
    control = _vocabulary(model)[1]
    found: list[dict[str, Any]] = []
    while (done := len(found) + 1) < len(tokens):
        alone = tokens[done] in control
        rest = tokens[done : done + 1] if alone else list(takewhile(lambda token: token not in control, tokens[done:]))
        force: dict[str, Any] = {"logit_bias": [[rest[0], 1e6]]} if alone else {"grammar": _exactly(rest)}
        body = {
            "prompt": tokens[:done], "n_predict": len(rest), "n_probs": top, "temperature": 0.0, "cache_prompt": False,
            "stream": False, **force,
        }  # fmt: skip
        fresh = [entry async for part in engine.complete(body) for entry in part.get("completion_probabilities") or []]
        if [entry["id"] for entry in fresh] != rest:
            raise APIError(500, "llama.cpp gives no log-probabilities of this prompt")
        found += fresh
    return found


def _exactly(tokens: list[int]) -> str:
    return f"root ::= {' '.join(f'<[{token}]>' for token in tokens)}"


async def _prompt(engine: Engine, job: Job) -> str | list[int]:
    request, model = job.request, job.model
    if request.get("raw"):
        raw: str | list[int] = request["prompt"]
        return raw
    template = model.template
    if source := request.get("template"):
        try:
            template = Template(source)
        except TemplateError as error:
            # Ollama gives 500 for a template in the request that does not parse.
            raise APIError(500, str(error)) from error
    if request.get("suffix") and template is not None:
        return _rendered(lambda: template.render_fill(request["prompt"], request["suffix"]))
    prompt = await _chat_prompt(engine, job, template, _messages(job))
    if request.get("context"):
        earlier = request["context"]
        if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in earlier):
            raise APIError(400, "json: cannot unmarshal into Go struct field GenerateRequest.context of type int")
        prompt = await engine.detokenize(earlier) + prompt
    return prompt


def _messages(job: Job) -> list[Message]:
    request, model = job.request, job.model
    if job.kind == "chat":
        messages = [*model.messages, *request["messages"]]
        system = model.system if request["messages"][0]["role"] != "system" else ""
    else:
        messages = [*([] if request.get("context") is not None else model.messages)]
        messages.append({"role": "user", "content": request["prompt"]})
        system = request.get("system") or model.system
    return [{"role": "system", "content": system}, *messages] if system else messages


async def _chat_prompt(engine: Engine, job: Job, template: Template | None, messages: list[Message]) -> str:
    """Render the conversation; with `truncate`, drop the oldest messages until it fits (`chatPrompt`)."""

    async def render(chosen: list[Message]) -> str:
        if template is not None:
            return _rendered(lambda: template.render(chosen))
        return await engine.apply_template([{"role": m["role"], "content": m["content"]} for m in chosen])

    prompt = await render(messages)
    for start in range(1, len(messages)):
        if not job.truncate or len(prompt.encode()) <= engine.settings.context:
            break
        if len(await engine.tokenize(prompt)) <= engine.settings.context:
            break
        kept = [m for m in messages[:start] if m["role"] == "system"]
        prompt = await render([*kept, *messages[start:]])
    return prompt


async def _body(engine: Engine, job: Job, prompt: str | list[int]) -> dict[str, Any]:
    """llama.cpp's request. Raises `APIError` 400 for a prompt that is too long and may not be shifted."""
    options, context = job.options, engine.settings.context
    if job.model.leading_bos and isinstance(prompt, str):
        # llama.cpp adds BOS itself; two of them change the answer.
        bos = _vocabulary(job.model)[0]
        prompt = prompt.removeprefix(bos) if bos else prompt
    limit = OPEN_ENDED * context
    # Ollama leaves a limit of 0 out of its request, which is none to llama.cpp.
    predict = limit if options["num_predict"] <= 0 else min(options["num_predict"], limit)
    content = prompt
    shift = job.request.get("shift", True)
    # A token has at least one byte, so most prompts need no counting.
    if len(prompt.encode() if isinstance(prompt, str) else prompt) + 2 + (0 if shift else predict) >= context:
        tokens = await engine.tokenize(prompt, special=True) if isinstance(prompt, str) else prompt
        # One that may not be cut is llama.cpp's to refuse, in its own words.
        if len(tokens) >= context and job.truncate:
            if not shift:
                raise APIError(400, TOO_LONG)
            content = _cut(tokens, context, options["num_keep"], job.model.leading_bos)
        if not shift:
            predict = min(predict, max(1, context - len(tokens)))
    body: dict[str, Any] = {
        "prompt": content,
        "cache_prompt": REUSE,
        "n_predict": predict,
        "n_keep": max(-1, min(options["num_keep"], context)),
        "stop": [text for text in options["stop"] if text],
        "seed": options["seed"] & 0xFFFFFFFF,
        "repeat_last_n": max(-1, min(options["repeat_last_n"], context)),
        "top_k": max(0, min(options["top_k"], 2**31 - 1)),
    }
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repeat_penalty",
        "frequency_penalty",
        "presence_penalty",
    ):
        body[name] = options[name]
    if job.request.get("logprobs"):
        body["n_probs"] = max(int(job.request.get("top_logprobs", 0)), 1)
    return {**body, **_format(job.request.get("format"))}


def _cut(tokens: list[int], context: int, keep: int, bos: bool) -> list[int]:
    """The prompt that Ollama sends when it is too long: `num_keep` tokens, then the last half of the rest."""
    kept = min((len(tokens) if keep < 0 else keep) + bos, context - 1)
    length = context - max((context - kept) // 2, 1)
    return tokens[:kept] + tokens[len(tokens) - (length - kept) :] if length > kept else tokens[:kept]


def _vocabulary(model: Model) -> tuple[str, frozenset[int]]:
    """The text of the BOS token, which llama.cpp does not print, and the ids of control tokens."""
    if "grit.vocabulary" not in model.metadata:
        from grit_impl.gguf.metadata import read_metadata

        known = read_metadata(model.gguf, arrays=True)
        bos, tokens = known.get("tokenizer.ggml.bos_token_id"), known.get("tokenizer.ggml.tokens", [])
        text = tokens[bos] if bos is not None and bos < len(tokens) else ""
        kinds = known.get("tokenizer.ggml.token_type", [])
        model.metadata["grit.vocabulary"] = (
            text,
            frozenset(token for token, kind in enumerate(kinds) if kind == CONTROL),
        )
    found: tuple[str, frozenset[int]] = model.metadata["grit.vocabulary"]
    return found


def _rendered(render: Any) -> str:
    try:
        return str(render())
    except TemplateError as error:
        raise APIError(500, str(error)) from error


def _format(value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if value == "json":
        return {"grammar": JSON_GRAMMAR}
    if isinstance(value, dict):
        return {"json_schema": value}
    raise APIError(500, f'invalid format: {value!r}; expected "json" or a valid JSON Schema object')


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise APIError(400, "json: cannot unmarshal into Go struct field ChatRequest.messages of type api.Message")
    message = typed(value, MESSAGE, "ChatRequest.messages")
    return {"role": str(message.get("role", "")).lower(), "content": message.get("content", "")}


def _metrics(chunk: dict[str, Any], started: float, loaded: float) -> dict[str, Any]:
    timings = chunk.get("timings") or {}
    values = {
        "done_reason": "length" if chunk.get("stop_type") == "limit" else "stop",
        "total_duration": int((time.monotonic() - started) * 1e9),
        "load_duration": int((loaded - started) * 1e9),
        "prompt_eval_count": int(timings.get("cache_n") or 0) + int(timings.get("prompt_n") or 0),
        "prompt_eval_duration": int(float(timings.get("prompt_ms") or 0) * 1e6),
        "eval_count": int(timings.get("predicted_n") or 0),
        "eval_duration": int(float(timings.get("predicted_ms") or 0) * 1e6),
    }
    return {key: value for key, value in values.items() if value}


def _logprobs(probabilities: Any, top: int) -> list[dict[str, Any]]:
    def entry(item: dict[str, Any]) -> dict[str, Any]:
        return {"token": item["token"], "logprob": item.get("logprob", 0.0), "bytes": item.get("bytes")}

    return [
        {**entry(p), **({"top_logprobs": [entry(t) for t in p.get("top_logprobs", [])[:top]]} if top else {})}
        for p in probabilities or []
    ]
