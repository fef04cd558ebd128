"""Bad chats, templates, bases and adapters: exit codes, messages, and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from preflight.core.errors import ExitCode

from .harness import (
    TRAIN_FLAGS,
    ForkServer,
    find_message_faults,
    find_points,
    find_temporaries,
    hash_tree,
    make_text,
)
from .scenarios import sample

FLAGS = ["--finetune", "chats.jsonl", "--from", "base", "--output-dir", "out"]
RUN = ["--device", "cpu", "--no-mixed-precision", "--max-steps", "3", "--batch-size", "2"]


def row(*contents: str, roles: str = "ua") -> str:
    """A chat of OpenAI's messages; roles by their first letter."""
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    turns = [
        {"role": names[role], "content": content}
        for role, content in zip(roles, contents, strict=True)
    ]
    return json.dumps({"messages": turns})


GOOD = [row(f"say {word}", word) for word in ("fox", "dog", "owl", "bat", "cow", "hen")]


@pytest.fixture(scope="module")
def world(server: ForkServer, scratch: Path) -> Iterator[Path]:
    """A tiny base and six chats; copied for each test."""
    place = scratch / "finetuning"
    place.mkdir()
    (place / "text.txt").write_text(make_text(9_000))
    flags = [*TRAIN_FLAGS, "--max-steps", "2", "--output-dir", "base", "--data-dir", "data"]
    code, said = server.run("main", flags, cwd=place)
    assert code == 0, said
    (place / "chats.jsonl").write_text("\n".join(GOOD) + "\n")
    yield place
    shutil.rmtree(place)


@pytest.fixture
def folder(world: Path, place: Path) -> Path:
    shutil.copytree(world, place, dirs_exist_ok=True)
    return place


def lines(*bad: str) -> Callable[[Path], None]:
    """Chats of which the third line on is bad."""
    return lambda place: (place / "chats.jsonl").write_text("\n".join([*GOOD[:2], *bad]) + "\n")


def template(source: str) -> Callable[[Path], None]:
    return lambda place: (place / "own.jinja").write_text(source)


TEMPLATE = ["--chat-template", "own.jinja"]
CASES: dict[str, tuple[Callable[[Path], Any], list[str], int, list[str]]] = {
    "empty chat": (lines('{"messages": []}'), [], 3, ["line 3"]),
    "two users in a row": (lines(row("a", "b", roles="uu")), [], 3, ["line 3", "user"]),
    "no assistant": (lines(row("a", roles="u")), [], 3, ["line 3"]),
    "unknown role": (lines(row("a", "b", roles="ut")), [], 3, ["line 3", "tool"]),
    "an answer that is no text": (
        lines('{"messages": [{"role": "user", "content": 5}]}'),
        [],
        3,
        ["line 3"],
    ),
    "another format": (lines('{"prompt": "a", "completion": "b"}'), [], 3, ["line 3"]),
    "no format": (lambda p: (p / "chats.jsonl").write_text('{"a": 1}\n'), [], 3, ["line 1"]),
    "not JSON": (lines("{"), [], 3, ["row 3"]),
    "one chat": (lambda p: (p / "chats.jsonl").write_text(GOOD[0]), [], 3, ["chats.jsonl"]),
    "no chat": (lambda p: (p / "chats.jsonl").write_text(""), [], 3, ["chats.jsonl"]),
    "no file": (lambda p: (p / "chats.jsonl").unlink(), [], 3, ["chats.jsonl"]),
    "a prompt longer than the context": (
        lambda p: (p / "chats.jsonl").write_text(
            "\n".join(row(letter * 99, "y") for letter in "xyz")
        ),
        [],
        3,
        ["target"],
    ),
    "a template that loops": (
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        TEMPLATE,
        2,
        ["own.jinja"],
    ),
    "a template that reaches for attributes": (
        template("{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        TEMPLATE,
        2,
        ["own.jinja"],
    ),
    "a template that grows": (template("{{ 'a' * 10**10 }}"), TEMPLATE, 2, ["own.jinja"]),
    "no template": (lambda p: None, TEMPLATE, 2, ["own.jinja"]),
    "a template that is none": (template("{% for %}"), TEMPLATE, 2, ["own.jinja"]),
    "no base": (lambda p: shutil.rmtree(p / "base"), [], 5, ["base"]),
    "a damaged base": (
        lambda p: next(p.glob("base/milestones/*2/model.safetensors")).write_bytes(b"0" * 99),
        ["--from", "base/milestones/checkpoint-2"],
        5,
        ["model.safetensors"],
    ),
    "layers that it does not have": (
        lambda p: None,
        ["--lora-rank", "2", "--lora-targets", "gate_up_proj"],
        2,
        ["--lora-targets"],
    ),
    "two modes": (lambda p: None, ["--train"], 2, ["--finetune"]),
    "its base as output": (lambda p: None, ["--output-dir", "base"], 5, ["--finetune"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(server: ForkServer, folder: Path, name: str) -> None:
    spoil, flags, expected, words = CASES[name]
    spoil(folder)
    before = hash_tree(folder / "base") if (folder / "base").exists() else {}
    code, said = server.run("main", [*FLAGS, *RUN, *flags], cwd=folder)
    assert (code, find_message_faults(said, *words)) == (expected, ""), said
    assert (hash_tree(folder / "base") if before else {}) == before
    assert not list((folder / "out").glob("milestones/*"))


def test_a_chat_of_a_hundred_thousand_turns_is_cut(server: ForkServer, folder: Path) -> None:
    long = row(*["a", "b"] * 50_000, roles="ua" * 50_000)
    (folder / "chats.jsonl").write_text("\n".join([*GOOD, long]) + "\n")
    code, said = server.run("main", [*FLAGS, *RUN], cwd=folder)
    assert code == 0, said
    assert "1 are longer than 32 tokens and lose their first turns" in said


def test_chats_that_change_are_not_gone_on_with(server: ForkServer, folder: Path) -> None:
    assert server.run("main", [*FLAGS, *RUN], cwd=folder)[0] == 0
    (folder / "chats.jsonl").write_text("\n".join([*GOOD, row("say elk", "elk")]) + "\n")
    kept = hash_tree(folder / "out/milestones")
    code, said = server.run("main", [*FLAGS, *RUN, "--max-steps", "5"], cwd=folder)
    assert (code, find_message_faults(said)) == (ExitCode.DATA, ""), said
    assert hash_tree(folder / "out/milestones") == kept


def test_adapters_without_their_base(server: ForkServer, folder: Path) -> None:
    flags = [*FLAGS, *RUN, "--lora-rank", "2"]
    assert server.run("main", flags, cwd=folder)[0] == 0
    generate = ["--generate", "--output-dir", "out", "--prompts", "a", "--max-new-tokens", "2"]
    assert server.run("main", generate, cwd=folder)[0] == 0
    (folder / "out/base").rename(folder / "away")
    for command in (generate, [*flags, "--max-steps", "5"]):
        code, said = server.run("main", command, cwd=folder)
        assert (code, find_message_faults(said, "adapters")) == (ExitCode.CHECKPOINT, ""), said
    # Another model's weights in its place.
    shutil.copytree(folder / "away", folder / "out/base")
    other = ["--max-steps", "3", "--output-dir", "other", "--data-dir", "data"]
    assert server.run("main", [*TRAIN_FLAGS, *other], cwd=folder)[0] == 0
    shutil.rmtree(folder / "out/base")
    shutil.copytree(folder / "other/milestones/checkpoint-3", folder / "out/base")
    (folder / "out/base/checkpoint.pt").unlink()
    for command in (generate, [*flags, "--max-steps", "5"]):
        code, said = server.run("main", command, cwd=folder)
        assert (code, find_message_faults(said, "SHA-256")) == (ExitCode.CHECKPOINT, ""), said


@pytest.mark.slow
def test_killed_anywhere(server: ForkServer, folder: Path, full: bool) -> None:
    """Chats, base and checkpoints: the second start comes to the same adapters."""
    flags = [*FLAGS, *RUN, "--lora-rank", "2", "--checkpoint-every", "1", "--eval-every", "3"]
    out = folder / "out"

    def read_outcome() -> dict[str, str]:
        assert not find_temporaries(out)
        kept = ("milestones/checkpoint-3/adapter_model.safetensors", "base/model.safetensors")
        found = hash_tree(out)
        chats = {name: digest for name, digest in found.items() if name.startswith("chats/")}
        return {name: found[name] for name in kept} | chats

    code, said, traced = server.trace("main", flags, cwd=folder)
    assert code == 0, said
    points = sample(find_points(traced, [out]), full)
    expected = read_outcome()
    assert len(points) > 20
    if not full:
        points = points[:: len(points) // 8]
    faults = []
    for point in points:
        shutil.rmtree(out)
        code, said, _ = server.trace(
            "main", flags, cwd=folder, inject=point.inject("signal=SIGKILL")
        )
        assert code == -9, (point, said)
        code, said = server.run("main", flags, cwd=folder)
        if code != 0 or read_outcome() != expected:
            faults.append(f"{point}: {code}: {said[-600:]}")
    assert not faults, "\n".join(faults)
