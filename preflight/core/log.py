"""What a person is told on stderr."""

from __future__ import annotations

LOG_LEVELS = ("debug", "info", "warning", "error")
