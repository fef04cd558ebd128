"""Who may ask: the checks that come before every request, as ASGI middleware.

A stranger's web page can make its visitor's browser send requests to 127.0.0.1, and a stranger's
name server can let a name of its own point there (DNS rebinding). Browsers tell both: the address
of the page in ``Origin``, the name that was called in ``Host``.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preflight.core.log import log
from preflight.serving.errors import ApiError, busy, encode_json, quote
from preflight.serving.limits import Limits
from preflight.serving.metrics import Metrics

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case
# What a browser loads before a person can type a key, and what tells only that the server lives.
PUBLIC_PATHS = frozenset(("/", "/health"))
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
)


class Access(Protocol):
    """The settings that decide who may ask."""

    @property
    def host(self) -> str:
        """The address that the server listens at."""

    @property
    def api_key(self) -> str | None:
        """``None``: no key is needed, and any is accepted."""

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """Origins of web pages that may ask, such as ``https://chat.example``; ``*``: all."""


class Guard:
    """Checks each request, counts it, and turns whatever goes wrong into an answer."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, metrics: Metrics) -> None:
        self._app, self._access, self._limits, self._metrics = app, access, limits, metrics
        self._n_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; other kinds of connection are none of ours."""
        if scope["type"] != "http":
            return
        headers: Headers = scope["headers"]
        answer = _Tracked(send, _answer_headers(headers, self._access))
        self._n_running += 1
        try:
            if self._n_running > self._limits.connections:
                raise busy(f"more than {self._limits.connections} requests at once", 1)
            check_head(scope, self._limits)
            check_access(headers, self._access)
            if scope["method"] == "OPTIONS":
                await _answer_preflight(headers, answer)
            else:
                scope["has_key"] = has_key(headers, self._access.api_key)
                if not scope["has_key"] and scope["path"] not in PUBLIC_PATHS:
                    raise _no_key()
                scope["app"] = self._app  # Starlette raises its refusals then
                await self._app(scope, receive, answer)
        except ApiError as error:
            await answer.refuse(error)
        except HTTPException as error:  # an unknown path, or a method that a path does not have
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
            message = f"{scope['method'][:16]} {quote(scope['path'])}: {error.detail}"
            await answer.refuse(
                ApiError(error.status_code, message, code=code, headers=error.headers)
            )
        except Exception as error:
            await self._report(error, scope, answer)
        finally:
            self._n_running -= 1
            self._metrics.count_request(scope["path"], answer.status)

    async def _report(self, error: Exception, scope: Scope, answer: _Tracked) -> None:
        """A fault of ours: where it happened is logged, what the client wrote is not."""
        place, trace = "", error.__traceback__
        while trace is not None:
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        log.error(f"{scope['method']} failed: {type(error).__name__} at {place}")
        if answer.status:
            raise ConnectionAbortedError("an answer failed half-way") from None
        await answer.refuse(ApiError(500, "internal error; the server's log says where"))


class _Tracked:
    """`send` that adds headers and remembers the status; 0 before it is sent."""

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send, self._headers, self.status = send, headers, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *self._headers]
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Send an error, unless an answer has begun."""
        if self.status:
            return
        body = encode_json(error.body)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(key.lower().encode(), value.encode()) for key, value in error.headers.items()]
        start = {"type": "http.response.start", "status": error.status, "headers": headers}
        await self(start)
        await self({"type": "http.response.body", "body": body})


# ---- the checks ---------------------------------------------------------------------------------


def check_head(scope: Scope, limits: Limits) -> None:
    """ApiError 431 for a head that is too large; a server cuts off most of these before."""
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > limits.head_bytes:
        raise ApiError(431, f"the head is larger than {limits.head_bytes:,} bytes")


def check_access(headers: Headers, access: Access) -> None:
    """Host and Origin.

    Raises:
        ApiError: 400 or 403.
    """
    host = _single(headers, b"host")
    match = None if host is None else _HOST.fullmatch(host)
    if host is None or match is None:
        raise ApiError(400, "exactly one valid Host header is needed", code="invalid_host")
    # With a key a stranger's page gets nowhere; without one the name must be this machine's.
    if access.api_key is None and not _is_local(match[1], access.host):
        raise _foreign(
            f"the host {match[1]} is not this machine: call 127.0.0.1 or localhost, or start the "
            "server with --api-key-file"
        )
    if any(name == b"origin" for name, _ in headers):
        origin = _single(headers, b"origin")
        if origin is None or not (_is_same(origin, host) or _is_allowed(origin, access)):
            raise _foreign("this page may not use the server: start it with --cors-origin ORIGIN")


def has_key(headers: Headers, key: str | None) -> bool:
    """Whether the request carries the key; the time it takes says nothing about the key."""
    if key is None:
        return True
    scheme, _, given = (_single(headers, b"authorization") or "").partition(" ")
    is_equal = hmac.compare_digest(given.strip().encode(), key.encode())
    return is_equal and scheme.lower() == "bearer"


def _no_key() -> ApiError:
    return ApiError(
        401,
        "the key is missing or wrong: send Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
    )


def _foreign(message: str) -> ApiError:
    return ApiError(403, message, code="forbidden", headers={"Connection": "close"})


def _single(headers: Headers, name: bytes) -> str | None:
    """The value of a header that is there once."""
    values = [value for key, value in headers if key == name]
    return values[0].decode("latin-1").strip() if len(values) == 1 else None


def _is_local(name: str, own: str) -> bool:
    bare = name.strip("[]").lower()
    if bare in ("localhost", own.strip("[]").lower()):
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def _is_same(origin: str, host: str) -> bool:
    """Whether a page came from the host that it now asks; the scheme's own port may be missing."""
    scheme, separator, place = origin.lower().partition("://")
    if not separator or scheme not in ("http", "https") or not _HOST.fullmatch(place):
        return False
    port = ":443" if scheme == "https" else ":80"
    return place.removesuffix(port) == host.lower().removesuffix(port)


def _is_allowed(origin: str, access: Access) -> bool:
    return "*" in access.cors_origins or origin.lower() in map(str.lower, access.cors_origins)


# ---- CORS ---------------------------------------------------------------------------------------


def _answer_headers(headers: Headers, access: Access) -> Headers:
    """What every answer carries; pages of `--cors-origin` may read it."""
    origin = _single(headers, b"origin")
    if origin is None or not _is_allowed(origin, access):
        return _ALWAYS
    sent = [(name, value) for name, value in _ALWAYS if name != b"cross-origin-resource-policy"]
    return [*sent, (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]


async def _answer_preflight(headers: Headers, answer: _Tracked) -> None:
    """What a browser asks before it sends another site's page's request."""
    if _single(headers, b"origin") is None:
        raise ApiError(
            405, "OPTIONS is answered for web pages only", headers={"Allow": "GET, POST"}
        )
    asked = (_single(headers, b"access-control-request-headers") or "").lower()
    names = [name for name in re.split(r"[\s,]+", asked) if re.fullmatch(r"[a-z0-9-]{1,64}", name)]
    allowed = ", ".join(sorted({"authorization", "content-type", *names[:64]}))
    sent = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", allowed.encode()),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await answer({"type": "http.response.start", "status": 204, "headers": sent})
    await answer({"type": "http.response.body", "body": b""})
