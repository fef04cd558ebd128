"""Paths that cannot be used: names that are too long, and places where nobody may look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .harness import ROOT, TRAIN_FLAGS, find_message_faults, hash_tree

LONG = "x" * 300
# By flag: the exit codes that are right for it, and the flags of the call.
CASES: dict[str, tuple[set[int], list[str]]] = {
    "--text-file": ({3}, TRAIN_FLAGS),
    "--data-dir": ({4, 6}, TRAIN_FLAGS),
    "--output-dir": ({6}, TRAIN_FLAGS),
    "--resume-from": ({5}, TRAIN_FLAGS),
    "--config": ({2}, TRAIN_FLAGS),
    "--checkpoint-path": ({5}, ["--generate"]),
    "--prompts-file": ({3}, ["--generate"]),
    "--output-file": ({2, 6}, ["--generate"]),
}
SCRIPT = """
import contextlib, io, json, os, sys
sys.path.insert(0, {root!r})
import main, preflight.modes.train, preflight.modes.generate, preflight.corpus.sources.builtin
import preflight.corpus.sources.pipe, pydantic, filelock
from preflight.settings.kinds import SOURCES, TOKENIZERS
for name in SOURCES.names():
    SOURCES.load(name)
from preflight.tokenization import load_tokenizer
for name in TOKENIZERS.names():
    TOKENIZERS.load(name)
load_tokenizer("gpt2")
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for argv in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main.main(argv)
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


def test_every_path_question_has_an_answer(place: Path) -> None:
    """All calls in one process, which imports as root and then goes on as nobody."""
    os.chmod(place.parent, 0o711)
    os.chmod(place, 0o777)
    (place / "text.txt").write_text("some words to learn from\n" * 2000)
    private = place / "private"
    (private / "inner").mkdir(parents=True)
    (private / "inner" / "manifest.json").write_text("{}")
    (private / "a.txt").write_text("a text")
    os.chmod(private, 0o000 if os.getuid() else 0o700)
    values = {
        "long": f"{LONG}.txt",
        "long folder": f"{LONG}/a.txt",
        "private": "private/a.txt",
        "private folder": "private/inner",
        "within a file": "text.txt/a.txt",
    }
    cases = [(flag, kind) for flag in CASES for kind in values]
    argvs = [[*CASES[flag][1], flag, values[kind]] for flag, kind in cases]
    before = hash_tree(place)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(root=str(ROOT))],
        cwd=place,
        input=json.dumps(argvs),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    os.chmod(private, 0o700)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases), done.stderr
    wrong = {
        case: (code, said)
        for case, (code, said) in zip(cases, answers, strict=True)
        if code not in CASES[case[0]][0] or find_message_faults(said) != ""
    }
    assert wrong == {}, (wrong, [p.read_text() for p in place.rglob("crash.log")])
    assert hash_tree(place) == before
