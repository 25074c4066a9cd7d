"""llama.cpp as a child process: one loaded model behind an HTTP address on the loopback interface."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from grit_impl.errors import GRITError

_CHILD = Path(__file__).with_name("_runner.py")
# What llama.cpp prints about a file it cannot load, most telling first.
_TELLING = (
    "error loading model:",
    "failed to load model",
    "failed to apply lora",
    "llama_adapter_lora_init",
    "error:",
    " E ",
)


class LlamaCpp:
    """A running llama.cpp server (`xllamacpp`).

    Args:
        model: GGUF file.
        adapter: GGUF adapter to apply, or None.
        context: Tokens per slot.
        parallel: Slots. More than one changes the numbers a little, since requests share matrix products.
        threads: Threads for computing. One per model on small machines: with as many as cores, ggml's barriers
            make a busy machine 15 to 50 times slower.
        batch: Tokens of a prompt processed at once.
        cache: Number type of the key-value cache: `f16`, `f32`, `q8_0`, `q4_0`.
        flash: Flash attention; None is llama.cpp's own choice.
        exact: float32 key-value cache and no flash attention, for comparisons; slower.
        gpu_layers: Layers on the GPU; -1 is llama.cpp's own choice.
        load_seconds: How long loading may take.

    Raises:
        GRITError: llama.cpp cannot load the file; the message ends with its reason.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        adapter: Path | str | None = None,
        context: int = 2048,
        parallel: int = 1,
        threads: int = 1,
        batch: int = 512,
        cache: str = "f16",
        flash: bool | None = None,
        exact: bool = False,
        gpu_layers: int = -1,
        load_seconds: float = 300.0,
    ) -> None:
        self.model = Path(model)
        self.context, self.parallel = context, parallel
        if not self.model.is_file():
            raise GRITError(f"model file {self.model} does not exist")
        key = secrets.token_hex(16)
        self.headers = {"Authorization": f"Bearer {key}", "Connection": "close"}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        except OSError as error:
            self._log.close()
            raise GRITError(f"cannot start llama.cpp: {error}") from error
        settings: dict[str, Any] = {
            "model": str(self.model),
            "adapter": str(adapter) if adapter is not None else None,
            "context": context,
            "parallel": parallel,
            "threads": threads,
            "batch": batch,
            "cache": "f32" if exact else cache,
            "flash": False if exact else flash,
            "gpu_layers": gpu_layers,
            "key": key,
        }
        self.url = self._handshake(settings, load_seconds)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the child still lives."""
        return self._process.poll() is None

    def log(self) -> str:
        """What llama.cpp has printed so far."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", errors="replace")

    def close(self) -> None:
        """End the child; safe to call twice."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handshake(self, settings: dict[str, Any], seconds: float) -> str:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        # A file that makes llama.cpp hang must not hang us.
        watchdog = threading.Timer(seconds, process.kill)
        watchdog.start()
        try:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        finally:
            watchdog.cancel()
        reply = json.loads(line) if line else {}
        if "url" in reply:
            return str(reply["url"])
        process.wait()
        reason = _reason(self.log(), str(reply.get("error", "")) or f"it ended with status {process.returncode}")
        self.close()
        raise GRITError(f"llama.cpp cannot load {self.model}: {reason}")


def _reason(log: str, default: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for marker in _TELLING:
        for line in lines:
            if marker in line:
                return line.split(marker, 1)[1].strip() or line
    return default
