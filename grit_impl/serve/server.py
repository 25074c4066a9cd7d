"""A server that speaks Ollama's HTTP API over llama.cpp, in this process.

Real Ollama (0.30 and later) runs llama.cpp's server, too; the numbers agree. This one needs nothing but PyPI wheels, so
the evaluation takes the same path on a small CI machine and on a user's Ollama.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from grit_impl.errors import GRITError
from grit_impl.serve import openai, wire
from grit_impl.serve.completion import Job, answer, gather, prepare
from grit_impl.serve.engine import Engines
from grit_impl.serve.models import Models
from grit_impl.serve.transport import Patience, Protocol, listen
from grit_impl.serve.versions import BUILD, IMITATED
from grit_impl.serve.wire import APIError, decode

BODY_LIMIT = 32 << 20
BLOB_LIMIT = 64 << 30
BODY_SECONDS = 60.0
MOST_CONNECTIONS = 512
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Service:
    """The API's endpoints over a set of models."""

    def __init__(self, models: Models, engines: Engines) -> None:
        self.models, self.engines = models, engines

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            ("/", ["GET"], self.root),
            ("/api/version", ["GET"], self.version),
            ("/api/tags", ["GET"], self.tags),
            ("/api/ps", ["GET"], self.ps),
            ("/api/show", ["POST"], self.show),
            ("/api/create", ["POST"], self.create),
            ("/api/copy", ["POST"], self.copy),
            ("/api/delete", ["DELETE"], self.delete),
            ("/api/generate", ["POST"], self.generate),
            ("/api/chat", ["POST"], self.chat),
            ("/api/embed", ["POST"], self.embed),
            ("/api/embeddings", ["POST"], self.embed),
        ]
        table = [Route(path, _guarded(handler), methods=methods) for path, methods, handler in routes]
        table.append(Route("/api/blobs/{digest}", _guarded(self.blobs), methods=["HEAD", "POST"]))
        table += openai.routes(self.models, self.ask, _body)

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            reaper = asyncio.create_task(self.engines.reap())
            try:
                yield
            finally:
                reaper.cancel()
                await self.engines.close()

        app = Starlette(routes=table, lifespan=lifespan, exception_handlers={HTTPException: _plain})
        app.router.redirect_slashes = False
        return Patience(app)

    async def root(self, _: Request) -> Response:
        """Is it running?"""
        return PlainTextResponse("Ollama is running")

    async def version(self, _: Request) -> Response:
        """The version of Ollama that is imitated, with the mark of this build (see `versions.exact`)."""
        slots = self.engines.parallel
        return JSONResponse({"version": IMITATED + BUILD + (f".{slots}" if slots > 1 else "")})

    async def tags(self, _: Request) -> Response:
        """All models, the newest first."""
        models = sorted(self.models.by_key.values(), key=lambda m: m.modified, reverse=True)
        return JSONResponse({"models": [model.listing() for model in models]})

    async def ps(self, _: Request) -> Response:
        """The loaded models."""
        import datetime
        import time

        rows = []
        for key, engine in self.engines.loaded.items():
            if (model := self.models.by_key.get(key)) is None:
                continue
            row = model.listing()
            left = min(engine.expires - time.monotonic(), 3e9)
            until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=left)
            rows.append(
                {k: row[k] for k in ("name", "model", "size", "digest", "details")}
                | {"expires_at": until.isoformat(), "size_vram": 0, "context_length": engine.settings.context}
            )
        return JSONResponse({"models": rows})

    async def show(self, request: Request) -> Response:
        """A model's description."""
        body = decode(await _body(request), wire.SHOW, "ShowRequest")
        name = body.get("model") or body.get("name") or ""
        if not name:
            raise APIError(400, "model is required")
        parsed = wire.parse_name(name)
        if parsed is None:
            raise APIError(400, "invalid model name")
        model = self.models.find(name)
        if model is None:
            raise APIError(404, f"model '{parsed.full}' not found")
        return JSONResponse(await asyncio.to_thread(model.show, bool(body.get("verbose"))))

    async def blobs(self, request: Request) -> Response:
        """HEAD: is a blob there? POST: upload it."""
        digest = request.path_params["digest"]
        if request.method == "HEAD":
            return Response(status_code=200 if self.models.blob(digest) else 404)
        return Response(status_code=await self.models.store_blob(digest, _chunks(request)))

    async def create(self, request: Request) -> Response:
        """Make a model from blobs or from another model."""
        body = decode(await _body(request), wire.CREATE, "CreateRequest")
        name = self.models.check_create(body)
        steps = self.models.create(name, body)
        # A new model under an old name must not be answered by the old one's process.
        await self.engines.unload(name.key)

        async def statuses() -> AsyncIterator[dict[str, Any]]:
            while (status := await asyncio.to_thread(next, steps, None)) is not None:
                yield {"status": status}

        if body.get("stream", True):
            return _ndjson(statuses())
        return JSONResponse([status async for status in statuses()][-1])

    async def copy(self, request: Request) -> Response:
        """Give a model a second name."""
        body = decode(await _body(request), wire.COPY, "CopyRequest")
        self.models.copy(body.get("source", ""), body.get("destination", ""))
        return Response(status_code=200)

    async def delete(self, request: Request) -> Response:
        """Forget a model."""
        body = decode(await _body(request), wire.DELETE, "DeleteRequest")
        await self.engines.unload(self.models.delete(body.get("model") or body.get("name") or ""))
        return Response(status_code=200)

    async def generate(self, request: Request) -> Response:
        """Continue a prompt."""
        return await self._complete("generate", decode(await _body(request), wire.GENERATE, "GenerateRequest"), request)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._complete("chat", decode(await _body(request), wire.CHAT, "ChatRequest"), request)

    async def embed(self, request: Request) -> Response:
        """Vectors of texts, which models that write have none of: llama.cpp says so, in Ollama's place."""
        old = request.url.path == "/api/embeddings"
        body = decode(await _body(request), wire.EMBED, "EmbeddingRequest" if old else "EmbedRequest")
        name, given = body.get("model", ""), body.get("prompt" if old else "input") or []
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise APIError(400, "invalid input type")
        if old and not name:
            raise APIError(400, "model is required")
        model = self.models.find(name)
        if model is None:
            # The older endpoint has a text of its own.
            raise APIError(
                404, f'model "{name}" not found, try pulling it first' if old else f"model '{name}' not found"
            )
        options = wire.parse_options(model.parameters, body.get("options") or {})
        alive = wire.parse_keep_alive(body.get("keep_alive"))
        async with self.engines.use(
            model.name.key, model.gguf, model.adapter, model.trained_context, options, alive
        ) as engine:
            try:
                for text in texts:
                    await engine.call("/v1/embeddings", {"input": text})
            except APIError as error:
                raise APIError(500 if old else error.status, error.message) from None
        return JSONResponse({"embedding": []} if old else {"model": name, "embeddings": []})

    async def _complete(self, kind: str, body: dict[str, Any], request: Request) -> Response:
        job = prepare(self.models, kind, body)
        if not isinstance(job, Job):
            await self.engines.unload(self.models.by_key[_key(body["model"])].name.key)
            return JSONResponse(job)
        chunks = answer(self.engines, job)
        try:
            # Errors before the first chunk have a status code of their own.
            first = await _unless_gone(request, anext(chunks))
            if job.stream and not first["done"] and "_debug_info" not in first:
                return _ndjson(chunks, first)
            rest = await _unless_gone(request, _all(chunks))
        except BaseException:
            await chunks.aclose()  # type: ignore[attr-defined]
            raise
        if job.stream and first.get("done_reason") not in ("load", None):
            return _ndjson(_none(), first)
        return JSONResponse(gather(job, [first, *rest]))

    async def ask(self, kind: str, body: dict[str, Any], request: Request) -> AsyncIterator[dict[str, Any]]:
        """The chunks of an answer, of which the first is there already: errors before it have a status of their own."""
        job = prepare(self.models, kind, body)
        assert isinstance(job, Job)
        chunks = answer(self.engines, job)
        try:
            first = [await _unless_gone(request, anext(chunks))]
            if not job.stream:
                first += await _unless_gone(request, _all(chunks))
        except BaseException:
            await chunks.aclose()  # type: ignore[attr-defined]
            raise
        return _chain(first, chunks)


class EmbeddedOllama:
    """The server in a thread, as a context manager.

    Args:
        models: Name to GGUF file or Modelfile.
        host: Address to listen on; anything but loopback must be asked for.
        port: Port; 0 takes a free one.
        threads: Threads per model.
        parallel: Requests that one model computes at once. With 1 an answer does not depend on its neighbours.
        context: Default context window in tokens.
        store: Folder for uploaded blobs; a temporary one by default.
        options: Further arguments of `Engines`.

    Raises:
        GRITError: a model's file cannot be read, or the port is taken.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        threads: int = 1,
        parallel: int = 1,
        context: int = 4096,
        store: Path | None = None,
        blob_limit: int = BLOB_LIMIT,
        **options: Any,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="grit-serve-") if store is None else None
        folder = Path(self._temporary.name) if self._temporary else Path(store or ".")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.models = Models(folder, blob_limit)
            for name, path in models.items():
                self.models.register(name, path)
            self.engines = Engines(parallel=parallel, threads=threads, context=context, **options)
            self._socket = listen(host, port)
        except BaseException:
            self._clean()
            raise
        address = self._socket.getsockname()
        self.port = int(address[1])
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self.url = f"http://[{shown}]:{self.port}" if ":" in shown else f"http://{shown}:{self.port}"
        app = Service(self.models, self.engines).app()
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=65536,
            lifespan="on",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="embedded-ollama", daemon=True)

    def __enter__(self) -> EmbeddedOllama:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._clean()
                raise GRITError(f"the server at {self.url} did not start")
            self._thread.join(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, seconds: float = 20.0) -> bool:
        """Stop listening, end every model's process, remove temporary files; False if something did not end in time."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(seconds)
        ended = not self._thread.is_alive()
        if not ended:
            for engine in list(self.engines.loaded.values()):
                engine.process.close()
        self._clean()
        return ended

    def wait(self) -> None:
        """Block until the server ends (ctrl-C raises KeyboardInterrupt)."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def _clean(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def _guarded(handler: Handler) -> Handler:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except APIError as error:
            return JSONResponse({"error": error.message}, status_code=error.status)
        except ClientDisconnect:
            return JSONResponse({"error": "request canceled"}, status_code=499)

    return run


async def _plain(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(
        "405 method not allowed" if error.status_code == 405 else "404 page not found", error.status_code
    )


async def _body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in _chunks(request):
        size += len(chunk)
        if size > BODY_LIMIT:
            raise APIError(413, f"request body is larger than {BODY_LIMIT} bytes")
        parts.append(chunk)
    return b"".join(parts)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream, None), BODY_SECONDS)
        except TimeoutError:
            raise APIError(408, "the request body did not arrive in time") from None
        if chunk is None:
            return
        yield chunk


async def _unless_gone(request: Request, work: Any) -> Any:
    """Await `work`, but cancel it when the client hangs up: nobody would read the answer."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(chunks: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk async for chunk in chunks]


async def _chain(first: list[dict[str, Any]], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    try:
        for chunk in first:
            yield chunk
        async for chunk in rest:
            yield chunk
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


async def _none() -> AsyncIterator[dict[str, Any]]:
    return
    yield


def _ndjson(chunks: AsyncIterator[dict[str, Any]], *first: dict[str, Any]) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        for chunk in first:
            yield json.dumps(chunk, ensure_ascii=False).encode() + b"\n"
        try:
            async for chunk in chunks:
                yield json.dumps(chunk, ensure_ascii=False).encode() + b"\n"
        except APIError as error:
            # The status line is long gone: Ollama says so inside the stream.
            yield json.dumps({"error": error.message}).encode() + b"\n"
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _key(name: str) -> str:
    parsed = wire.parse_name(name)
    return parsed.key if parsed else ""
