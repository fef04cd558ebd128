"""Trials in this process: what is sent to a child is pickled, as it would be."""

from __future__ import annotations

import pickle
from types import ModuleType
from typing import Any

import pytest

from preflight.foresight.child import ChildRules, Report, Work


def run_here(work: Work, rules: ChildRules, on_message: Report = lambda message: None) -> Any:
    """In place of `run_in_child`."""
    rules.stop.leave_if_stopping(*rules.stopped)
    return pickle.loads(pickle.dumps(work))(on_message)


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let `module` run its trials here."""
    monkeypatch.setattr(module, "run_in_child", run_here)
