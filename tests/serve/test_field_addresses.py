"""Addresses as they stood in public reports. What is right was written down before the first run."""

from __future__ import annotations

import pytest

from grit_impl.serve.connection import client_options, find_server


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy but those of the test."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ollama_host"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("https://example.com/", "https://example.com"),  # ollama/ollama#916
        ("http://example.com/", "http://example.com"),
        ("my.example.de:443", "http://my.example.de:443"),  # gergap/vim-ollama#103: no scheme is http, for Ollama
        ("https://my.example.de:443", "https://my.example.de:443"),
    ],
)
def test_addresses_behind_a_web_server(given: str, url: str) -> None:
    """Oracle: what Ollama's own client makes of them."""
    assert find_server(given).url == url


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"])
def test_the_server_itself_set_as_proxy(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ollama/ollama#9127: a proxy variable that points at the server: the loopback is asked without."""
    monkeypatch.setenv(variable, "http://127.0.0.1:11434")
    assert client_options(find_server("http://127.0.0.1:11434"))["proxy"] is None
