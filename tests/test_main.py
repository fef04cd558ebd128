"""The command line as a user meets it: exit codes, messages, speed of --help."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from conftest import ROOT, CommandRunner
from preflight.settings import build_options


def test_help_lists_every_flag_and_loads_no_torch(preflight: CommandRunner) -> None:
    shown = preflight("--help")
    assert shown.returncode == 0
    for option in build_options().values():
        assert option.flag in shown.stdout
    probe = preflight("--help", "--train")
    assert probe.returncode == 0
    code = (
        "import sys; sys.argv=['main.py','--help']; import main\n"
        "try: main.main()\nexcept SystemExit: pass\n"
        "assert not {'torch','numpy','tiktoken'} & set(sys.modules), 'heavy import'"
    )
    import subprocess

    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "exactly one mode"),
        (["--train", "--generate"], "exactly one mode"),
        (["--trian"], "did you mean --train"),
        (["--train", "--batchsize", "3"], "did you mean --batch-size"),
        (["--train", "--batch-size"], "expected one argument"),
        (["--train", "--batch-size", "x", "--dropout", "7"], "--dropout"),
        (["--train", "--config", "missing.json"], "missing.json"),
        (["--train", "stray"], "'stray' belongs to no flag"),
        (["--train", "--lear", "1"], "unknown flag '--lear'"),
    ],
)
def test_mistakes_end_with_two_and_make_no_file(
    preflight: CommandRunner, tmp_path: Path, argv: list[str], words: str
) -> None:
    result = preflight(*argv)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) <= 5
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"batch_sise": 4}', "did you mean 'batch_size'"),
        ('{"batch_size": "x"}', "--batch-size"),
        ("[1]", "not a JSON object"),
        ("{", "Expecting"),
        ('{"dropout": NaN}', "NaN"),
        ('{"seed": 1, "seed": 2}', "twice"),
    ],
)
def test_config_file_faults(
    preflight: CommandRunner, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "run.json").write_text(content)
    result = preflight("--train", "--config", "run.json")
    assert result.returncode == 2
    assert words in result.stderr


def test_flags_win_over_the_file() -> None:
    import main

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


def list_product_files() -> list[Path]:
    """The top level and the package, folders and all."""
    return [*ROOT.glob("*.py"), *(ROOT / "preflight").rglob("*.py")]


def test_no_construct_that_could_run_foreign_code_or_map_a_file_for_writing() -> None:
    banned_calls = {"eval", "exec", "__import__"}
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
                assert not {"pickle", "marshal", "shelve"} & set(names), path.name
        assert "memmap(" not in path.read_text(encoding="utf-8") or 'mode="r"' in path.read_text()
