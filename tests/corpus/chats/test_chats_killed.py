"""A build of chats that is killed anywhere: the old folder or the new one, and the same bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpus.chats.fake_encoder import FakeEncoder
from corpus.test_rows import hash_tree

from preflight.corpus.chats.build import prepare_chats

# What makes something durable, or changes which names a folder holds.
CALLS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")
KILLED = 9
OLD, NEW = FakeEncoder(context_length=300), FakeEncoder(context_length=40)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"{i}?", "completion": f"{i} " * (i % 9 + 1)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(chats: Path, encoder: FakeEncoder) -> None:
    prepare_chats([chats], encoder, chats.parent / "data", val_split=0.2, shard_tokens=900)


def kill_at(number: int, chats: Path) -> int:
    """Build in a process that ends before its call of that number; how it ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = number
    try:

        def count(name: str) -> Any:
            inner = getattr(os, name)

            def call(*arguments: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    os._exit(KILLED)
                return inner(*arguments, **more)

            return call

        for name in CALLS:
            setattr(os, name, count(name))
        build(chats, NEW)
        os._exit(0)
    finally:
        os._exit(1)


def check_kills(chats: Path, *, has_old: bool, first: int, step: int) -> int:
    """Kill at every `step`-th call; the number of kills."""
    folder = chats.parent / "data"
    build(chats, NEW)
    new = hash_tree(folder)
    shutil.rmtree(folder)
    if has_old:
        build(chats, OLD)
    old = hash_tree(folder) if has_old else {}
    shutil.copytree(folder, chats.parent / "before") if has_old else None
    number = first
    while (code := kill_at(number, chats)) == KILLED:
        # A swap that was begun is finished by whoever comes next, without the chats as well.
        swapped = os.path.lexists(folder / ".building" / "metadata.json")
        found = hash_tree(folder)
        found = {name: digest for name, digest in found.items() if ".building" not in name}
        if swapped or found == new:
            prepare_chats([], NEW, folder, val_split=0.2)
            assert hash_tree(folder) == new, number
        else:
            assert found == old, number
            if has_old:
                prepare_chats([], OLD, folder, val_split=0.2)
        build(chats, NEW)
        assert hash_tree(folder) == new, number
        shutil.rmtree(folder)
        if has_old:
            shutil.copytree(chats.parent / "before", folder)
        number += step
    assert code == 0
    assert hash_tree(folder) == new
    return (number - first) // step


@pytest.mark.parametrize("has_old", [False, True])
def test_killed_here_and_there(chats: Path, has_old: bool) -> None:
    assert check_kills(chats, has_old=has_old, first=5, step=29) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("has_old", [False, True])
def test_killed_at_every_call(chats: Path, has_old: bool) -> None:
    assert check_kills(chats, has_old=has_old, first=1, step=1) >= 30
