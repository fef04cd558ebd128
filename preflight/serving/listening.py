"""The web server below the application: uvicorn, with bounds on what a connection may cost.

uvicorn alone waits without end for the head of a request, and for a client that reads nothing.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from preflight.serving.errors import ApiError, busy, encode_json
from preflight.serving.limits import Limits


def build_server(app: ASGIApp, host: str, port: int, limits: Limits) -> uvicorn.Server:
    """A server that is not started yet; `Server.serve` starts it and takes the signals."""
    protocol = cast(Any, functools.partial(BoundedProtocol, limits=limits))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        proxy_headers=False,  # anyone could write them
        server_header=False,
        access_log=False,  # paths may hold what a person typed
        log_config=None,
        log_level="error",
        timeout_keep_alive=int(limits.keep_alive_seconds),
        h11_max_incomplete_event_size=limits.head_bytes,
        backlog=limits.connections,
    )
    return uvicorn.Server(config)


class BoundedProtocol(H11Protocol):
    """A connection whose head must arrive in time and whose client must read."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock; one connection too many is told so, twice as many are cut off."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.connections:
            transport.abort()
        elif len(self.connections) > self._limits.connections:
            self.app = cast(Any, _refuse)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._arrival, self._stall = _cancel(self._arrival), _cancel(self._stall)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; the clock runs while a head is incomplete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._arrival = _cancel(self._arrival)
        else:
            self._await_head()

    def on_response_complete(self) -> None:
        """The next head may take as long as the first; uvicorn's own clock closes idle ones."""
        self._arrival = _cancel(self._arrival)
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, whether or not its client reads what is left."""
        super().timeout_keep_alive_handler()
        self._await_reader()

    def pause_writing(self) -> None:
        """The client does not read: wait for it, but not for ever."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It reads again."""
        self._stall = _cancel(self._stall)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in the form of all other errors."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()
            return
        body = encode_json(ApiError(400, "this is not a valid HTTP request", code="bad_http").body)
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
        head += b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(head + body)
        if cycle is not None:  # the rest of its request will not come
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
        self._await_reader()

    def _await_head(self) -> None:
        if self._arrival is None and not self.transport.is_closing():
            self._arrival = self.loop.call_later(self._limits.arrival_seconds, self.transport.abort)

    def _await_reader(self) -> None:
        if self._stall is None:
            self._stall = self.loop.call_later(self._limits.stall_seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a clock, if it runs; what takes its place."""
    if timer is not None:
        timer.cancel()
    return None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer to a connection above the limit."""
    error = busy("too many connections", 1)
    headers = [
        (b"content-type", b"application/json"),
        (b"retry-after", error.headers["Retry-After"].encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": encode_json(error.body)})
