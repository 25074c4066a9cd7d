"""The rows of `conformance.py` on the embedded server, or on the one that `--ollama-url` names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import conformance
import pytest
import tiny
from conformance import ROWS, STEPS
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grit_impl.export import export_adapter, export_merged, write_modelfile
from grit_impl.export.deploy import delete, deploy
from grit_impl.gguf.metadata import read_metadata
from grit_impl.serve.client import server_url
from grit_impl.serve.server import EmbeddedOllama, Service

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random Llama as GGUF and an adapter for it."""
    root = tmp_path_factory.mktemp("conformance")
    base = tiny.make_base(root / "base")
    model = export_merged(base, None, root / "m.gguf", "f16")
    adapter = export_adapter(base, tiny.make_adapter(base, root / "lora"), root / "lora.gguf")
    modelfile = write_modelfile(model.path, root / "Modelfile", stop=model.stops)
    template = read_metadata(model.path).get("tokenizer.chat_template")
    return SimpleNamespace(gguf=model.path, adapter=adapter.path, modelfile=modelfile, chat_template=template)


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest, lab: SimpleNamespace) -> Iterator[str]:
    """The server in question, which has the model as `grit-test`."""
    if given := request.config.getoption("--ollama-url", default=None):
        address = server_url(given)
        deploy(address, "grit-test", lab.modelfile)
        yield address
        delete(address, "grit-test")
        return
    with EmbeddedOllama({"grit-test": lab.modelfile}) as server:
        yield server.url


@pytest.mark.parametrize("name", ROWS)
def test_row(url: str, name: str) -> None:
    """Oracle: Ollama, status and body; the row says where that stands or was seen."""
    row = ROWS[name]
    reply = conformance.send(url, row.method, row.path, row.body)
    assert reply.status_code == row.status, reply.text
    assert row.check.holds(reply), reply.text


@pytest.mark.parametrize("name", STEPS)
def test_step(url: str, lab: SimpleNamespace, name: str) -> None:
    """Oracle: the docstring of the row."""
    STEPS[name][0](url, lab)


def test_the_command_tells_a_server_that_answers_otherwise(
    lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: one row is broken on purpose: it alone differs, in the terminal and in JUnit's file, and the status is 1.

    Rows of several requests are left out: they are asked above.
    """

    async def version(self: Service, request: Request) -> Response:
        return JSONResponse({"version": "0.33.0", "more": True})

    monkeypatch.setattr(Service, "version", version)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--deselect tests/serve/test_conformance.py::test_step")
    with EmbeddedOllama({"other": lab.modelfile}) as server:
        command = [sys.executable, "-c", "from grit_impl.cli import main; main()", "serve", "--conformance", server.url]
        command += ["--junit", str(tmp_path / "rows.xml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=DOCUMENT.parents[1])
    assert done.returncode == 1, done.stderr
    told = [line[:10].strip() for line in done.stdout.splitlines() if line.startswith(("as Ollama", "DIFFERS"))]
    assert (told.count("DIFFERS"), len(told)) == (1, len(ROWS))
    assert "DIFFERS    version" in done.stdout
    assert ElementTree.parse(tmp_path / "rows.xml").getroot()[0].attrib["failures"] == "1"


def test_the_table_is_in_the_documentation() -> None:
    """Oracle: the rows; `python tests/serve/conformance.py` prints them."""
    assert conformance.table() in DOCUMENT.read_text()
