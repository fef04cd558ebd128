"""The menu: what it says of a folder, the commands that it makes, and a session in a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from modes.made_run import make_run

from conftest import ROOT
from main import parse_command_line
from preflight.core.errors import ExitCode, PreflightError
from preflight.modes import menu
from preflight.modes.asking import ArrowAsker, Choice, NumberAsker
from preflight.modes.folder_state import find_runs, read_state
from preflight.modes.picking import pick_checkpoints
from preflight.settings.kinds import MODES

DOWN, ENTER, CTRL_C, CTRL_D = "\x1b[B", "\r", "\x03", "\x04"


class Answers:
    """An `Asker` that knows the answers: choices by how they begin, lines as they are."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def choose(self, title: str, choices: Sequence[Choice]) -> int | None:
        self.asked.append(title)
        wanted = self.answers.pop(0)
        if wanted is None:
            return None
        return next(
            number
            for number, choice in enumerate(choices)
            if choice.text.startswith(wanted) and not choice.heading
        )

    def ask(self, question: str, default: str = "") -> str | None:
        self.asked.append(question)
        answer = self.answers.pop(0)
        return default if answer == "" else answer


def add_checkpoint(run: Path, step: int, val_loss: float | None) -> Path:
    folder = run / "milestones" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    manifest = {"step": step, "losses": {"val_loss": val_loss}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def add_data(folder: Path) -> None:
    folder.mkdir()
    content = {
        "sources": [{"name": "my.txt"}],
        "train": {"n_tokens": 5_300_000},
        "val": {"n_tokens": 100_000},
    }
    (folder / "metadata.json").write_text(json.dumps(content))


# ---- what is here -------------------------------------------------------------------------------


def test_what_the_folder_holds_in_words(tmp_path):
    assert read_state(tmp_path).describe() == ["nothing yet: neither data nor a run"]
    add_data(tmp_path / "data")
    rows = make_run(tmp_path / "runs" / "a", 1000)
    add_checkpoint(tmp_path / "b", 7, 3.3789)
    bits = [row["bits_per_byte"] for row in rows if row["event"] == "eval"][-1]
    assert read_state(tmp_path).describe() == [
        "data: 5.40 million tokens of my.txt",
        f"run runs/a: step 1,000 of 1,000, {bits:.2f} bits per byte",
        "run b: step 7, validation loss 3.38",
    ]


def test_what_is_damaged_counts_as_not_there(tmp_path):
    add_data(tmp_path / "data")
    (tmp_path / "data" / "metadata.json").write_text('{"train": 3, "sources": 4}')
    run = tmp_path / "a"
    make_run(run, 5)
    (run / "run_plan.json").write_text('{"plan": [], "commands": ["python main.py --train \'"]}')
    (run / "metrics.jsonl").write_bytes(b'\xff\n[1]\n{"step": true}\n{"step": 3}\n{"st')
    (run / "milestones" / "checkpoint-9").mkdir(parents=True)
    (run / "milestones" / "checkpoint-9" / "manifest.json").write_bytes(b"\x00")
    os.symlink(run, tmp_path / "link")
    (found,) = read_state(tmp_path).runs
    assert (found.step, found.total_steps, found.command) == (3, None, ())


def test_a_large_folder_is_read_in_a_moment_without_torch(tmp_path):
    add_data(tmp_path / "data")
    make_run(tmp_path / "big", 20_000)
    for number in range(100):
        add_checkpoint(tmp_path / f"run{number}", number + 1, 1.0)
    code = (
        "import sys, time; import preflight.modes.menu as m; from pathlib import Path\n"
        "began = time.process_time(); s = m.read_state(Path('.')); m.suggest_steps(s)\n"
        "print(len(s.runs), max(run.step for run in s.runs))\n"
        "print(time.process_time() - began < 1, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["101", "20000", "True", "False"]


# ---- what is suggested, and the commands --------------------------------------------------------


def list_suggestions(root: Path) -> list[str]:
    return [step.text for step in menu.suggest_steps(read_state(root))]


def test_what_is_sensible_comes_first(tmp_path):
    assert "built-in sample" in list_suggestions(tmp_path)[0]
    (tmp_path / "my.txt").write_text("text")
    assert list_suggestions(tmp_path) == ["check a run on my.txt", "train on my.txt"]
    add_data(tmp_path / "data")
    assert list_suggestions(tmp_path)[0] == "check a run on this data before it starts"
    make_run(tmp_path / "a", 10)
    add_checkpoint(tmp_path / "a", 10, 2.0)
    of_a = ["generate text with a", "measure a", "make the report of a"]
    assert list_suggestions(tmp_path)[:3] == of_a
    assert "compare two of the runs" not in list_suggestions(tmp_path)
    plan = tmp_path / "a" / "run_plan.json"
    commands = ["python main.py --train --max-steps 20 --text-file 'a b.txt'"]
    plan.write_text(json.dumps({"plan": {"total_steps": 20}, "commands": commands}))
    step = menu.suggest_steps(read_state(tmp_path))[0]
    assert step.text == "go on training a"
    words = menu.build_command(step, read_state(tmp_path), Answers())
    assert words == ["--train", "--max-steps", "20", "--text-file", "a b.txt"]
    make_run(tmp_path / "b", 10)
    add_checkpoint(tmp_path / "b", 10, 2.0)
    assert "compare two of the runs" in list_suggestions(tmp_path)
    steps = {step.mode: step for step in menu.suggest_steps(read_state(tmp_path))}
    words = menu.build_command(steps["compare"], read_state(tmp_path), Answers(""))
    assert words == ["--compare", "ask"]


ANSWERS = {
    "model_size": "nano",
    "sweep": "learning_rate=1e-3,2e-3",
    "tokenize": "-- a text",
    "detokenize": "1,2,3",
    "prompts": "Once upon",
}


class Anything(Answers):
    """Answers every question with something that fits; "" where it may be empty."""

    def __init__(self, *, is_brief: bool) -> None:
        super().__init__()
        self.is_brief = is_brief

    def choose(self, title: str, choices: Sequence[Choice]) -> int | None:
        return 0

    def ask(self, question: str, default: str = "") -> str | None:
        flag = question.split(":")[0].removeprefix("--").replace("-", "_")
        flag = "import_path" if flag == "import" else flag
        if self.is_brief and flag not in menu._NEEDED:
            return default
        return ANSWERS.get(flag) or default or {"max_steps": "7"}.get(flag, "my.txt")


@pytest.mark.parametrize("is_brief", [True, False])
@pytest.mark.parametrize("has_runs", [True, False])
@pytest.mark.parametrize("has_data", [True, False])
def test_every_command_of_the_menu_is_one(tmp_path, monkeypatch, is_brief, has_runs, has_data):
    monkeypatch.chdir(tmp_path)
    if has_data:
        add_data(tmp_path / "data")
    for name in ("a", "b") * has_runs:
        make_run(tmp_path / name, 5)
        add_checkpoint(tmp_path / name, 5, 2.0)
    state = read_state(Path())
    steps = [*menu.suggest_steps(state), *(menu.Step("", mode) for mode in MODES.names())]
    for step in steps:
        words = menu.build_command(step, state, Anything(is_brief=is_brief))
        assert words is not None
        assert parse_command_line(words)[0] == step.mode


def test_a_value_that_is_refused_is_asked_for_again(tmp_path, capsys):
    answers = Answers("nano", "many", "0", "12", "")
    words = menu.build_command(
        menu.Step("", "train", ("--text-file", "x")), read_state(tmp_path), answers
    )
    assert words == ["--train", "--text-file", "x", "--model-size", "nano", "--max-steps", "12"]
    told = capsys.readouterr().err
    assert "--max-steps takes a whole number, got 'many'" in told
    assert "--max-steps must be at least 1, got 0" in told


def test_a_new_run_does_not_go_into_the_folder_of_another(tmp_path):
    assert menu.suggest_folder(read_state(tmp_path)) == "training_output"
    make_run(tmp_path / "training_output", 5)
    make_run(tmp_path / "run_2", 5)
    assert menu.suggest_folder(read_state(tmp_path)) == "run_3"
    answers = Answers("", "micro", "", "")
    words = menu.build_command(menu.Step("", "train"), read_state(tmp_path), answers)
    assert words == ["--train", "--output-dir", "run_3"]


def test_leaving_a_question_goes_back(tmp_path):
    for answers in ([None], ["", None], ["", "micro", None]):
        state = read_state(tmp_path)
        assert menu.build_command(menu.Step("", "train"), state, Answers(*answers)) is None


def test_every_exit_code_has_words():
    texts = [menu.explain_exit(int(code)) for code in ExitCode]
    assert len(set(texts)) == len(texts)
    assert menu.explain_exit(7) == "another process is using the folder (exit code 7)"
    assert menu.explain_exit(-signal.SIGKILL) == "killed by signal 9 (Killed)"
    assert menu.explain_exit(99) == "it ended with exit code 99"


# ---- picking ------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path: Path) -> dict[str, list[Path]]:
    """Checkpoints by run, newest first; the best is the second."""
    paths = {}
    for name, when in (("a", 2), ("b", 1)):
        make_run(tmp_path / name, 5)
        os.utime(tmp_path / name / "metrics.jsonl", (when, when))
        paths[name] = [
            add_checkpoint(tmp_path / name, step, loss)
            for step, loss in ((30, 2.5), (20, 2.25), (10, 4.0), (5, None))
        ]
    return paths


def choose_by_numbers(monkeypatch: pytest.MonkeyPatch, root: Path, *lines: str) -> list[Path]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return pick_checkpoints(root, NumberAsker())


def choose_by_arrows(root: Path, keys: str) -> list[Path]:
    import questionary
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as stream:
        stream.send_text(keys)
        return pick_checkpoints(root, ArrowAsker(questionary, input=stream, output=DummyOutput()))


def test_picking_by_numbers(tmp_path, monkeypatch, two_runs, capsys):
    for lines, wanted in (
        (("1", "1"), two_runs["a"][:1]),
        (("x", "9", "2", "3"), two_runs["b"][2:3]),
        (("1", "5"), two_runs["a"]),
        (("3",), [two_runs["a"][1], two_runs["b"][1]]),
        (("q",), []),
        (("1", "q"), []),
        ((), []),
    ):
        assert choose_by_numbers(monkeypatch, tmp_path, *lines) == wanted
    told = capsys.readouterr()
    assert "step 20, validation loss 2.2500 (best)" in told.err
    assert "step 30, validation loss 2.5000 (newest)" in told.err
    assert "'9' is none of the numbers" in told.err
    assert told.out == ""


def test_picking_with_arrow_keys(tmp_path, two_runs):
    assert choose_by_arrows(tmp_path, ENTER + ENTER) == two_runs["a"][:1]
    assert choose_by_arrows(tmp_path, DOWN + ENTER + DOWN * 2 + ENTER) == two_runs["b"][2:3]
    assert choose_by_arrows(tmp_path, ENTER + DOWN * 4 + ENTER) == two_runs["a"]
    best = [two_runs["a"][1], two_runs["b"][1]]
    assert choose_by_arrows(tmp_path, DOWN * 2 + ENTER) == best
    for key in ("q", CTRL_D):
        assert choose_by_arrows(tmp_path, key) == []
    with pytest.raises(KeyboardInterrupt):
        choose_by_arrows(tmp_path, CTRL_C)


def test_the_best_is_green_and_the_newest_blue(tmp_path, two_runs):
    class Watching(Answers):
        def choose(self, title: str, choices: Sequence[Choice]) -> int | None:
            colours.append([choice.colour for choice in choices])
            return super().choose(title, choices)

    colours: list[list[str]] = []
    pick_checkpoints(tmp_path, Watching("run a", "step 10"))
    assert colours[1] == ["blue", "green", "", "", ""]


def test_nothing_to_pick_from(tmp_path):
    make_run(tmp_path / "a", 5)
    assert len(find_runs(tmp_path)) == 1
    with pytest.raises(PreflightError, match="no run with a checkpoint") as caught:
        pick_checkpoints(tmp_path, Answers())
    assert caught.value.code == ExitCode.CHECKPOINT


# ---- in a terminal ------------------------------------------------------------------------------


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, folder: Path, argv: list[str], kind: str) -> None:
        self.text = self._unread = ""
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(folder)
                extra = {"TERM": kind, "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100"}
                os.execve(sys.executable, [sys.executable, *argv], os.environ | extra)
            finally:
                os._exit(99)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until `text` comes, beyond what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self._unread:
            assert time.monotonic() < end, f"{text!r} did not come: {self.text}{self._unread}"
            if select.select([self._descriptor], [], [], 0.1)[0]:
                part = self._read()
                assert part, f"ended before {text!r}: {self.text}{self._unread}"
                self._unread += part.decode(errors="replace")
        before, found, self._unread = self._unread.partition(text)
        self.text += before + found

    def type(self, keys: str) -> None:
        time.sleep(0.2)  # until the program reads keys, and not lines
        os.write(self._descriptor, keys.encode())

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, 65536)
        except OSError as error:  # what Linux says when the program has ended
            assert error.errno == errno.EIO
            return b""

    def finish(self) -> int:
        """The exit code."""
        while self._read():
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)


@pytest.fixture
def open_terminal(tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*argv: str, kind: str = "dumb") -> Terminal:
        opened.append(Terminal(tmp_path, list(argv), kind))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


MAIN = str(ROOT / "main.py")
# A menu whose children are a program that waits for Ctrl-C.
DRIVER = """
import sys
sys.path.insert(0, {root!r})
sys.argv = [{fake!r}]
from preflight.modes.menu import run_menu
sys.exit(run_menu())
"""
FAKE = """
import sys, time
print("child", *sys.argv[1:], flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_session_with_numbers(tmp_path, open_terminal):
    make_run(tmp_path / "a", 5)
    terminal = open_terminal(MAIN)
    terminal.wait_for("q leaves")
    assert "run a: step 5 of 5" in terminal.text
    terminal.type("1\n")
    terminal.wait_for("--report --output-dir a")
    terminal.wait_for("b goes back")
    terminal.type("\n")
    terminal.wait_for("report: a/report.html")
    terminal.wait_for("done")
    assert (tmp_path / "a" / "report.html").exists()
    terminal.wait_for("q leaves")  # the menu again
    terminal.type(CTRL_D)
    assert terminal.finish() == 0


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_ctrl_c_in_a_child_returns_to_the_menu(tmp_path, open_terminal, kind):
    make_run(tmp_path / "a", 5)
    (tmp_path / "main.py").write_text(FAKE)
    (tmp_path / "driver.py").write_text(
        DRIVER.format(root=str(ROOT), fake=str(tmp_path / "main.py"))
    )
    terminal = open_terminal("driver.py", kind=kind)
    terminal.wait_for("q leaves")
    terminal.type("1\n" if kind == "dumb" else ENTER)
    terminal.wait_for("b goes back")
    terminal.type("\n" if kind == "dumb" else ENTER)
    terminal.wait_for("child --report --output-dir a")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped by Ctrl-C (exit code 130)")
    terminal.wait_for("q leaves")
    terminal.type("q\n" if kind == "dumb" else "q")
    assert terminal.finish() == 0


@pytest.mark.parametrize("keys", ["q", CTRL_D, ENTER])
def test_arrow_keys_leave(tmp_path, open_terminal, keys):
    terminal = open_terminal(MAIN, kind="xterm")
    terminal.wait_for("q leaves")
    n_rows = len(menu.suggest_steps(read_state(tmp_path))) + len(MODES.names())
    terminal.type(DOWN * n_rows + ENTER if keys == ENTER else keys)
    assert terminal.finish() == 0


def test_there_is_no_menu_on_a_pipe_nor_with_flags(tmp_path, preflight, open_terminal):
    done = preflight()
    assert done.returncode == ExitCode.FLAGS
    assert "give exactly one mode" in done.stderr
    code = (
        "import subprocess, sys; "
        f"done = subprocess.run([{sys.executable!r}, {MAIN!r}], stdout=subprocess.PIPE); "
        "sys.exit(done.returncode)"
    )
    for argv in (["-c", code], [MAIN, "--output-dir", "x"]):
        terminal = open_terminal(*argv)
        terminal.wait_for("give exactly one mode")
        assert terminal.finish() == ExitCode.FLAGS
