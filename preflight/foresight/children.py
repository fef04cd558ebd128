"""Work in several processes at once that wait for each other, as ranks do: see `child`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from preflight.core import storage
from preflight.core.errors import ExitCode
from preflight.core.processes import shield_children
from preflight.foresight.child import (
    ALL_MEMORY_HELD,
    LOOK_SECONDS,
    MAX_SILENT_SECONDS,
    Child,
    ChildRules,
    Work,
    conclude,
    look,
    measure_resident_bytes,
    silence_error,
)

# What the others may need to say why, after one has ended without an answer.
_REASON_SECONDS = 10.0
_KINDS = ("end", "error", "crash")  # the first tells most: a rank that was killed fails the others
Outcome = tuple[str, Any]  # kind and content of a child's last message


def run_in_children(
    works: Sequence[Work], rules: ChildRules, is_final: Callable[[Any], bool]
) -> list[Any]:
    """Do all `works` at once, each in a new process; afterwards the processes are gone.

    Args:
        works: as in `run_in_child`; they send no messages.
        rules: the limit is for the memory of all together.
        is_final: whether the answer of one stands for all. Then the others, which may wait for
            that one, are killed.

    Returns:
        The answers in the order of `works`, or the final one alone; or a `LackOfMemory` alone.

    Raises:
        PreflightError: as `run_in_child`.
    """
    children: list[Child] = []
    try:
        storage.make_own_folder(rules.folder)
        with shield_children():
            for work in works:
                children.append(Child(work, rules.folder))
        outcomes = _await_outcomes(children, rules, is_final)
    finally:
        for child in children:
            child.end()
        storage.remove_tree(rules.folder)
    failures = [outcome for outcome in outcomes if outcome[0] != "answer"]
    if failures:
        return [conclude(*min(failures, key=_order), rules)]
    return [content for _, content in outcomes]


def _order(failure: Outcome) -> tuple[bool, int, int]:
    """Of failures the first tells most of the cause."""
    kind, content = failure
    is_of_another = kind == "error" and content[0] == ExitCode.WORKER_LOST
    return is_of_another, _KINDS.index(kind), content if kind == "end" else 0


def _await_outcomes(
    children: list[Child], rules: ChildRules, is_final: Callable[[Any], bool]
) -> list[Outcome]:
    """The outcomes of all children in their order, or a final answer alone, or what has failed."""
    outcomes: dict[int, Outcome] = {}
    silent_seconds = rules.silent_seconds or MAX_SILENT_SECONDS
    looks_left = round(silent_seconds / LOOK_SECONDS)
    while len(outcomes) < len(children) and looks_left:
        looks_left -= 1
        rules.stop.leave_if_stopping(*rules.stopped)
        waiting = [number for number in range(len(children)) if number not in outcomes]
        for number in waiting:
            child = children[number]
            found = look(child.receiver, child.process, LOOK_SECONDS / len(waiting))
            if found is None:
                continue
            if found[0] != "answer":
                looks_left = min(looks_left, round(_REASON_SECONDS / LOOK_SECONDS))
            elif is_final(found[1]):
                return [found]
            outcomes[number] = found
        if sum(measure_resident_bytes(c.process) for c in children) > rules.hard_limit_bytes:
            return [("answer", ALL_MEMORY_HELD)]
    failures = [outcome for outcome in outcomes.values() if outcome[0] != "answer"]
    if len(outcomes) < len(children) and not failures:
        raise silence_error(rules, silent_seconds)
    return failures or [outcomes[number] for number in range(len(children))]
