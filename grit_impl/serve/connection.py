"""How an Ollama server is reached: one reading of addresses, keys, proxies and certificates, for every client here.

Addresses are what OLLAMA_HOST may hold (ollama's envconfig.Host). Proxies are those of the environment, but never for
this machine's loopback, which no proxy can reach; NO_PROXY may hold names, addresses and networks (CIDR).
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import httpx

from grit_impl.errors import GRITError

DEFAULT_PORT = 11434
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a server that listens everywhere is reached."""
_HOW = "use host, host:port, [IPv6]:port, :port or http(s)://user:password@host:port/path"


@dataclass(frozen=True, slots=True)
class Server:
    """One address, taken apart.

    Attributes:
        url: Its base URL, without credentials: it may be shown.
        host: Name or address, without brackets.
        auth: User and password, if the address has them.
    """

    url: str
    host: str
    auth: tuple[str, str] | None = None

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken."""
        return self.url.startswith("https:")

    @property
    def loopback(self) -> bool:
        """Whether it is on this machine."""
        address = _address(self.host)
        return address.is_loopback if address else self.host == "localhost" or self.host.endswith(".localhost")


def find_server(value: str | None = None) -> Server:
    """The server of an argument, else of OLLAMA_HOST, else Ollama's default.

    Raises:
        GRITError: the value is not a http(s) address.
    """
    given = (value or os.environ.get("OLLAMA_HOST") or "").strip().strip("\"'").strip() or f"127.0.0.1:{DEFAULT_PORT}"
    bare = "://" not in given
    text = given
    if bare and ":" in given and _address(given.strip("[]")):
        text = f"[{given.strip('[]')}]"
    elif bare and given.isdigit():
        text = f":{given}"
    try:
        parts = urlsplit(f"http://{text}" if bare else text)
        port = parts.port or (DEFAULT_PORT if bare else None)
        host = (parts.hostname or "").lower() or "127.0.0.1"
        host = _ANYWHERE.get(host, host)
        shown = f"[{host}]" if ":" in host else host
        url = f"{parts.scheme}://{shown}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        good = parts.scheme in ("http", "https") and not parts.query and not parts.fragment
        if not good or re.search(r"[\s\\]", url) or not httpx.URL(url).host:
            raise ValueError
    except (ValueError, httpx.InvalidURL) as error:
        hidden = re.sub(r"//[^/@]*@|^[^/@]*@", "", given)
        why = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise GRITError(f"{hidden!r} is not an Ollama address{why}: {_HOW}") from None
    auth = None
    if parts.username is not None:
        auth = unquote(parts.username), unquote(parts.password or "")
    return Server(url, host, auth)


def client_options(server: Server) -> dict[str, Any]:
    """What `httpx.Client` and `httpx.AsyncClient` are made with, besides their timeout and limits.

    Raises:
        GRITError: a key, a proxy or a file of certificates in the environment cannot be used.
    """
    headers = {}
    if key := os.environ.get("OLLAMA_API_KEY", "").strip():
        if not re.fullmatch("[!-~]+", key):
            raise GRITError("OLLAMA_API_KEY holds a character that no HTTP header can hold: set it again")
        headers["authorization"] = f"Bearer {key}"
    try:
        # Certificates take a quarter of a second to load, and plain HTTP needs none.
        verify = httpx.create_ssl_context() if server.secure else False
    except (OSError, ValueError) as error:
        where = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
        raise GRITError(f"cannot read the certificates in {where} (SSL_CERT_FILE or SSL_CERT_DIR): {error}") from None
    return {
        "base_url": server.url,
        "auth": server.auth,
        "headers": headers,
        "verify": verify,
        "proxy": _proxy(server),
        "trust_env": False,  # httpx's own reading of the environment fails at socks:// and at NO_PROXY=fd00::/8
    }


def reason(error: BaseException) -> str:
    """Why a connection failed, in a few words, with what can be done about it."""
    chain: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None and each not in chain:
            chain.append(each)
            inner = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
            todo += [each.__cause__, each.__context__, *inner]
    for each in chain:
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted, {each.verify_message}: SSL_CERT_FILE may name its issuer's file"
        if isinstance(each, ssl.SSLError):
            return f"it speaks no TLS that is understood here ({each.reason or each}): is it http:// after all?"
        if isinstance(each, socket.gaierror):
            return "the name of the host is not known"
        if isinstance(each, ConnectionRefusedError):
            return "the connection is refused"
    said = " ".join(str(error).split())
    if isinstance(error, httpx.ProxyError):
        return f"the proxy of the environment answers {said!r}; NO_PROXY may name the host"
    return said or type(error).__name__


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _proxy(server: Server) -> httpx.Proxy | None:
    environment = getproxies()
    scheme = server.url.partition(":")[0]
    name = scheme if environment.get(scheme) else "all"
    given = environment.get(name, "")
    if not given or server.loopback or _bypassed(server, environment.get("no", "")):
        return None
    kind = given.partition("://")[0].lower() if "://" in given else "http"
    variable = f"{name.upper()}_PROXY"
    way_out = f"set it to http://, https:// or socks5://, or NO_PROXY={server.host}"
    if kind not in ("http", "https", "socks5", "socks5h"):
        raise GRITError(f"{variable} names a proxy of the unknown kind {kind}://: {way_out}")
    if kind.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise GRITError(f"{variable} names a {kind}:// proxy, which needs `pip install httpx[socks]`; or {way_out}")
    try:
        return httpx.Proxy(given if "://" in given else f"http://{given}")
    except (ValueError, httpx.InvalidURL):
        raise GRITError(f"{variable} is not an address: {way_out}") from None


def _bypassed(server: Server, listed: str) -> bool:
    """Whether NO_PROXY names the server: `*`, a name with its subdomains, `name:port`, an address, or a network."""
    address, port = _address(server.host), urlsplit(server.url).port
    for entry in filter(None, (part.strip().lower() for part in listed.split(","))):
        try:
            if address is not None and address in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
        except ValueError:
            pass
        name, _, wanted = entry.rpartition(":") if re.search(r"[^:]:\d+$", entry) else (entry, "", "")
        name = name.strip("[]").removeprefix("*").removeprefix(".")
        named = not name if entry.startswith("*") else False
        if (named or server.host == name or server.host.endswith(f".{name}")) and wanted in ("", str(port)):
            return True
    return False
