"""No hash is remembered between tests, and none waits for the disk."""

from __future__ import annotations

import os

import pytest

from preflight.checkpoints import format as checkpoint_format


@pytest.fixture(autouse=True)
def _quick_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_writing.py` audits durability in a process of its own, where fsync is real."""
    checkpoint_format.forget_verified()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
