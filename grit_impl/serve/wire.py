"""What Ollama's API says on the wire: requests decoded as Go decodes JSON, options, durations, names, and errors.

Sources: Ollama's `api/types.go`, `types/model/name.go`; Go's `encoding/json` and `time.ParseDuration`.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from dataclasses import dataclass
from typing import Any

FOREVER = math.inf
REPEATS = 30
"""Repetitions of a token after which an answer ends (`llm/llama_server.go`)."""
DEFAULT_KEEP_ALIVE = 300.0
_INT, _FLOAT, _BOOL, _STRING, _OBJECT, _ARRAY, _ANY = "int", "float32", "bool", "string", "map", "slice", "any"
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}")

COMMON = {
    "model": _STRING, "stream": _BOOL, "format": _ANY, "keep_alive": _ANY, "options": _OBJECT, "think": _ANY,
    "truncate": _BOOL, "shift": _BOOL, "logprobs": _BOOL, "top_logprobs": _INT, "_debug_render_only": _BOOL,
}  # fmt: skip
GENERATE = {
    **COMMON, "prompt": _STRING, "suffix": _STRING, "system": _STRING, "template": _STRING, "context": _ARRAY,
    "raw": _BOOL, "images": _ARRAY,
}  # fmt: skip
CHAT = {**COMMON, "messages": _ARRAY, "tools": _ARRAY}
MESSAGE = {
    "role": _STRING,
    "content": _STRING,
    "images": _ARRAY,
    "tool_calls": _ARRAY,
    "thinking": _STRING,
    "tool_name": _STRING,
}
SHOW = {"model": _STRING, "name": _STRING, "system": _STRING, "template": _STRING, "verbose": _BOOL, "options": _OBJECT}
COPY = {"source": _STRING, "destination": _STRING}
DELETE = {"model": _STRING, "name": _STRING}
CREATE = {
    "model": _STRING, "name": _STRING, "stream": _BOOL, "quantize": _STRING, "from": _STRING, "files": _OBJECT,
    "adapters": _OBJECT, "template": _STRING, "license": _ANY, "system": _STRING, "parameters": _OBJECT,
    "messages": _ARRAY, "renderer": _STRING, "parser": _STRING, "info": _OBJECT,
}  # fmt: skip
EMBED = {
    "model": _STRING, "input": _ANY, "prompt": _STRING, "truncate": _BOOL, "keep_alive": _ANY, "options": _OBJECT,
    "dimensions": _INT,
}  # fmt: skip
OPENAI = {
    "model": _STRING, "stream": _BOOL, "stream_options": _OBJECT, "max_tokens": _INT, "seed": _INT, "stop": _ANY,
    "temperature": _FLOAT, "top_p": _FLOAT, "frequency_penalty": _FLOAT, "presence_penalty": _FLOAT, "n": _INT,
}  # fmt: skip
OPENAI_CHAT = {
    **OPENAI, "messages": _ARRAY, "max_completion_tokens": _INT, "response_format": _OBJECT, "tools": _ARRAY,
    "reasoning_effort": _STRING, "logprobs": _BOOL, "top_logprobs": _INT,
}  # fmt: skip
OPENAI_COMPLETION = {**OPENAI, "prompt": _ANY, "echo": _BOOL, "logprobs": _INT}

# Name to (type, default); None means that llama.cpp or the server decides.
OPTIONS: dict[str, tuple[str, Any]] = {
    "num_keep": ("integer", 4), "seed": ("integer", -1), "num_predict": ("integer", -1), "top_k": ("integer", 40),
    "top_p": ("float32", 0.9), "min_p": ("float32", 0.0), "typical_p": ("float32", 1.0),
    "repeat_last_n": ("integer", 64), "temperature": ("float32", 0.8), "repeat_penalty": ("float32", 1.0),
    "presence_penalty": ("float32", 0.0), "frequency_penalty": ("float32", 0.0), "stop": ("array", []),
    "num_ctx": ("integer", None), "num_batch": ("integer", 512), "num_gpu": ("integer", -1),
    "main_gpu": ("integer", 0), "use_mmap": ("boolean", None), "num_thread": ("integer", 0),
    "draft_num_predict": ("integer", 0),
}  # fmt: skip


class APIError(Exception):
    """An answer with a status code and `{"error": message}`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def decode(body: bytes, fields: dict[str, str], struct: str) -> dict[str, Any]:
    """A request's fields, typed as Go's struct has them; unknown keys are ignored, null is absence.

    Raises:
        APIError: 400, with Go's message where it is the same for every input of the kind.
    """
    if not body.strip():
        raise APIError(400, "missing request body")
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise APIError(400, "json: exceeded max depth") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise APIError(400, _syntax(body, error)) from None
    if not isinstance(value, dict):
        raise APIError(400, f"json: cannot unmarshal {_kind(value)} into Go value of type api.{struct}")
    return typed(value, fields, struct)


def typed(value: dict[str, Any], fields: dict[str, str], struct: str) -> dict[str, Any]:
    """Check an object's fields against a table of types (see `decode`)."""
    # Go matches keys without regard to case; the exact key wins.
    folded = {key.lower(): item for key, item in value.items()}
    found = {name: value.get(name, folded.get(name)) for name in fields}
    for name, item in found.items():
        if item is not None and not _fits(item, fields[name]):
            kind = _kind(item)
            raise APIError(
                400, f"json: cannot unmarshal {kind} into Go struct field {struct}.{name} of type {fields[name]}"
            )
    return {name: item for name, item in found.items() if item is not None}


def parse_options(*layers: dict[str, Any]) -> dict[str, Any]:
    """Ollama's options: defaults, then each layer over the last (the model's parameters, the request's).

    Raises:
        APIError: 500 for a value of the wrong JSON type, as Ollama answers.
    """
    options = {name: default for name, (_, default) in OPTIONS.items()}
    for layer in layers:
        for name, value in layer.items():
            if name in OPTIONS and value is not None:
                options[name] = _option(name, OPTIONS[name][0], value)
    return options


def parse_keep_alive(value: Any) -> float | None:
    """Seconds from a number or Go duration; negative is forever; None if absent. Raises `APIError` (400)."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise APIError(400, f"Unsupported type: '{_go_type(value)}'")
    seconds = parse_duration(value) if isinstance(value, str) else float(value)
    return FOREVER if seconds < 0 or seconds > 1e9 else seconds


def parse_duration(text: str) -> float:
    """Go's `time.ParseDuration` in seconds. Raises `APIError` (400) with its message."""
    quoted = json.dumps(text, ensure_ascii=False)
    body = text.lstrip("+-") if len(text) - len(text.lstrip("+-")) <= 1 else ""
    if body == "0":
        return 0.0
    if not body:
        raise APIError(400, f"time: invalid duration {quoted}")
    total, rest = 0.0, body
    while rest:
        match = re.match(r"(\d+\.?\d*|\.\d+)([^\d.]*)", rest, re.ASCII)
        if match is None:
            raise APIError(400, f"time: invalid duration {quoted}")
        if not match[2]:
            raise APIError(400, f"time: missing unit in duration {quoted}")
        if match[2] not in _UNITS:
            raise APIError(400, f"time: unknown unit {json.dumps(match[2], ensure_ascii=False)} in duration {quoted}")
        total += float(match[1]) * _UNITS[match[2]]
        rest = rest[match.end() :]
    if total * 1e9 >= 2**63:
        raise APIError(400, f"time: invalid duration {quoted}")
    return -total if text.startswith("-") else total


@dataclass(frozen=True)
class Name:
    """A model's name: [host/][namespace/]model[:tag]."""

    model: str
    tag: str = "latest"
    namespace: str = ""

    @property
    def full(self) -> str:
        """As lists show it."""
        return f"{self.namespace}/{self.model}:{self.tag}" if self.namespace else f"{self.model}:{self.tag}"

    @property
    def key(self) -> str:
        """For look-up: names differ in more than case."""
        return self.full.lower()


def parse_name(text: str) -> Name | None:
    """Split a name; None if it is not valid."""
    path, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:
        path, tag = text, "latest"
    *spaces, model = path.split("/")
    parts = [*spaces, model, tag]
    if len(spaces) > 2 or not all(_PART.fullmatch(part) for part in parts):
        return None
    namespace = "/".join(spaces)
    return Name(model, tag, "" if namespace in ("library", "registry.ollama.ai/library") else namespace)


def now() -> str:
    """The time as Go prints it: RFC 3339 with nanoseconds, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def _option(name: str, kind: str, value: Any) -> Any:
    error = APIError(500, f'option "{name}" must be of type {kind}')
    if kind == "boolean":
        if not isinstance(value, bool):
            raise error
        return value
    if kind == "array":
        if not isinstance(value, list):
            raise error
        if not all(isinstance(item, str) for item in value):
            raise APIError(500, f'option "{name}" must be of an array of strings')
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error
    if kind == "integer":
        return max(-(2**63), min(2**63 - 1, int(value)))
    number = float(value)
    return max(-3.4e38, min(3.4e38, number))


def _fits(value: Any, kind: str) -> bool:
    if kind == _INT:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind == _FLOAT:
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds: dict[str, type] = {_BOOL: bool, _STRING: str, _OBJECT: dict, _ARRAY: list}
    return kind == _ANY or isinstance(value, kinds[kind])


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number" if isinstance(value, int) else f"number {value}"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _go_type(value: Any) -> str:
    return {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}.get(type(value), "unknown")


def _no_constant(name: str) -> Any:
    raise ValueError(f"invalid character '{name[0]}' looking for beginning of value")


def _syntax(body: bytes, error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return (
            str(error)
            if str(error).startswith("invalid character")
            else "invalid character '\\ufffd' in string literal"
        )
    text = body.decode("utf-8", errors="replace")
    if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg:
        return "unexpected EOF"
    where = {
        "Expecting value": "looking for beginning of value",
        "Expecting ',' delimiter": "after object key:value pair",
        "Expecting ':' delimiter": "after object key",
        "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
        "Extra data": "after top-level value",
    }.get(error.msg, "in string literal")
    return f"invalid character '{text[error.pos]}' {where}"
