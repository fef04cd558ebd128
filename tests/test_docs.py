"""The documents tell the truth: flags, sizes, links, commands, imports and the report's figures.

``python tests/test_docs.py`` writes docs/flags.md anew.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from main import parse_command_line  # noqa: E402
from preflight.core.errors import ExitCode  # noqa: E402
from preflight.models.cost import count_parameters  # noqa: E402
from preflight.settings import (  # noqa: E402
    GROUP_SUMMARIES,
    MODEL_PRESETS,
    ModelSettings,
    build_options,
)

FLAGS_PAGE = ROOT / "docs" / "flags.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MAX_README_LINES = 200
FLAGS_HEAD = """\
# Flags

`python tests/test_docs.py` writes this page from the code; a test keeps it equal to the code.

A value comes from the default, then the preset, then `--config FILE.json`, then the flag: the last
one wins. The run prints every value that is not a default, and where it came from. A flag without a
default is unset: the run chooses the value and prints its choice.
"""


def render_sizes() -> str:
    """The presets as a Markdown table."""
    lines = [
        "## Model sizes",
        "",
        "| `--model-size` | layers | heads | d_model | context | parameters (GPT-2 vocabulary) |",
        "|---|---|---|---|---|---|",
    ]
    for name, preset in MODEL_PRESETS.items():
        shape = (preset.n_layers, preset.n_heads, preset.n_embeddings, preset.context_length)
        count = count_parameters(ModelSettings(model_size=name).resolve(50257))
        lines.append(f"| {name} | {' | '.join(map(str, shape))} | {count:,} |")
    return "\n".join(lines) + "\n"


def render_flags() -> str:
    """All flags as Markdown tables, one a group."""
    lines = []
    for group, summary in GROUP_SUMMARIES.items():
        lines += [
            f"## {group.capitalize()}",
            "",
            summary,
            "",
            "| flag | default | what it does |",
            "|---|---|---|",
        ]
        for option in build_options().values():
            if option.group != group:
                continue
            default = "" if option.default in (None, ()) else f"`{option.default}`"
            choices = option.metadata["choices"]
            text = option.metadata["help"].replace("%%", "%").replace("|", "\\|")
            text += f" ({', '.join(choices)})" if choices else ""
            flag = option.flag + (f" / --no-{option.flag[2:]}" if option.kind is bool else "")
            lines.append(f"| `{flag}` | {default} | {text} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def render_page() -> str:
    return "\n".join([FLAGS_HEAD, render_sizes(), render_flags()])


def find_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def find_commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command in a shell block, and of every command line in backquotes."""
    found = []
    for page in PAGES:
        lines = "".join(find_blocks(page, "sh")).replace("\\\n", " ").splitlines()
        prose = page.read_text(encoding="utf-8")
        lines += re.findall(r"`((?:python [a-z/_]+\.py|make |preflight --)[^`\n]*)`", prose)
        lines += re.findall(r"^\$ ((?:.*\\\n)*.*)$", prose, re.MULTILINE)
        for line in lines:
            words = shlex.split(line.replace("\\\n", " "), comments=True)
            found += [(page.name, words)] if words else []
    return found


COMMANDS = find_commands()


def test_the_flags_page_is_the_one_in_the_code() -> None:
    assert FLAGS_PAGE.read_text(encoding="utf-8") == render_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_packages_are_those_of_the_architecture_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = text.split("## Packages")[1].split("## ")[0]
    named = re.findall(
        r"`preflight/(\w+)/`", "\n".join(re.findall(r"^\|.*?\|", rows, re.MULTILINE))
    )
    folders = {path.parent.name for path in (ROOT / "preflight").glob("*/__init__.py")}
    assert sorted(named) == sorted(folders)


def test_the_readme_leads_to_every_page() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"} <= set(links)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < MAX_README_LINES


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: "".join(value)[:60])
def test_every_command_is_accepted(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in arguments:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), words
    elif program == "preflight" or arguments[:1] == ["main.py"]:
        flags = arguments[program != "preflight" :]
        # Without flags it only names the program.
        if flags and not {"--help", "--version"} & {*flags}:
            parse_command_line(flags)
    elif Path(program).name.startswith("python") and not arguments[0].startswith("-"):
        assert (ROOT / arguments[0]).is_file(), words
        used = {word.split("=")[0] for word in arguments if word.startswith("--")}
        source = (ROOT / arguments[0]).read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source for flag in used), words


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 30
    assert {page for page, _ in COMMANDS} >= {"README.md", "performance.md", "troubleshooting.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_an_example_imports_exists(page: Path) -> None:
    for block in find_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert not [a.name for a in node.names if not hasattr(module, a.name)], node.module


def test_every_exit_code_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE)))
    assert table == {int(code) for code in ExitCode}


@pytest.mark.slow
def test_the_report_in_the_readme_is_what_the_command_prints(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- report: begin -->\n```\n")[1].split("```\n<!-- report: end -->")[0]
    command, rows = re.split(r"(?<!\\)\n", shown, maxsplit=1)
    words = shlex.split(command.removeprefix("$ python main.py").replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The sample's size follows the version of Python, and the run's length follows the sample.
    of_the_sample = ("train tokens", "bytes per token", "total  ", "total steps", "- 0.0", "cost")
    lines = [row for row in rows.splitlines() if not row.strip().startswith(of_the_sample)]
    assert len(lines) > 20
    assert [line for line in lines if line not in done.stdout.splitlines()] == []


if __name__ == "__main__":
    FLAGS_PAGE.write_text(render_page(), encoding="utf-8")
