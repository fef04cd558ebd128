"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# A client's own words are repeated in a message only so far.
_MAX_WORD = 64


class ApiError(Exception):
    """An answer with another status than 200.

    Attributes:
        status: of HTTP.
        message: for a person: what is wrong and what to do.
        param: the field that is wrong.
        code: a word for programs.
        headers: such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {
            "error": {
                "message": self.message,
                "type": _name_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


def _name_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Error 400 about a field; the message begins with its name."""
    return ApiError(400, f"{quote(param)} {message}", param=param[:_MAX_WORD], code=code)


def busy(message: str, seconds: int) -> ApiError:
    """Error 503: come again after so many seconds."""
    return ApiError(503, message, code="overloaded", headers={"Retry-After": str(seconds)})


def quote(word: str) -> str:
    """A client's word within a message."""
    return word if len(word) <= _MAX_WORD else word[: _MAX_WORD - 1] + "…"


def encode_json(value: Any) -> bytes:
    """Compact JSON in ASCII, so that half characters and line separators cannot do harm."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
