"""One way to a server for every client: addresses, keys, proxies, certificates, and models that think."""

from __future__ import annotations

import base64
import datetime
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from grit_impl.errors import GRITError
from grit_impl.export.deploy import delete
from grit_impl.serve.client import Endpoint, Unanswered
from grit_impl.serve.connection import client_options, find_server

GREEDY = {"temperature": 0.0, "num_predict": 40}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, key or address but those of the test."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "url", "auth"),
    [
        ("", "http://127.0.0.1:11434", None),
        ("example", "http://example:11434", None),
        ("example:80", "http://example:80", None),
        (":9000", "http://127.0.0.1:9000", None),
        ("9000", "http://127.0.0.1:9000", None),
        ("http://example", "http://example", None),
        ("HTTPS://Example", "https://example", None),
        ("https://example:8443/ollama/", "https://example:8443/ollama", None),
        ("example/ollama", "http://example:11434/ollama", None),
        ("::1", "http://[::1]:11434", None),
        ("[::1]", "http://[::1]:11434", None),
        ("[::1]:80", "http://[::1]:80", None),
        ("fd00::7", "http://[fd00::7]:11434", None),
        ("http://[fd00::7]:80/x", "http://[fd00::7]:80/x", None),
        ("0.0.0.0", "http://127.0.0.1:11434", None),
        ("0.0.0.0:80", "http://127.0.0.1:80", None),
        ("::", "http://[::1]:11434", None),
        ("[::]:80", "http://[::1]:80", None),
        ("user:pass@example", "http://example:11434", ("user", "pass")),
        ("https://user:p%40ss%3A@example/x", "https://example/x", ("user", "p@ss:")),
        ("https://token@example", "https://example", ("token", "")),
        (' "example:80" ', "http://example:80", None),
        ("'http://example'", "http://example", None),
    ],
)
def test_every_form_of_an_address(
    given: str, url: str, auth: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what ollama's envconfig.Host makes of them, with what Go's client does about credentials."""
    monkeypatch.setenv("OLLAMA_HOST", given)
    server = find_server()
    assert (server.url, server.auth) == (url, auth)
    with httpx.Client(**client_options(server)) as client:
        assert client.build_request("GET", "/api/tags").url == httpx.URL(f"{url}/api/tags")


@pytest.mark.parametrize(
    "given",
    ["ftp://x", "http://", "http://x:port", "x:99999", "::1:11434", "http://a b", "x?y", "x#y", "http://[::1", "a\\b"],
)
def test_what_is_no_address(given: str) -> None:
    """Oracle: one line with the address and the forms there are."""
    if given == "http://":  # ollama's own reading: this machine
        assert find_server(given).url == "http://127.0.0.1"
        return
    with pytest.raises(GRITError, match=r"is not an Ollama address.*use host, host:port") as caught:
        find_server(given)
    assert "\n" not in str(caught.value)


def test_passwords_are_not_shown() -> None:
    """Oracle: the message has no part of it."""
    with pytest.raises(GRITError) as caught:
        find_server("user:secret@host:port")
    assert "secret" not in str(caught.value)


def header(fake: Any, name: str) -> list[str | None]:
    """What the requests of a test carried."""
    return [{key.lower(): value for key, value in headers.items()}.get(name) for headers in fake.headers]


@pytest.mark.parametrize("client", ["evaluating", "deploying"])
@pytest.mark.parametrize(
    ("key", "credentials", "expected"),
    [
        (None, "", None),
        ("abc", "", "Bearer abc"),
        (" abc\n", "", "Bearer abc"),
        (None, "user:p%40ss@", "Basic " + base64.b64encode(b"user:p@ss").decode()),
        ("abc", "user:pass@", "Basic " + base64.b64encode(b"user:pass").decode()),
    ],
)
def test_keys_and_credentials_are_sent(
    fake_ollama: Any, monkeypatch: pytest.MonkeyPatch, client: str, key: str | None, credentials: str, expected: Any
) -> None:
    """Oracle: the header that arrived, from every client alike; a proxy for everything is not asked for loopback."""
    server = fake_ollama(lambda model, prompt: "x")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    if key is not None:
        monkeypatch.setenv("OLLAMA_API_KEY", key)
    url = server.url.replace("://", f"://{credentials}")
    if client == "evaluating":
        with Endpoint(url, attempts=1) as endpoint:
            endpoint.generate("base", "x", GREEDY)
    else:
        monkeypatch.setattr(server.server.RequestHandlerClass, "do_DELETE", _accept(server), raising=False)
        delete(url, "base")
    assert header(server, "authorization") == [expected]


def _accept(server: Any) -> Callable[[Any], None]:
    def handle(handler: Any) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        server.headers.append(dict(handler.headers))
        handler.send(200, b"")

    return handle


def test_a_key_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one line, without the key."""
    for key in ("a b", "ключ", "a\nb"):
        monkeypatch.setenv("OLLAMA_API_KEY", key)
        with pytest.raises(GRITError, match="OLLAMA_API_KEY holds a character"):
            client_options(find_server("x"))


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({"HTTP_PROXY": "http://proxy:3128"}, "http://example", "http://proxy:3128"),
        ({"http_proxy": "proxy:3128"}, "http://example", "http://proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://example", None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "https://example", "http://proxy:3128"),
        ({"ALL_PROXY": "http://proxy:3128"}, "https://example", "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy"}, "127.0.0.1", None),
        ({"HTTP_PROXY": "http://proxy"}, "localhost", None),
        ({"HTTP_PROXY": "http://proxy"}, "x.localhost", None),
        ({"HTTP_PROXY": "http://proxy"}, "127.1.2.3", None),
        ({"HTTP_PROXY": "http://proxy"}, "::1", None),
        ({"HTTP_PROXY": "http://proxy"}, "0.0.0.0", None),
        ({"ALL_PROXY": "socks://proxy"}, "localhost", None),
        ({"ALL_PROXY": "socks://proxy", "NO_PROXY": "example"}, "example", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "*"}, "example", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "other, example.org"}, "gpu.example.org", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": ".example.org"}, "gpu.example.org", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "*.example.org"}, "gpu.example.org", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "ample.org"}, "http://example.org", "http://proxy"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "example:11434"}, "example", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "example:80"}, "example", "http://proxy"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "10.0.0.0/8"}, "10.1.2.3", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "10.0.0.0/8"}, "11.1.2.3", "http://proxy"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "fd00::/8"}, "fd12::1", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "fd00::/8"}, "example", "http://proxy"),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "fd12::1,x"}, "[fd12::1]:80", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "[fd12::1]"}, "[fd12::1]:80", None),
        ({"HTTP_PROXY": "http://proxy", "NO_PROXY": "10.1.2.3"}, "10.1.2.3:80", None),
        ({"HTTP_PROXY": ""}, "example", None),
    ],
)
def test_proxies(environment: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: curl's rules for these variables, by hand; networks as in Go's httpproxy."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = client_options(find_server(url))
    assert (options["proxy"] and str(options["proxy"].url)) == proxy
    with httpx.Client(**options):
        pass


SOCKS = pytest.param("socks5h://proxy:1080", marks=pytest.mark.skipif(bool(find_spec("socksio")), reason="no socksio"))


@pytest.mark.parametrize(
    "given", ["socks://proxy:1080", "socks4://proxy", SOCKS, "ftp://proxy", "http://a:b", "http://[::1"]
)
@pytest.mark.parametrize("client", ["evaluating", "deploying"])
def test_proxies_that_cannot_be_used(given: str, client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one line that names the variable and two ways out, from every client."""
    monkeypatch.setenv("ALL_PROXY", given)
    with pytest.raises(GRITError, match=r"ALL_PROXY .*NO_PROXY=example") as caught:
        Endpoint("example") if client == "evaluating" else delete("example", "x")
    assert "\n" not in str(caught.value)


class _Answering(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        status, head, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **head}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """Starts a server with one answer to everything, with a certificate if one is given; returns its address."""
    servers = []

    def start(status: int, body: bytes = b"", head: dict[str, str] | None = None, pair: Path | None = None) -> str:
        server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answering)
        server.answer = (status, head or {}, body)
        server.handle_error = lambda *_: None
        if pair is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pair)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"{'https' if pair else 'http'}://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a self-signed certificate for 127.0.0.1, in one file."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    path: Path = tmp_path_factory.mktemp("tls") / "pair.pem"
    plain = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def said(url: str, client: str) -> str:
    """What a user is told."""

    def ask() -> None:
        if client == "deploying":
            return delete(url, "x")
        with Endpoint(url, attempts=2, backoff=0.001) as endpoint:
            endpoint.version()

    with pytest.raises(GRITError) as caught:
        ask()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("client", ["evaluating", "deploying"])
def test_certificates(client: str, answering: Any, pair: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: a certificate that nobody signed is named with the remedy, and the remedy works."""
    url = answering(200, b'{"version": "1"}', pair=pair)
    assert "its certificate is not accepted, self-signed certificate: SSL_CERT_FILE" in said(url, client)
    monkeypatch.setenv("SSL_CERT_FILE", str(pair))
    if client == "evaluating":
        with Endpoint(url) as endpoint:
            assert endpoint.version() == "1"
    else:
        delete(url, "x")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere"))
    assert "cannot read the certificates in" in said(url, client)


@pytest.mark.parametrize("client", ["evaluating", "deploying"])
def test_failures_have_their_reason(client: str, answering: Any) -> None:
    """Oracle: each was arranged: another protocol, no such name, nobody there, a redirection, no permission."""
    plain = answering(200, b"{}")
    assert "is it http:// after all?" in said(plain.replace("http:", "https:"), client)
    assert "the name of the host is not known" in said("http://no-such-host.invalid", client)
    assert "the connection is refused" in said("127.0.0.1:1", client)
    assert "https://elsewhere" in said(answering(301, head={"Location": "https://elsewhere/"}), client)
    assert "401" in said(answering(401, b'{"error": "unauthorized"}'), client)


# -- models that think ------------------------------------------------------------------------------------------------


def test_thinking_models_are_recognised_and_asked_not_to(fake_ollama: Any) -> None:
    """Oracle: the requests that arrived; a model without the capability is asked as before."""
    server = fake_ollama(lambda model, prompt: "x")
    for capabilities, sent in ((["completion", "thinking"], False), (["completion"], None), (None, None), ("x", None)):
        server.capabilities, server.requests = capabilities, []
        with Endpoint(server.url) as endpoint:
            assert endpoint.find_thinking(["base"]) == (["base"] if sent is False else [])
            endpoint.generate("base", "x", GREEDY)
        assert [request.get("think") for request in server.requests] == [sent]


@pytest.mark.parametrize(
    ("response", "thinking", "answer", "thought"),
    [
        ("57", "is it?", "57", "is it?"),
        ("<think>\nis it?\n</think>\n\n57", None, "57", "<think>\nis it?\n"),
        ("is it?\n</think>\n57", None, "57", "is it?\n"),
        ("  <think></think> 57", None, "57", "  <think>"),
        ("<think>a</think><think>b</think>57", None, "57", "<think>a</think><think>b"),
        (" 57 < think", None, " 57 < think", ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_no_answer(
    fake_ollama: Any, response: str, thinking: str | None, answer: str, thought: str, stream: bool
) -> None:
    """Oracle: by hand, as the thinking models' templates write them; an answer without thoughts is untouched."""
    server = fake_ollama(lambda model, prompt: response)
    server.edit = lambda request, whole: whole if thinking is None else {**whole, "thinking": thinking}
    with Endpoint(server.url, attempts=1) as endpoint:
        reply = endpoint.generate("base", "x", GREEDY, stream=stream)
    assert (reply.text, reply.thinking) == (answer, thought)


@pytest.mark.parametrize(
    ("response", "thinking"), [("", "so far"), ("<think> so far", None), ("<think>x</think>", None), (" ", "so far")]
)
def test_only_thoughts_are_said_at_once(fake_ollama: Any, response: str, thinking: str | None) -> None:
    """Oracle: one request, and why; six would all end like this."""
    server = fake_ollama(lambda model, prompt: response)
    server.edit = lambda request, whole: {**whole, "eval_count": 9, **({"thinking": thinking} if thinking else {})}
    with Endpoint(server.url, backoff=0.001) as endpoint, pytest.raises(Unanswered, match="the model only thought"):
        endpoint.generate("base", "x", GREEDY)
    assert len(server.requests) == 1
