"""`--generate` as its users meet it: prompts, files, streams, the interactive prompt, mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from generate import generate_text, load_model
from preflight.checkpoints.saving import save_checkpoint
from preflight.checkpoints.store import open_checkpoint
from preflight.core.errors import PreflightError
from preflight.core.log import log
from preflight.core.streams import escape_controls
from preflight.device import runtime
from preflight.modes import generate, prompts, session
from preflight.modes.prompts import DEFAULT_PROMPTS, read_prompts
from preflight.settings import (
    GenerationSettings,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    build_config,
)
from preflight.tokenization import load_tokenizer
from transformer_model import DecoderOnlyTransformer

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(
    vocab_size=50_304, context_length=16, n_embeddings=16, n_heads=2, n_layers=1, ffn_hid_dim=32
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


def save_model(folder: Path, step: int = 1, **tokenizer: Any) -> Path:
    """A checkpoint of random weights in which every token is quite certain."""
    torch.manual_seed(step)
    model = DecoderOnlyTransformer(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if name.startswith("blocks") and parameter.dim() > 1 else 1)
    gpt2 = load_tokenizer("gpt2")
    described = {"name": "gpt2", "fingerprint": gpt2.fingerprint, "vocab_size": gpt2.vocab_size}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    config = {"model": dataclasses.asdict(MODEL), "tokenizer": described | tokenizer}
    return save_checkpoint(folder, step, weights, {}, config, {"val_loss": 10.0 / step}).path


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder; the checkpoint of step 2 is the best."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder, 1)
    save_model(folder, 2)
    return folder


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged; a wait is told of at once."""
    handler = logging.Handler()
    lines: list[str] = []
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(prompts, "PATIENCE_SECONDS", 0.05)
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


Run = Callable[..., Any]


def build_flags(output_dir: Path, *flags: str) -> list[str]:
    return [
        "--generate",
        "--output-dir",
        str(output_dir),
        "--device",
        "cpu",
        "--no-mixed-precision",
        *flags,
    ]


@pytest.fixture
def run(
    output_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Run:
    """`main.py --generate` in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str, stdin: str = "") -> subprocess.CompletedProcess:
        pipe = io.TextIOWrapper(io.BytesIO(stdin.encode()), newline="\n")  # as Python opens it
        monkeypatch.setattr(sys, "stdin", pipe)
        code = main.main(build_flags(output_dir, *flags))
        return subprocess.CompletedProcess(flags, code, *capfdbinary.readouterr())

    return call


@pytest.fixture
def run_process(output_dir: Path, tmp_path: Path) -> Run:
    """The same in a process of its own, which also has to end well."""

    def call(*flags: str, stdin: bytes = b"", stdout: Any = subprocess.PIPE) -> Any:
        command = [sys.executable, str(ROOT / "main.py"), *build_flags(output_dir, *flags)]
        return subprocess.run(
            command,
            input=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=ENVIRONMENT,
            timeout=120,
            check=False,
        )

    return call


def complete_greedily(output_dir: Path, prompt: str) -> str:
    checkpoint = open_checkpoint(str(output_dir / "milestones" / "checkpoint-2"))
    model, tokenizer = load_model(checkpoint, torch.device("cpu"), torch.float32)
    return generate_text(model, tokenizer, prompt, SamplingConfig(6, temperature=0.0))


def test_prompt_and_text_on_stdout_statistics_on_stderr(
    output_dir: Path, run: Run, device: str
) -> None:
    done = run(
        "--prompts", "Hello there", "A caf\u00e9", *GREEDY, "--stop", "never", "--device", device
    )
    assert done.returncode == 0, done.stderr
    rule = f"\n{generate.SEPARATOR}\n"
    expected = rule.join(
        f"{p}{complete_greedily(output_dir, p)}\n" for p in ("Hello there", "A caf\u00e9")
    )
    assert done.stdout.decode() == expected
    assert b"checkpoint-2: step 2" in done.stderr  # the best
    assert b"2 completions, " in done.stderr
    assert b"tokens/s" in done.stderr


def test_the_batch_size_changes_no_completion_in_the_default_precision(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    """On a machine with bf16 in hardware, where training takes bf16 by default."""
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: True)
    flags = {"output_dir": str(output_dir), "device": "cpu", "max_new_tokens": 24}
    flags |= {"prompts": [f"{'a word ' * (i % 4)}{i}" for i in range(16)]}
    texts = []
    for size, asked in ((16, {"mixed_precision": True}), (16, {}), (1, {})):
        path = tmp_path / f"{len(texts)}.txt"
        more = {"generation_batch_size": size, "output_file": str(path)} | asked
        torch.set_float32_matmul_precision("high")
        assert generate.run(build_config(flags | more, {})) == 0
        texts.append(path.read_text())
        assert any("bfloat16" in line for line in logged) == bool(asked)
        logged.clear()
        assert torch.get_float32_matmul_precision() == ("high" if asked else "highest")
    assert texts[1] == texts[2]


def test_files_hold_every_answer_in_order(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("one", "two and more", "three")
    for suffix in (".json", ".jsonl", ".txt"):
        path = tmp_path / f"completions{suffix}"
        config = RunConfig(
            control=dataclasses.replace(RunConfig().control, output_dir=str(output_dir)),
            sampling=SamplingConfig(max_new_tokens=5),
            generation=GenerationSettings(
                prompts=prompts,
                num_return_sequences=2,
                generation_batch_size=4,
                output_file=str(path),
            ),
        )
        assert generate.run(config) == 0
        text = path.read_text(encoding="utf-8")
        if suffix == ".txt":
            assert text.count(generate.SEPARATOR) == 5
            assert text.startswith("one")
            continue
        records = (
            json.loads(text)
            if suffix == ".json"
            else [json.loads(line) for line in text.splitlines()]
        )
        assert [r["prompt"] for r in records] == [p for p in prompts for _ in range(2)]
        assert [r["sequence"] for r in records] == [0, 1] * 3
        assert all(r["finish_reason"] in ("length", "end") for r in records)
        assert records[0]["text"] != records[1]["text"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "completions.json",
        "completions.jsonl",
        "completions.txt",
    ]


def test_log_probabilities_stand_beside_tokens(output_dir: Path, run: Run, tmp_path: Path) -> None:
    """In JSON lines with ids; in text as a table below the completion."""
    flags = ("--prompts", "one", "two and more", *GREEDY, "--logprobs", "2")
    assert run(*flags, "--output-file", "a.jsonl").returncode == 0
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert list(record)[-4:] == ["text", "n_tokens", "finish_reason", "logprobs"]
        assert len(record["logprobs"]) == record["n_tokens"] == 6
        for token in record["logprobs"]:  # greedy: the first alternative is what was chosen
            alternatives = token.pop("alternatives")
            assert alternatives[0] == token
            assert [list(each) for each in alternatives] == [["id", "token", "logprob"]] * 2
            assert 0 > alternatives[0]["logprob"] > alternatives[1]["logprob"]
    gpt2 = load_tokenizer("gpt2")
    ids = [token["id"] for token in records[0]["logprobs"]]
    assert gpt2.decode(ids).startswith(records[0]["text"].rstrip("\ufffd"))
    shown = run(*flags).stdout.decode()
    assert shown.startswith(f"one{records[0]['text']}\n\n logprob  token  (most probable)\n")
    first = records[0]["logprobs"][0]
    assert (
        f"\n{first['logprob']:8.3f}  {json.dumps(first['token'], ensure_ascii=False)}  (" in shown
    )
    assert run(*flags, "--output-file", "a.txt").returncode == 0
    assert (tmp_path / "a.txt").read_text() == shown
    assert " logprob  token  (most probable)" in run("--interactive", *flags).stdout.decode()


def test_a_beam_search_from_the_command_line(output_dir: Path, run: Run, tmp_path: Path) -> None:
    flags = ("--prompts", "one", "two and more", "--max-new-tokens", "5", "--beams", "4")
    checkpoint = open_checkpoint(str(output_dir / "milestones" / "checkpoint-2"))
    model, tokenizer = load_model(checkpoint, torch.device("cpu"), torch.float32)
    expected = [
        generate_text(model, tokenizer, prompt, SamplingConfig(5, beams=4))
        for prompt in ("one", "two and more")
    ]
    done = run(*flags, "--temperature", "0.7")
    rule = f"\n{generate.SEPARATOR}\n"
    assert done.stdout.decode() == f"one{expected[0]}\n{rule}two and more{expected[1]}\n"
    assert b"--temperature is not used: --beams searches for the most probable text" in done.stderr
    assert run(*flags, "--interactive").stdout.decode().startswith(f"one{expected[0]}\n")
    best = (*flags, "--num-return-sequences", "3", "--output-file", "a.json")
    assert run(*best).returncode == 0
    records = json.loads((tmp_path / "a.json").read_text())
    assert [(r["prompt"], r["sequence"]) for r in records] == [
        (prompt, place) for prompt in ("one", "two and more") for place in range(3)
    ]
    assert [r["text"] for r in records[::3]] == expected
    scores = [r["score"] for r in records[:3]]
    assert scores == sorted(scores, reverse=True)
    assert len({r["text"] for r in records[:3]}) == 3


def test_searches_that_cannot_be(run: Run) -> None:
    for flags, words in (
        (("--beams", "0"), b"--beams must be at least 1, got 0"),
        (("--logprobs", "60000"), b"--logprobs 60,000 is more than the 50,257 ids that this model"),
        (("--beams", "2", "--num-return-sequences", "3"), b"must be at most --beams 2"),
    ):
        done = run("--prompts", "x", *flags)
        assert done.returncode == 2
        assert words in done.stderr


def test_a_stopped_run_keeps_the_finished_completions(
    output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any, **options: Any) -> None:
        arguments[-1]([(0, generate.Generation("first", 3, "end"))], 3)
        signal.raise_signal(signal.SIGTERM)
        arguments[-1]([(1, generate.Generation("second", 3, "end"))], 3)
        raise AssertionError("not stopped")

    monkeypatch.setattr(generate, "generate_batch", write)
    path = tmp_path / "completions.jsonl"
    config = RunConfig(
        control=dataclasses.replace(RunConfig().control, output_dir=str(output_dir)),
        generation=GenerationSettings(prompts=("a", "b", "c"), output_file=str(path)),
    )
    with pytest.raises(PreflightError) as caught:
        generate.run(config)
    assert caught.value.code == 143
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == ["first", "second"]


def test_interactive_from_a_pipe(output_dir: Path, run: Run) -> None:
    lines = "a\n\n/temp cold\n/nonsense\n/len 3\n/topk\n/topp 1.5\nb\n"
    done = run("--interactive", *GREEDY, stdin=lines)
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode()
    assert out.startswith(f"a{complete_greedily(output_dir, 'a')}\nb")
    told = done.stderr.decode()
    assert "/temp takes a number, got 'cold'" in told
    assert "/nonsense: no such command" in told
    assert "/len is now 3" in told
    assert "/topk is 50" in told
    assert "/topp must be at most 1" in told
    assert "1 completion, 6 tokens" in told
    assert "1 completion, 3 tokens" in told


def test_line_ends_from_a_pipe(output_dir: Path, run: Run) -> None:
    done = run("--interactive", *GREEDY, stdin="a\r\n/len 3\r\n/quit\r\nnever\r\n")
    assert done.stdout.decode() == f"a{complete_greedily(output_dir, 'a')}\n"
    assert b"/len is now 3" in done.stderr


def test_a_piped_prompt_is_completed(output_dir: Path, run: Run) -> None:
    done = run(*GREEDY, stdin="two\r\nlines\r\n")
    assert done.returncode == 0
    prompt = "two\nlines"
    assert done.stdout.decode() == f"{prompt}{complete_greedily(output_dir, prompt)}\n"
    assert b"the 2 lines of stdin are one prompt; --prompts-file - reads one a line" in done.stderr


def test_a_session_repeats_with_its_seed(run: Run) -> None:
    done = run("--interactive", "--len-is-no-flag", stdin="")
    assert done.returncode == 2
    script = "x\nx\n/seed 42\nx\n/quit\nnever\n"
    done = run("--interactive", "--max-new-tokens", "8", "--temperature", "2", stdin=script)
    assert done.returncode == 0
    first, second, third = (part for part in done.stdout.decode().split("\nx"))
    assert "x" + second != first
    assert first in ("x" + third, "x" + third.rstrip("\n"))


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, *arguments], ENVIRONMENT | {"TERM": "dumb"})
        self.seen = b""

    def read_some(self) -> None:
        if select.select([self.descriptor], [], [], 60)[0]:
            self.seen += os.read(self.descriptor, 65536)  # OSError when the program has left
        else:
            raise AssertionError(f"nothing came after {self.seen!r}")

    def read_until(self, text: bytes) -> bytes:
        """What came up to and with `text`, which is taken from what was seen."""
        while text not in self.seen:
            self.read_some()
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def write(self, data: bytes) -> None:
        os.write(self.descriptor, data)

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, again when nothing comes: a signal that reaches Python between
        two waits of readline is noticed at the next key only.
        """
        for _ in range(5):
            time.sleep(0.5)
            self.write(b"\x03")
            if select.select([self.descriptor], [], [], 5)[0]:
                return

    def wait(self) -> int:
        """The exit code; what is still shown is read away, or the program could not leave."""
        with contextlib.suppress(OSError):
            while select.select([self.descriptor], [], [], 30)[0]:
                os.read(self.descriptor, 65536)
            os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """End the program if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.descriptor)


@pytest.fixture
def terminal(output_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened = []

    def start(*flags: str) -> Terminal:
        command = [str(ROOT / "main.py"), *build_flags(output_dir, *flags)]
        opened.append(Terminal(command, tmp_path))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_on_a_terminal_it_answers_then_asks(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("--prompts", "Hello \x1b[31m", *GREEDY)
    shown = screen.read_until(b"1 completion, 6 tokens")
    assert b"Hello \\x1b[31m" in shown  # made visible, not obeyed
    assert b"\x1b[31m" not in shown
    screen.read_until(b"> ")
    screen.write(b"\n")  # an empty line is harmless
    screen.read_until(b"> ")
    screen.write(b"/help\n")
    screen.read_until(b"/quit")
    screen.read_until(b"> ")
    screen.write(b"/len 1000000\n")
    screen.read_until(b"is now 1000000")
    screen.read_until(b"> ")
    screen.write(b"Go on\n")
    screen.read_until(b"Go on\r\n")
    while len(screen.seen) < 20:  # it streams
        screen.read_some()
    screen.write(b"\x03")  # Ctrl-C stops this completion
    screen.read_until(b"stopped\r\n")
    screen.read_until(b"> ")
    screen.write(b"/len 2\n")
    screen.read_until(b"> ")
    screen.write(b"again\n")
    screen.read_until(b"1 completion, 2 tokens")
    screen.read_until(b"> ")
    screen.write(b"half a line")
    screen.read_until(b"half a line")
    screen.interrupt()  # drops the line
    screen.read_until(b"> ")
    screen.interrupt()  # leaves
    assert screen.wait() == 130


def test_control_characters_go_raw_to_a_pipe(run: Run) -> None:
    done = run("--prompts", "Hello \x1b[31m", *GREEDY)
    assert b"Hello \x1b[31m" in done.stdout


def test_line_ends_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a token ends between the two characters; to a pipe they go as they are."""
    pieces = ["a\r\nb\r", "\nc\rd\r", "e\x1b", "\r\n"]
    for terminal, expected in ((True, "a\nb\nc\nd\ne\\x1b\n"), (False, "".join(pieces))):
        shown = io.StringIO(newline="")
        monkeypatch.setattr(shown, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stdout", shown)
        for piece in pieces:
            session.show(piece)
        assert shown.getvalue() == expected


def test_invisible_characters_are_escaped() -> None:
    text = "a\n\tb\r\x1b\x7f\x9b\u202e\u2066\u200f \u00e9\U0001f600"
    assert escape_controls(text) == (
        "a\n\tb\\x0d\\x1b\\x7f\\x9b\\u202e\\u2066\\u200f \u00e9\U0001f600"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout(run_process: Run) -> None:
    with open("/dev/full", "wb") as full:
        done = run_process("--prompts", "a", *GREEDY, stdout=full)
    assert done.returncode == 6
    assert b"cannot write to stdout: No space left" in done.stderr
    assert b"Exception" not in done.stderr


def test_a_closed_pipe_is_quiet(run_process: Run) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_process("--prompts", "a", "b", *GREEDY, stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert b"Broken" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "there is no prompt"),
        ("p.txt", b"\n \r\n", "there is no prompt"),
        ("p.txt", b"fine\nb\xff\nfine\n\xfe\n", "2 of 4 lines"),
        ("p.txt", b"\x7fELF\0\0\0", "line 1: binary"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\nnot json\n{"text": "b"}\n[1]\n"x"\n{"prompt": 3}\n{\n',
            'line 2: not JSON; line 3: no "prompt" with a text; line 4',
        ),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "line 1"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
        (None, b"", "No such file"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str | None, content: bytes, words: str) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(PreflightError) as caught:
        read_prompts(RunConfig(generation=GenerationSettings(prompts_file=str(path))))
    assert caught.value.code == 3
    assert words in str(caught.value)
    assert len(caught.value.lines) <= 5


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"\xef\xbb\xbffirst\r\n\n  second \nthird", ["first", "  second ", "third"]),
        ("p.txt", b"one\rtwo\r", ["one", "two"]),
        ("p.txt", b"one\r\r\ntwo\xe2\x80\xa8more", ["one", "two\u2028more"]),
        ("p.jsonl", b'{"prompt": "two\\nlines", "id": 7}\n\n{"prompt": ""}\n', ["two\nlines", ""]),
        ("p.JSONL", b'{"prompt": "a\\r\\n"}\r\n{"prompt": "b"}\r\n', ["a\r\n", "b"]),
    ],
)
def test_good_prompt_files(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    config = RunConfig(generation=GenerationSettings(prompts_file=str(path)))
    assert read_prompts(config) == expected


def read_from(monkeypatch: pytest.MonkeyPatch, stdin: Any, *given: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", stdin)
    return read_prompts(RunConfig(generation=GenerationSettings(prompts=given)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"Once upon a time\n", "Once upon a time"),
        (b"no line end", "no line end"),
        (b"a\r\nb\rc\n\n", "a\nb\nc\n"),
        (b"\xef\xbb\xbfA caf\xc3\xa9\r\n", "A caf\u00e9"),
        (b"\n", ""),  # starts a new text
    ],
)
def test_a_pipe_is_one_prompt(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], content: bytes, expected: str
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(content))
    assert read_from(monkeypatch, stdin) == [expected]
    told = any("lines of stdin are one prompt" in line for line in logged)
    assert told == ("\n" in expected)
    assert read_from(monkeypatch, stdin, "given", "") == ["given", ""]


def test_a_spelled_line_end_in_a_prompt_is_told_of(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    assert read_from(monkeypatch, None, "a\nb") == ["a\nb"]
    assert logged == []
    assert read_from(monkeypatch, None, r"a\nb") == [r"a\nb"]
    assert "read as two characters" in logged[0]


@pytest.mark.parametrize("content", [b"\xff", b"a\0b", b"x" * 100])
def test_a_pipe_that_is_no_prompt(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPTS_BYTES", 99)
    with pytest.raises(PreflightError, match="the prompt on stdin: ") as caught:
        read_from(monkeypatch, io.TextIOWrapper(io.BytesIO(content)))
    assert caught.value.code == 3


def test_a_stdin_without_a_prompt(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    """Empty, closed, a terminal, the null device, and what nohup leaves: never waited for."""
    master, slave = pty.openpty()
    with (
        open(os.devnull, encoding="utf-8") as null,
        open(os.devnull, "wb") as unreadable,
        open(slave, encoding="utf-8") as terminal,
        open(os.dup(unreadable.fileno()), encoding="utf-8") as nohup,
    ):
        for stdin in (None, io.TextIOWrapper(io.BytesIO()), null, terminal, nohup):
            assert read_from(monkeypatch, stdin) == list(DEFAULT_PROMPTS)
            assert "no prompt is given" in logged.pop()
    os.close(master)
    assert "stdin cannot be read: Bad file descriptor" in logged


def test_an_open_pipe_is_read_only_without_prompts(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as stdin:
        assert read_from(monkeypatch, stdin, "given") == ["given"]  # it would wait for ever
        threading.Timer(0.3, os.close, [writing]).start()
        os.write(writing, b"late")
        assert read_from(monkeypatch, stdin) == ["late"]
    assert any("waiting for the end of the prompt on stdin" in line for line in logged)


def test_a_fifo_of_prompts_is_told_of_and_read(tmp_path: Path, logged: list[str]) -> None:
    fifo = tmp_path / "p.txt"
    os.mkfifo(fifo)
    threading.Timer(0.3, fifo.write_bytes, [b"one\ntwo\n"]).start()
    config = RunConfig(generation=GenerationSettings(prompts_file=str(fifo)))
    assert read_prompts(config) == ["one", "two"]
    assert f"waiting for the end of --prompts-file {fifo}" in logged[0]


@pytest.mark.parametrize("name", ["/dev/zero", "/", "/dev/null"])
def test_places_that_hold_no_prompts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPTS_BYTES", 2**20)
    with pytest.raises(PreflightError, match=r"larger than|directory|no prompt") as caught:
        read_prompts(RunConfig(generation=GenerationSettings(prompts_file=name)))
    assert caught.value.code == 3


def test_prompts_from_stdin_and_faults_before_the_model(run_process: Run) -> None:
    done = run_process("--prompts-file", "-", *GREEDY, stdin=b"one\ntwo\n")
    assert done.returncode == 0
    assert done.stdout.startswith(b"one")
    done = run_process("--prompts-file", "-", "--output-dir", "nowhere", stdin=b"\0\n")
    assert done.returncode == 3  # and not 5: the checkpoint was not looked for yet
    assert b"line 1: binary" in done.stderr


def test_default_prompts(run: Run) -> None:
    done = run(*GREEDY)
    assert done.returncode == 0
    for prompt in DEFAULT_PROMPTS:
        assert prompt.encode() in done.stdout


def check(output_file: Path, *flags: str) -> PreflightError | None:
    """What is said of an output file, before anything is read."""
    config = main.parse_command_line(["--generate", "--output-file", str(output_file), *flags])[1]
    try:
        generate.check_output(config)
    except PreflightError as error:
        return error
    return None


def make_link(kind: str, target: Path) -> Path:
    """`target` itself, or another name of it, with a suffix that an output may have."""
    if kind == "itself":
        return target
    link = target.with_name("link.txt")
    if kind == "hard":
        os.link(target, link)
    elif kind == "chain":
        target.with_name("inner").symlink_to(target.name)
        link.symlink_to("inner")
    else:
        link = target.with_name("folder")
        link.symlink_to(target.parent, target_is_directory=True)
        link = link / target.name
    return link


@pytest.mark.parametrize("kind", ["itself", "hard", "chain", "through a folder"])
@pytest.mark.parametrize("flag", ["--prompts-file", "--config", "--text-file"])
def test_an_output_that_is_an_input_is_refused(tmp_path: Path, flag: str, kind: str) -> None:
    source = tmp_path / "p.txt"
    source.write_text("{}")
    error = check(make_link(kind, source), flag, str(source), "--overwrite")
    assert error is not None
    assert error.code == 2
    assert f"the same file is read as {flag}" in str(error)


def test_an_output_that_belongs_to_a_run_is_refused(output_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    shard, listed = data / "train" / "shard_00000.npy", data / "metadata.json"
    metrics = output_dir / "metrics.jsonl"
    for path in (shard, listed, metrics):
        path.touch()
    checkpoint = output_dir / "milestones" / "checkpoint-1"
    best, alone = ("--output-dir", str(output_dir)), ("--checkpoint-path", str(checkpoint))
    weights = ("--checkpoint-path", str(checkpoint / "model.safetensors"))
    for number, (target, flags) in enumerate(
        (
            (shard, ("--data-dir", str(data))),
            (listed, ("--data-dir", str(data))),
            (metrics, best),
            *((checkpoint / "config.json", flags) for flags in (best, alone, weights)),
            (checkpoint / "model.safetensors", alone),
            (checkpoint / "checkpoint.pt", ("--checkpoint-path", str(checkpoint.parent))),
        )
    ):
        link = tmp_path / f"{number}.txt"
        link.symlink_to(target)
        for output in (link, target):
            if output.suffix in (".txt", ".json", ".jsonl"):
                error = check(output, *flags, "--overwrite")
                assert error is not None, (output, flags)
                assert (error.code, "the same file is read as" in str(error)) == (2, True)
    metrics.unlink()


def test_stdout_that_is_an_input_is_refused(run_process: Run, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\n")
    with path.open("ab") as appended:
        done = run_process("--prompts-file", "p.txt", *GREEDY, stdout=appended)
    assert done.returncode == 2
    assert b"stdout: the same file is read as --prompts-file" in done.stderr
    assert path.read_text() == "one\n"


def test_an_output_that_exists_is_replaced_only_when_asked(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("older")
    done = run("--prompts", "x", *GREEDY, "--output-file", "a.txt", "--output-dir", "nowhere")
    assert done.returncode == 6  # and not 5: no checkpoint was looked for
    assert b"--output-file a.txt: exists already; --overwrite replaces it" in done.stderr
    assert path.read_text() == "older"
    done = run("--prompts", "x", *GREEDY, "--output-file", "a.txt", "--overwrite")
    assert done.returncode == 0
    assert path.read_text().startswith("x")


def test_places_where_no_output_goes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "other").touch()
    (tmp_path / "link.txt").symlink_to("other")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    long = "x" * 251 + ".txt"  # fits; its temporary name does not
    for name in ("fifo.txt", "folder.txt", "link.txt", "dangling.txt", long, "no/a.txt"):
        error = check(tmp_path / name, "--overwrite")
        assert error is not None, name
        assert error.code == 6
    assert check(tmp_path / "a.TXT") is None


def test_flags_that_disagree_with_the_checkpoint(run: Run) -> None:
    done = run("--n-embeddings", "64", "--n-heads", "4", "--context-length", "16", *GREEDY)
    assert done.returncode == 5
    assert b"n_embeddings: checkpoint 16, flags 64" in done.stderr
    assert b"n_heads: checkpoint 2, flags 4" in done.stderr
    assert b"context" not in done.stderr


def test_mistakes_and_their_codes(run: Run, tmp_path: Path) -> None:
    for flags, code, words in (
        (("--output-dir", "nowhere"), 5, b"no checkpoint"),
        (("--output-file", "no/such/folder/a.txt"), 6, b"cannot be written"),
        (("--output-file", "a.csv"), 2, b"a.csv"),
    ):
        done = run(*flags)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"fingerprint": "f" * 64}, "f" * 64),
        ({"name": "no_such_encoding"}, "unknown"),
        ({"name": None}, "tokenizer.name"),
    ],
)
def test_a_checkpoint_of_another_tokenizer(
    tmp_path: Path, described: dict[str, Any], words: str
) -> None:
    checkpoint = open_checkpoint(str(save_model(tmp_path / "run", **described)))
    with pytest.raises(PreflightError) as caught:
        load_model(checkpoint, torch.device("cpu"), torch.float32)
    assert caught.value.code == 5
    assert words in str(caught.value)
