"""The command line as a user meets it: exit codes, messages, speed of --help."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import main
from conftest import ROOT, TINY_FLAGS
from preflight import __version__
from preflight.checkpoints.store import find_newest
from preflight.settings import build_options


def test_help_is_short_and_help_all_lists_every_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["main.py"])
    assert main.main(["--help", "--train"]) == 0
    said = capsys.readouterr()
    short = said.out.splitlines()
    assert said.err == ""
    assert short[0] == "usage: python main.py MODE [flags]"
    assert '  python main.py --generate --prompts "Once upon a time"' in short
    assert len(short) < 54
    assert all(f"  --{mode} " in said.out for mode in main.MODES.names())
    assert main.main(["--help", "all"]) == 0
    full = capsys.readouterr().out
    assert full.startswith("usage: python main.py MODE [flags]\n\n")
    assert "5 % of the run" in full
    assert max(map(len, [*short, *full.splitlines()])) <= 100
    for option in build_options().values():
        assert f"  {option.flag}" in full
    assert "--help all shows all" in said.out
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"preflight {__version__}\n"


@pytest.mark.parametrize(
    ("topic", "shown", "left_out"),
    [
        ("search", "--target-batch-size", "--dropout"),
        ("generate", "--temperature", "--learning-rate"),
        ("train", "--learning-rate", "--temperature"),
        ("--top-k", "--top-k", "--top-p"),
    ],
)
def test_help_of_a_mode_a_group_or_a_flag(
    topic: str, shown: str, left_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([f"--help={topic}"]) == 0
    said = capsys.readouterr().out
    assert f"  {shown}" in said
    assert left_out not in said


def test_help_needs_neither_docstrings_nor_a_search_path(tmp_path: Path) -> None:
    def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, str(ROOT / "main.py"), "--help", "all"]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": ""} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    plain = run()
    assert plain.returncode == 0, plain.stderr
    stripped = run("-OO", PYTHONSAFEPATH="1")
    assert (stripped.returncode, stripped.stdout) == (0, plain.stdout), stripped.stderr


def test_help_imports_nothing_that_is_slow() -> None:
    """It has 0.15 s; pydantic would take 0.1 s, tqdm 0.03 s, torch seconds."""
    code = (
        "import sys; sys.argv = ['main.py', '--help']; import main\n"
        "assert main.main() == 0\n"
        "slow = {'torch', 'numpy', 'tiktoken', 'pydantic', 'tqdm', 'logging'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_installed_command_has_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/preflight", "--help"])
    assert main.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: preflight MODE [flags]")
    assert "main.py" not in said
    assert main.main(["--train", "--batch-size"]) == 2
    assert "see: preflight --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "exactly one mode"),
        ([], "see: python main.py --help"),
        ([], "for example: python main.py --train --text-file my.txt"),
        (["--train", "--generate"], "exactly one mode"),
        (["--trian"], "did you mean --train"),
        (["--train", "--batchsize", "3"], "did you mean --batch-size"),
        (["--train", "--batch-size"], "expected one argument"),
        (["--train", "--batch-size", "x", "--dropout", "7"], "--dropout"),
        (["--train", "--config", "missing.json"], "missing.json"),
        (["--train", "stray"], "'stray' belongs to no flag"),
        (["--train", "--lear", "1"], "unknown flag '--lear'"),
        (["train"], "did you mean --train?"),
        (["Generate"], "did you mean: python main.py --generate"),
        (["help"], "did you mean: python main.py --help"),
        (["-train"], "did you mean: python main.py --train"),
        (["\N{EN DASH}train", "a.txt"], "python main.py --train --text-file a.txt"),
        (["my notes.txt"], "python main.py --train --text-file 'my notes.txt'"),
        (["train", "--batch_size", "3"], "python main.py --train --batch-size 3"),
        (["--train=yes"], "--train takes no value: write --train alone"),
        (["--train", "--mixed-precision=no"], "write --mixed-precision or --no-mixed-precision"),
        (["--train", "--measure", "off"], "write --measure or --no-measure"),
        (["--train", "--output-dir", "my", "run"], "--output-dir 'my run'"),
        (["--generate", "--stop", "---"], "is joined with =: --stop=---"),
        (["--generate", "--stop", "a", "---"], "is joined with =: --stop=---"),
        (["--help", "samplign"], "did you mean sampling?"),
    ],
)
def test_mistakes_end_with_two_and_make_no_file(
    argv: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    assert main.main(argv) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert len(said.err.splitlines()) <= 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"batch_sise": 4}', "did you mean batch_size"),
        ('{"batch_size": "x"}', "--batch-size"),
        ("[1]", "not a JSON object"),
        ("{", "Expecting"),
        ('{"dropout": NaN}', "NaN"),
        ('{"seed": 1, "seed": 2}', "twice"),
        ('{"output_file": "a\\u0000.txt"}', "--output-file must not be empty or contain a NUL"),
        ('{"output_dir": "\\ud800"}', "--output-dir must not contain half a surrogate pair"),
        ('{"a\\nb\\u001b[31m": 1}', "unknown key 'a\\nb\\x1b[31m'"),
        ('\ufeff{"batch_size": 0}', "--batch-size must be at least 1"),
    ],
)
def test_config_file_faults(
    tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    assert main.main(["--train", "--config", str(tmp_path / "run.json")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_config_file_that_is_not_utf_8(
    tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"batch_size": 4}', encoding=encoding)
    assert main.main(["--train", "--config", str(path)]) == 2
    assert "in UTF-16 or UTF-32, not UTF-8; PowerShell" in capsys.readouterr().err


def test_arguments_with_line_breaks_and_bytes_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in (
        ["--train", "--text-file", "a\nb\x1b[31m"],
        ["--train", "--text-file", "\udcff"],
        ["--train", "--resume-from", "a\nb"],
        ["--train", "--document-separator", "\udcff"],
        ["--generate", "--prompts", "x", "--checkpoint-path", "a\n\n\nb\udcff"],
        ["a\nb"],
        ["--\udcff\n"],
        ["--help", "a\nb"],
    ):
        assert main.main(argv) in (2, 3, 5), argv
        said = capsys.readouterr().err
        begins = ("preflight: ", "warning: ")
        assert all(line.startswith(begins) for line in said.splitlines()), argv
        assert "internal error" not in said
        assert not {"\x1b", "\udcff"} & {*said}


def test_a_traceback_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("a text")
    (tmp_path / "crash.log").write_text("an older one")
    (tmp_path / "crash-2.log").symlink_to("mine")

    def fail(*unused: object) -> int:
        raise LookupError("a bug")

    monkeypatch.setattr(main, "run_mode", fail)
    assert main.main(["--check"]) == 70
    assert "details in" in capsys.readouterr().err
    assert "a bug" in (tmp_path / "crash-3.log").read_text()
    assert (tmp_path / "crash.log").read_text() == "an older one"
    assert (tmp_path / "mine").read_text() == "a text"


def test_flags_win_over_the_file() -> None:
    path = Path(__file__).with_name("_run.json")
    path.write_text(json.dumps({"batch-size": 4, "max_steps": 10}))
    try:
        mode, config = main.parse_command_line(
            ["--train", "--config", str(path), "--max-steps", "20"]
        )
    finally:
        path.unlink()
    assert mode == "train"
    assert (config.training.batch_size, config.training.max_steps) == (4, 20)
    assert config.sources["batch_size"] == str(path)
    assert config.sources["max_steps"] == "the command line"


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--help"], 0), (["--version"], 0), (["--trian"], 2), (["--generate"], 5)],
)
@pytest.mark.parametrize("closed", [False, True])
def test_a_program_without_streams_gets_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], code: int, closed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    stream = open(os.devnull, "w")  # noqa: SIM115
    stream.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream if closed else None)
    if "--generate" in flags:
        flags = [*flags, "--output-file", "out.txt", "--device", "cpu"]
    assert main.main(flags) == code
    assert sys.stderr is (stream if closed else None)


class Unread(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_an_error_that_nobody_reads_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Unread())
    assert main.main(["--trian"]) == 2


def run_closing(closing: str, *argv: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """main.py in a shell that closes some of its streams; the others are captured."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, str(ROOT / "main.py"), *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code(tmp_path: Path, closing: str) -> None:
    for argv, code in ((["--help"], 0), (["--version"], 0), (["--trian"], 2)):
        done = run_closing(closing, *argv, folder=tmp_path)
        assert done.returncode == code
        assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closing", [">&-", ">&- 2>&-"])
@pytest.mark.slow
def test_training_with_closed_streams_is_complete(
    tmp_path: Path, tiny_text: Path, closing: str
) -> None:
    flags = ["--train", "--text-file", str(tiny_text), *TINY_FLAGS, "--max-steps", "2"]
    done = run_closing(closing, *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    newest = find_newest(tmp_path / "training_output")
    assert newest is not None
    assert newest.step == 2
    done = run_closing(">&-", "--generate", "--device", "cpu", folder=tmp_path)
    assert done.returncode == 6  # the completions would go nowhere
    assert "stdout is closed; use --output-file" in done.stderr


def test_children_find_the_package_without_the_scripts_folder(tmp_path: Path) -> None:
    """As tokenization and trials start them; the parent's search path is what they get."""
    script = tmp_path / "start.py"
    script.write_text(
        "import multiprocessing, runpy, sys\n"
        "if __name__ == '__main__':\n"
        f"    runpy.run_path({str(ROOT / 'main.py')!r})\n"
        "    from preflight.core.units import format_bytes\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    child = context.Process(target=format_bytes, args=(1,))\n"
        "    child.start(); child.join(); sys.exit(child.exitcode)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_another_locale_many_threads_and_a_private_umask(tmp_path: Path, tiny_text: Path) -> None:
    """Turkish lower-cases I to a dotless i; a locale that is not installed changes nothing."""
    names = {"OMP_NUM_THREADS": "64", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "main.py"),
            "--train",
            "--text-file",
            str(tiny_text),
            *TINY_FLAGS,
            "--max-steps",
            "1",
            "--num-workers",
            "1",
        ],
        cwd=tmp_path,
        env=os.environ | names,
        umask=0o077,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    newest = find_newest(tmp_path / "training_output")
    assert newest is not None
    assert {path.stat().st_mode & 0o077 for path in newest.path.iterdir()} == {0}


def list_product_files() -> list[Path]:
    """The top level and the package, folders and all."""
    return [*ROOT.glob("*.py"), *(ROOT / "preflight").rglob("*.py")]


def test_no_construct_that_could_run_foreign_code_or_map_a_file_for_writing() -> None:
    banned_calls = {"eval", "exec", "__import__"}
    unpicklers = {("pickle", name) for name in ("load", "loads", "Unpickler")}
    for path in list_product_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in banned_calls, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.keyword):
                bad = (node.arg in ("allow_pickle", "shell") and node.value.value is True) or (
                    node.arg == "weights_only" and node.value.value is not True
                )
                assert not bad, f"{path.name}: {node.arg}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                # The reader of checkpoint.pt names opcodes, and has an unpickler of its own.
                may = {"pickle"} if path.name == "state.py" else set()
                assert not ({"pickle", "marshal", "shelve"} - may) & set(names), path.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in unpicklers, f"{path.name}:{node.lineno}"
        assert "memmap(" not in path.read_text(encoding="utf-8") or 'mode="r"' in path.read_text()
