"""How much a client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on connections and requests.

    Attributes:
        arrival_seconds: in which the head of a request, and then its body, must arrive.
        answer_seconds: in which an answer must be complete, the wait for its turn included.
        stall_seconds: after which a client that reads nothing is cut off.
    """

    head_bytes: int = 16 * 2**10
    body_bytes: int = 2**20
    connections: int = 128
    arrival_seconds: float = 10
    answer_seconds: float = 300
    stall_seconds: float = 30
    keep_alive_seconds: float = 5
