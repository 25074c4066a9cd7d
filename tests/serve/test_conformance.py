"""The rows of `conformance.py` on the embedded server, or on the one that `--ollama-url` names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import conformance
import pytest
import tiny
from conformance import ROWS, STEPS

from grit_impl.export import export_adapter, export_merged, write_modelfile
from grit_impl.export.deploy import delete, deploy
from grit_impl.gguf.metadata import read_metadata
from grit_impl.serve.client import server_url
from grit_impl.serve.server import EmbeddedOllama

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


def test_the_table_is_in_the_documentation() -> None:
    """Oracle: the rows; `python tests/serve/conformance.py` prints them."""
    assert conformance.table() in DOCUMENT.read_text()
