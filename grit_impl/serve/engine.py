"""Loaded models and the queue in front of them.

Each model is a llama.cpp child process with its own slots. A model is loaded by the first request that needs it, stays
for its keep-alive, and is reloaded when a request wants other load-time options (context, batch, threads).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from grit_impl.errors import GRITError
from grit_impl.gguf.llamacpp import LlamaCpp
from grit_impl.machine import cores
from grit_impl.serve.wire import DEFAULT_KEEP_ALIVE, APIError

STOPPED = (
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
    "check ollama server logs for details"
)
KEPT_SECONDS = 1.0
"""Idle connections are closed after this, long before the other side does it."""
SPARE = 3
"""Connections beside those of the slots: one that waits, two for short calls. Each has a thread in `_runner`."""
BUSY = "server busy, please try again.  maximum pending requests exceeded"


@dataclass(frozen=True)
class LoadSettings:
    """What a model is loaded with; a change means loading again."""

    gguf: Path
    adapter: Path | None
    context: int
    batch: int
    threads: int
    gpu_layers: int


@dataclass
class Engine:
    """One loaded model: HTTP calls to its llama.cpp process.

    `users` counts the requests that hold it; it is not unloaded while there are any.
    """

    settings: LoadSettings
    process: LlamaCpp
    client: httpx.AsyncClient
    slots: asyncio.Semaphore
    users: int = 0
    keep_alive: float = DEFAULT_KEEP_ALIVE
    expires: float = field(default_factory=lambda: time.monotonic() + DEFAULT_KEEP_ALIVE)

    @classmethod
    async def load(cls, settings: LoadSettings, parallel: int) -> Engine:
        """Start llama.cpp. Raises `APIError` (500) with its reason when it cannot load the file."""
        try:
            process = await asyncio.to_thread(
                LlamaCpp,
                settings.gguf,
                adapter=settings.adapter,
                context=settings.context,
                parallel=parallel,
                threads=settings.threads,
                batch=settings.batch,
                gpu_layers=settings.gpu_layers,
            )
        except GRITError as error:
            raise APIError(500, str(error)) from error
        # llama.cpp's HTTP server drops connections that are idle for five seconds; on plain HTTP certificates only cost
        # memory.
        limits = httpx.Limits(max_connections=parallel + SPARE, keepalive_expiry=KEPT_SECONDS)
        headers = {**process.headers, "Connection": "keep-alive"}
        client = httpx.AsyncClient(
            base_url=process.url, headers=headers, timeout=None, limits=limits, trust_env=False, verify=False
        )
        # One more than there are slots waits inside llama.cpp, so that a slot is never idle for the length of a reply.
        return cls(settings, process, client, asyncio.Semaphore(parallel + 1))

    async def close(self) -> None:
        """End the process."""
        await self.client.aclose()
        await asyncio.to_thread(self.process.close)

    async def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST to llama.cpp. Raises `APIError` with its status and message."""
        try:
            response = await self.client.post(path, json=body)
        except httpx.HTTPError as error:
            raise APIError(500, STOPPED) from error
        if response.status_code != 200:
            # Ollama passes llama.cpp's refusal of a completion on as it is.
            plain = path == "/completion"
            raise APIError(response.status_code, response.text.strip() if plain else _message(response.content))
        value: dict[str, Any] = response.json()
        return value

    async def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds the BOS token if the model wants one."""
        reply = await self.call("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        return [int(token) for token in reply["tokens"]]

    async def detokenize(self, tokens: list[int]) -> str:
        """The text of token ids."""
        return str((await self.call("/detokenize", {"tokens": tokens}))["content"])

    async def apply_template(self, messages: list[dict[str, Any]]) -> str:
        """The conversation in the GGUF's own Jinja template."""
        return str((await self.call("/apply-template", {"messages": messages}))["prompt"])

    async def complete(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """llama.cpp's chunks as they are generated.

        They are read as fast as they come, into a queue: a client that reads slowly or not at all must not keep the
        slot from the others. Closing the iterator stops the generation.
        """
        queue: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()
        task = asyncio.create_task(self._produce(body, queue))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _produce(self, body: dict[str, Any], queue: asyncio.Queue[dict[str, Any] | BaseException | None]) -> None:
        try:
            if not body["stream"]:
                async with self.slots:
                    queue.put_nowait(await self.call("/completion", body))
                queue.put_nowait(None)
                return
            async with self.slots, self.client.stream("POST", "/completion", json=body) as response:
                if response.status_code != 200:
                    raise APIError(response.status_code, (await response.aread()).decode(errors="replace").strip())
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        queue.put_nowait(json.loads(line[6:]))
                    elif line.startswith("error: "):
                        raise APIError(500, _message(line[7:].encode()))
            queue.put_nowait(None)
        except (httpx.HTTPError, ValueError):
            queue.put_nowait(APIError(500, STOPPED))
        except APIError as error:
            queue.put_nowait(error)


class Engines:
    """The loaded models.

    Args:
        parallel: Slots per model.
        threads: Threads per model, unless a request asks for others.
        context: Default context window in tokens.
        most: Models loaded at once; the longest unused goes first.
        queue: Requests waiting or running per server before 503.
    """

    def __init__(
        self, *, parallel: int = 1, threads: int = 1, context: int = 4096, most: int = 8, queue: int = 512
    ) -> None:
        self.parallel, self.threads, self.context, self.most, self.queue = parallel, threads, context, most, queue
        self.loaded: dict[str, Engine] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._pending = 0
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def use(
        self,
        key: str,
        gguf: Path,
        adapter: Path | None,
        trained: int,
        options: dict[str, Any],
        keep_alive: float | None,
    ) -> AsyncIterator[Engine]:
        """Hold a loaded model for one request.

        Raises:
            APIError: 503 if too many requests wait, 500 if the model cannot be loaded.
        """
        if self._pending >= self.queue:
            raise APIError(503, BUSY)
        self._pending += 1
        try:
            engine = await self._get(key, self._settings(gguf, adapter, trained, options))
        except BaseException:
            self._pending -= 1
            raise
        try:
            yield engine
        finally:
            self._pending -= 1
            engine.users -= 1
            if keep_alive is not None:
                engine.keep_alive = keep_alive
            engine.expires = time.monotonic() + engine.keep_alive
            async with self._changed:
                self._changed.notify_all()
            if engine.keep_alive == 0:
                await self.unload(key)

    async def unload(self, key: str) -> None:
        """Unload a model as soon as nobody uses it."""
        engine = self.loaded.get(key)
        if engine is not None and engine.users == 0:
            self.loaded.pop(key, None)
            await engine.close()
        elif engine is not None:
            engine.keep_alive, engine.expires = 0.0, 0.0

    async def reap(self) -> None:
        """Unload expired models, forever."""
        while True:
            await asyncio.sleep(0.25)
            for key, engine in list(self.loaded.items()):
                if engine.users == 0 and engine.expires <= time.monotonic():
                    await self.unload(key)

    async def close(self) -> None:
        """End every process."""
        engines, self.loaded = list(self.loaded.values()), {}
        await asyncio.gather(*(engine.close() for engine in engines))

    def _settings(self, gguf: Path, adapter: Path | None, trained: int, options: dict[str, Any]) -> LoadSettings:
        # Beyond the trained length the model is of no use, and memory grows with it.
        context = max(4, min(options["num_ctx"] or self.context, trained))
        threads = options["num_thread"] if options["num_thread"] > 0 else self.threads
        return LoadSettings(
            gguf=gguf,
            adapter=adapter,
            context=context,
            # llama.cpp aborts on a batch of one.
            batch=max(32, min(options["num_batch"], 2048)),
            threads=min(threads, cores()),
            gpu_layers=max(-1, min(options["num_gpu"], 10000)),
        )

    async def _get(self, key: str, settings: LoadSettings) -> Engine:
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            engine = self.loaded.get(key)
            if engine is not None and (engine.settings != settings or not engine.process.running):
                await self._retire(key, engine)
                engine = None
            if engine is None:
                await self._make_room(key)
                engine = await Engine.load(settings, self.parallel)
                self.loaded[key] = engine
            engine.users += 1
            return engine

    async def _retire(self, key: str, engine: Engine) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: engine.users == 0)
        if self.loaded.get(key) is engine:
            del self.loaded[key]
        await engine.close()

    async def _make_room(self, key: str) -> None:
        while len(self.loaded) >= self.most:
            idle = [k for k, e in self.loaded.items() if e.users == 0 and k != key]
            if not idle:
                async with self._changed:
                    await self._changed.wait()
                continue
            await self.unload(min(idle, key=lambda k: self.loaded[k].expires))


def _message(content: bytes) -> str:
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return content.decode("utf-8", errors="replace").strip() or STOPPED
