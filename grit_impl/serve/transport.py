"""Connections that do not wait for ever: silent clients, clients that do not read, and the listening socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from grit_impl.errors import GRITError

HEADER_SECONDS, SEND_SECONDS = 15.0, 60.0


class Protocol(H11Protocol):
    """A connection that sends no complete request in time is closed: silent ones would use up the limit."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        # uvicorn types it as always set; before the first request it is None.
        if getattr(self, "cycle", None) is None and not self.transport.is_closing():
            self.transport.close()


class Patience:
    """Ends requests whose client neither sends its body nor reads its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with limited patience for sending."""

        async def patient_send(message: Message) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            await self.app(scope, receive, patient_send)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `GRITError` where there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # With the protocol named, asyncio turns Nagle off; without, each answer waits 40 ms for an acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except (OSError, OverflowError) as error:
        raise GRITError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return listener
