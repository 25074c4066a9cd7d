"""Putting a model into an Ollama server, over its HTTP API: blobs, create, and a look at what arrived.

API: ollama's `docs/api.md`. Its answers need distrust: a failure inside `create` comes with status 200, as a line of
the stream; and a GGUF without TEMPLATE gets one guessed. So the deployed model is asked to render a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from grit_impl.errors import GRITError
from grit_impl.gguf.encoding import check_same_base
from grit_impl.gguf.gotemplate import Template
from grit_impl.gguf.modelfile import Modelfile, read_modelfile
from grit_impl.record import sha256_file
from grit_impl.serve.connection import client_options, find_server, reason

CHUNK = 1 << 20
QUESTION = "What is 2 + 2?"
UploadProgress = Callable[[str, int, int], None]


@dataclass
class Deployment:
    """What the server says about the new model. `warnings` are differences that do not change answers."""

    name: str
    digest: str
    statuses: list[str]
    uploaded: int
    quantization: str
    rendered: str | None
    warnings: list[str] = field(default_factory=list)


def deploy(
    url: str | None,
    name: str,
    modelfile: Path | str,
    *,
    quantize: str | None = None,
    progress: UploadProgress | None = None,
    attempts: int = 4,
    timeout: float = 600.0,
) -> Deployment:
    """Create a model from a Modelfile and check what was created.

    A file that the server already has is not sent again, so that a broken deployment continues where it was. A model of
    the same name is replaced, as `ollama create` does.

    Args:
        url: The server, see `serve.connection.find_server`.
        name: The model's name there.
        modelfile: Its FROM and ADAPTER files are uploaded.
        quantize: Let the server quantise, e.g. "q4_K_M"; the GGUF must be f16 or bf16.
        progress: Called with (file name, bytes sent, bytes in all).
        attempts: Tries per upload.
        timeout: Seconds of silence after which the server is given up.

    Raises:
        GRITError: the server cannot be reached or refuses, with its reason; or the created model does not serve the
            Modelfile's template or parameters.
    """
    spec = read_modelfile(modelfile)
    files = {"model.gguf": spec.gguf}
    if len(spec.adapters) > 1:
        raise GRITError(f"{modelfile} has {len(spec.adapters)} ADAPTER lines; Ollama applies one")
    for adapter in spec.adapters:
        if adapter.is_dir() or adapter.suffix == ".safetensors":
            raise GRITError(
                f"peft-adapter: ADAPTER {adapter} is no GGUF file, and Ollama converts it wrongly; export it as GGUF"
            )
        check_same_base(spec.gguf, adapter)
        files["adapter.gguf"] = adapter
    if spec.template is None:
        raise GRITError(
            f"chat-template: {modelfile} has no TEMPLATE, so Ollama would guess one; write it with grit export"
        )
    with _client(url, timeout) as client:
        digests = {key: f"sha256:{sha256_file(path)}" for key, path in files.items()}
        sent = sum(_upload(client, files[key], digest, progress, attempts) for key, digest in digests.items())
        statuses = _create(client, name, spec, digests, quantize)
        return _inspect(client, name, spec, statuses, sent)


def delete(url: str | None, name: str) -> None:
    """Remove a model from a server. Raises `GRITError` if it is not there."""
    with _client(url, 30) as client:
        _checked(lambda: client.request("DELETE", "/api/delete", json={"model": name}), client.base_url)


def _client(url: str | None, timeout: float) -> httpx.Client:
    return httpx.Client(**client_options(find_server(url)), timeout=httpx.Timeout(timeout, connect=10))


def _checked(send: Callable[[], httpx.Response], url: Any) -> httpx.Response:
    try:
        response = send()
    except httpx.HTTPError as error:
        raise GRITError(f"no Ollama at {url}: {reason(error)}; is it running?") from error
    if response.has_redirect_location:
        raise GRITError(f"Ollama at {url} redirects to {response.headers['location']}: use that address")
    if response.status_code >= 400:
        raise GRITError(f"Ollama at {url} answered {response.status_code}: {_reason(response)}")
    return response


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:200] or response.reason_phrase


def _upload(client: httpx.Client, path: Path, digest: str, progress: UploadProgress | None, attempts: int) -> int:
    """Send a file unless it is there; returns the bytes sent."""
    address = f"/api/blobs/{digest}"
    size = path.stat().st_size

    def chunks() -> Iterator[bytes]:
        sent = 0
        with open(path, "rb") as handle:
            while data := handle.read(CHUNK):
                yield data
                sent += len(data)
                if progress is not None:
                    progress(path.name, sent, size)

    def send() -> int:
        # Asked anew at each attempt: the last one may have arrived after all.
        head = client.head(address)
        if head.status_code == 200:
            return 0
        if head.status_code != 404:
            raise GRITError(f"Ollama at {client.base_url} answered {head.status_code} about a blob")
        reply = client.post(address, content=chunks())
        if reply.status_code >= 500:
            raise httpx.TransportError(_reason(reply))
        if reply.status_code not in (200, 201):
            raise GRITError(f"Ollama at {client.base_url} refused {path.name}: {_reason(reply)}")
        return size

    try:
        return Retrying(
            retry=retry_if_exception_type(httpx.TransportError),
            stop=stop_after_attempt(attempts),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            reraise=True,
        )(send)
    except httpx.HTTPError as error:
        raise GRITError(f"cannot upload {path.name} to {client.base_url}: {reason(error)}") from error


def _create(
    client: httpx.Client, name: str, spec: Modelfile, digests: dict[str, str], quantize: str | None
) -> list[str]:
    body: dict[str, Any] = {
        "model": name,
        "files": {"model.gguf": digests["model.gguf"]},
        "template": spec.template,
        "parameters": spec.parameters,
        "stream": True,
    }
    if "adapter.gguf" in digests:
        body["adapters"] = {"adapter.gguf": digests["adapter.gguf"]}
    for key, value in (
        ("system", spec.system),
        ("messages", spec.messages),
        ("license", spec.license),
        ("quantize", quantize),
    ):
        if value:
            body[key] = value
    statuses: list[str] = []
    try:
        with client.stream("POST", "/api/create", json=body) as response:
            if response.status_code >= 400:
                response.read()
                raise GRITError(f"Ollama at {client.base_url} refused {name}: {_reason(response)}")
            for line in response.iter_lines():
                message = json.loads(line) if line.strip() else {}
                if "error" in message:
                    raise GRITError(f"Ollama at {client.base_url} could not create {name}: {message['error']}")
                statuses += [str(message["status"])] if "status" in message else []
    except (httpx.HTTPError, ValueError) as error:
        raise GRITError(f"creating {name} at {client.base_url} broke off: {reason(error)}") from error
    if not statuses or statuses[-1] != "success":
        raise GRITError(f"creating {name} at {client.base_url} ended without success, after {statuses[-1:]}")
    return statuses


def _inspect(client: httpx.Client, name: str, spec: Modelfile, statuses: list[str], sent: int) -> Deployment:
    shown = _checked(lambda: client.post("/api/show", json={"model": name}), client.base_url).json()
    if shown.get("template", "").strip() != (spec.template or "").strip():
        raise GRITError(
            f"chat-template: {name} serves another TEMPLATE than the Modelfile's: {shown.get('template')!r:.80}"
        )
    parameters = shown.get("parameters", "")
    for stop in spec.parameters.get("stop", []):
        if stop not in parameters:
            raise GRITError(f"stop-token: {name} does not stop at {stop!r}")
    warnings = [f"parameter {key} is not shown" for key in spec.parameters if key not in parameters]
    probe = {
        "model": name,
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": False,
        "_debug_render_only": True,
    }
    reply = _checked(lambda: client.post("/api/chat", json=probe), client.base_url).json()
    rendered = (reply.get("_debug_info") or {}).get("rendered_template")
    messages = [{"role": "system", "content": spec.system}] if spec.system else []
    expected = Template(spec.template or "").render([*messages, *spec.messages, {"role": "user", "content": QUESTION}])
    if rendered is None:
        warnings.append("the server does not tell the rendered prompt")
    elif rendered != expected:
        raise GRITError(f"chat-template: {name} renders {rendered[:80]!r}, the Modelfile means {expected[:80]!r}")
    tags = _checked(lambda: client.get("/api/tags"), client.base_url).json().get("models", [])
    digest = next((m["digest"] for m in tags if m["name"] in (name, f"{name}:latest")), "")
    level = str(shown.get("details", {}).get("quantization_level", ""))
    return Deployment(name, digest, statuses, sent, level, rendered, warnings)
