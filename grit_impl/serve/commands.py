"""`grit serve`: Ollama's API over llama.cpp, on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from grit_impl.errors import GRITError

ROWS = Path("tests/serve/test_conformance.py")


@click.command()
@click.argument("models", nargs=-1, metavar="[NAME=]FILE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=11434, show_default=True, help="Port; 0 takes a free one."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads per model.")
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=1, show_default=True, help="Requests computed at once per model."
)
@click.option(
    "--context", type=click.IntRange(4), default=4096, show_default=True, help="Default context window in tokens."
)
@click.option("--keep-models", type=click.IntRange(1), default=8, show_default=True, help="Models loaded at once.")
@click.option(
    "--conformance",
    metavar="URL",
    default=None,
    help="Serve nothing: does that server answer as Ollama? In the project's root.",
)
@click.option("--junit", type=click.Path(path_type=Path), default=None, help="Write its rows as JUnit XML.")
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    threads: int,
    parallel: int,
    context: int,
    keep_models: int,
    conformance: str | None,
    junit: Path | None,
) -> None:
    """Serve GGUF files, Modelfiles or run folders through Ollama's API until ctrl-C.

    With --conformance, ask another server what docs/conformance.md lists; exit status 1 if a row differs.
    """
    if conformance is not None and models:
        raise GRITError(f"--conformance asks {conformance} and serves nothing: leave out {models[0]}")
    if junit is not None and conformance is None:
        raise GRITError("--junit writes the rows of --conformance: give both")
    if conformance is not None:
        sys.exit(_conform(conformance, junit))
    if not models:
        raise GRITError("say what to serve: a GGUF file, a Modelfile or the folder of a run")
    import signal

    chosen = dict(_named(text) for text in models)  # before the import, which takes a second
    from grit_impl.serve.server import EmbeddedOllama

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    server = EmbeddedOllama(
        chosen, host=host, port=port, threads=threads, parallel=parallel, context=context, most=keep_models
    )
    try:
        server.__enter__()
        click.echo(f"Ollama's API at {server.url} with {', '.join(chosen)}; ctrl-C ends it")
        if host not in ("127.0.0.1", "::1", "localhost"):
            click.echo(f"warning: everybody who reaches {host} can use and change these models", err=True)
        server.wait()
    except KeyboardInterrupt:
        click.echo("stopped")
    finally:
        if not server.close():
            # A thread that waits for a hanging model would keep the process; the models end with it.
            os._exit(1)


def _conform(url: str, junit: Path | None) -> int:
    """Run the rows on a server: pytest's exit status."""
    if not ROWS.is_file():
        raise GRITError(f"no {ROWS} here: run this in the project's root")
    from grit_impl.serve.client import Endpoint

    with Endpoint(url) as endpoint:
        click.echo(f"{endpoint.url}: {endpoint.version()}")
        told = [f"--ollama-url={url}", *([f"--junitxml={junit}"] if junit else [])]
    quiet = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-k", "test_row or test_step"]
    return subprocess.run([sys.executable, "-m", "pytest", str(ROWS), *quiet, *told]).returncode


def _named(text: str) -> tuple[str, Path]:
    from grit_impl.gguf.modelfile import find_modelfile

    name, equals, path = text.partition("=")
    source = Path(path if equals else text)
    found = find_modelfile(source)
    if equals:
        return name, found
    if source.is_dir():
        return source.resolve().name.lower(), found
    return (source.stem if source.suffix == ".gguf" else source.resolve().parent.name).lower(), found
