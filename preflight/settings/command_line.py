"""The command line: its parser, its help, and what was meant by words that it does not know.

All of it is made from the modes and the settings classes. No text comes from a docstring, since
`python -OO` removes them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from preflight import __version__
from preflight.core.commands import find_program, format_command
from preflight.core.errors import ExitCode, PreflightError
from preflight.core.registry import suggest
from preflight.settings.kinds import MODE_SUMMARIES, MODES
from preflight.settings.model import MODEL_PRESETS
from preflight.settings.options import Option
from preflight.settings.run import GROUP_SUMMARIES, build_options
from preflight.settings.unused import is_used

DESCRIPTION = "Train GPT language models on your own text, and generate text with them."
# What `--help` shows; `--help all` shows every flag.
USUAL_FLAGS = (
    "text_file",
    "model_size",
    "batch_size",
    "max_steps",
    "learning_rate",
    "output_dir",
    "device",
    "config",
    "prompts",
    "max_new_tokens",
    "temperature",
)
EXAMPLES = """\
examples:
  {program} --check --text-file my.txt         # does it fit, how long, will it learn
  {program} --train --text-file my.txt
  {program} --generate --prompts "Once upon a time\""""
EXIT_CODES = """\
exit codes: 0 done, 1 a check failed, 2 flags, 3 text or prompts, 4 data folder, 5 checkpoint,
  6 storage, 7 locked, 8 out of memory, 9 diverged, 10 lost worker, 70 internal error,
  130/143 stopped after saving"""
MAX_COLUMNS = 98
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # what a text editor makes of a hyphen
_TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".html", ".csv")


# ---- the parser ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, so that every mistake is reported in one way."""

    argv: list[str]

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument ([^\s/]+)\S*: (.*)", message, re.DOTALL)
        lines = [message[:200]]
        if match and match[2].startswith("ignored explicit argument"):
            lines = [_explain_switch(match[1])]
        elif match and match[2].startswith("expected") and match[1] in self.argv:
            after = self.argv[self.argv.index(match[1]) + 1 :][:1]
            if after and after[0].startswith("-") and after[0] not in self._option_string_actions:
                lines.append(_explain_joined(match[1], after[0]))
        raise PreflightError(ExitCode.FLAGS, *lines, f"see: {format_command('--help')}")


class _HelpAction(argparse.Action):
    """``--help``, ``--help all``, or the flags of a group, of a mode, or a single one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> NoReturn:
        parser._print_message(render_help(values), sys.stdout)
        parser.exit()


def build_parser(argv: Iterable[str] = (), topic: str = "all") -> argparse.ArgumentParser:
    """The parser for a command line; with a `topic`, only of the flags that belong to it."""
    parser = _Parser(
        prog=_name_program(),
        usage="%(prog)s MODE [flags]",
        description=DESCRIPTION,
        epilog=_render_end(),
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.argv = list(argv)
    parser.add_argument(
        *("-h", "--help"),
        action=_HelpAction,
        nargs="?",
        metavar="TOPIC",
        help="the usual flags; all: every flag; or those of a mode, of a group, or one flag",
    )
    parser.add_argument("--version", action="version", version=f"preflight {__version__}")
    modes = parser.add_argument_group("mode (exactly one)")
    options = {option.flag[2:]: option for option in build_options().values()}
    for mode in MODES.names():
        takes: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
        if mode in options:  # a mode that takes values is a flag too
            takes = _argument_of(options[mode])
        modes.add_argument(f"--{mode}", **takes | {"help": MODE_SUMMARIES[mode]})
    groups: dict[str, Any] = {}
    for option in options.values():
        if option.flag[2:] not in MODES.names() and _is_about(option, topic):
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(
                    option.group, GROUP_SUMMARIES[option.group]
                )
            groups[option.group].add_argument(option.flag, **_argument_of(option))
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Lines that a terminal of a hundred columns shows whole."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(MAX_COLUMNS, shutil.get_terminal_size().columns - 2))


def _argument_of(option: Option) -> dict[str, Any]:
    """argparse's view of an option. Values stay text: `build_config` checks them together."""
    arguments: dict[str, Any] = {
        "help": _describe(option, sizes=True).replace("%", "%%"),
        "dest": option.name,
        "default": argparse.SUPPRESS,
    }
    if option.kind is bool:
        return arguments | {"action": argparse.BooleanOptionalAction}
    arguments["metavar"] = _name_value(option)
    if option.metadata["alone"]:
        return arguments | {"nargs": "?", "const": option.metadata["alone"]}
    return arguments | ({"nargs": "+", "action": "extend"} if option.many else {})


def _describe(option: Option, *, sizes: bool = False) -> str:
    default = option.default
    shown = "" if default in (None, (), "") else f" (default {default})"
    if option.name == "model_size" and sizes:
        presets = (f"{n} {p.n_layers}L-{p.n_embeddings}H" for n, p in MODEL_PRESETS.items())
        shown = f": {', '.join(presets)}, or custom{shown}"
    return f"{option.metadata['help']}{shown}"


def _name_value(option: Option) -> str:
    choices = option.metadata["choices"]
    metavar = option.metadata["metavar"] or ("{" + ",".join(choices) + "}" if choices else None)
    return metavar or {int: "N", float: "X", str: "NAME"}[option.kind]


# ---- help ---------------------------------------------------------------------------------------


def render_help(topic: str | None) -> str:
    """The text of ``--help TOPIC``; without a topic the usual flags.

    Raises:
        PreflightError: code FLAGS, for a topic that there is not.
    """
    if topic is None:
        return _render_short_help()
    name = topic.lstrip(_DASHES).replace("_", "-")
    topics = ["all", *MODES.names(), *GROUP_SUMMARIES, *(o.flag[2:] for o in _list_options())]
    if name not in topics:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--help {topic[:60]!r}: no such topic{suggest(name, topics)}",
            f"topics: all, a mode, a flag, or a group: {', '.join(GROUP_SUMMARIES)}",
        )
    return build_parser(topic=name).format_help()


def _list_options() -> list[Option]:
    return list(build_options().values())


def _is_about(option: Option, topic: str) -> bool:
    """Whether `--help` on this topic, the name of a mode, a group or a flag, shows the option."""
    if topic in MODES.names():
        return is_used(option, topic)
    return topic in ("all", option.group, option.flag[2:])


def _name_program() -> str:
    """The program without the folder that it is called in, which would break the lines."""
    return " ".join(Path(word).name for word in find_program())


def _render_end() -> str:
    return f"{EXAMPLES.format(program=_name_program())}\n{EXIT_CODES}"


def _render_short_help() -> str:
    """The modes, the usual flags and examples: what fits on a screen."""
    options = build_options()
    lines = [f"usage: {_name_program()} MODE [flags]", "", DESCRIPTION, "", "mode (exactly one):"]
    for mode in MODES.names():
        lines += _format_row(f"--{mode}", MODE_SUMMARIES[mode])
    lines += ["", "usual flags:"]
    for option in (options[name] for name in USUAL_FLAGS):
        value, about = _name_value(option), _describe(option)
        if option.name == "model_size":
            value = "SIZE"
            about = f"{', '.join(MODEL_PRESETS)} or custom (default {option.default})"
        lines += _format_row(f"{option.flag} {value}{' ...' * option.many}", about)
    lines += [
        "",
        f"--help all shows all {len(options)} flags, --help NAME those of a mode or of a group:",
        *(f"  {line}" for line in textwrap.wrap(", ".join(GROUP_SUMMARIES), MAX_COLUMNS - 2)),
        "",
        _render_end(),
    ]
    return "\n".join(lines) + "\n"


def _format_row(name: str, about: str) -> list[str]:
    lines = textwrap.wrap(about, MAX_COLUMNS - 25)
    return [f"  {name:<22} {lines[0]}", *(f"{'':25}{line}" for line in lines[1:])]


# ---- words that belong to no flag ---------------------------------------------------------------


def explain_words(words: list[str], argv: list[str]) -> tuple[list[str], bool]:
    """What is wrong with words that the parser could not place.

    Returns:
        One line for each unknown flag and for the first other word, then the command that was
        meant, where that is clear; and whether it is.
    """
    known = build_parser()._option_string_actions
    told, n_stray = [], 0
    corrected: dict[str, list[str]] = {}
    for word in words:
        before = argv[: argv.index(word)] if word in argv else []
        corrected[word] = _correct(word, known)
        if word[:1] in _DASHES:
            told.append(_explain_flag(word, before, known))
        elif before and _takes_value(corrected.get(before[-1]), known):
            corrected[word] = [word]
        else:
            told += [] if n_stray else [_explain_stray(word, before, known)]
            n_stray += 1
    if not words or not all(corrected.values()):
        return told, False
    meant = [part for word in argv for part in corrected.get(word, [word])]
    modes = {f"--{mode}" for mode in MODES.names()}
    if "--help" in meant:
        meant = ["--help"]
    elif "--text-file" in meant and not modes & {*meant}:
        meant.insert(0, "--train")
    is_complete = meant == ["--help"] or len(modes & {*meant}) == 1
    return told + [f"did you mean: {format_command(*meant)}"] * is_complete, is_complete


def _takes_value(corrected: list[str] | None, known: Any) -> bool:
    """Whether an unknown flag takes the next word: unless it stands for one without a value."""
    return corrected is not None and (not corrected or known[corrected[0]].nargs != 0)


def _correct(word: str, known: Iterable[str]) -> list[str]:
    """The words that were meant by one that has no flag: a flag's name, or a text."""
    flag = "--" + word.lstrip(_DASHES).replace("_", "-").lower()
    if flag in known:
        return [flag]
    is_text = os.path.exists(word) or word.lower().endswith(_TEXT_SUFFIXES)
    return ["--text-file", word] if is_text and word[:1] not in _DASHES else []


def _explain_flag(word: str, before: list[str], known: Any) -> str:
    flag = word.split("=")[0]
    hint = suggest("--" + flag.lstrip(_DASHES).replace("_", "-").lower(), known)
    flags = [name for name in before if name in known]
    if not hint and flags and known[flags[-1]].nargs != 0:
        return f"unknown flag {flag[:60]!r}; {_explain_joined(flags[-1], word)}"
    return f"unknown flag {flag[:60]!r}{hint}"


def _explain_stray(word: str, before: list[str], known: Any) -> str:
    told = f"{word[:60]!r} belongs to no flag"
    corrected = _correct(word, known)
    if corrected:
        return f"{told} (did you mean {corrected[0]}?)"
    last = known.get(before[-1]) if before else None
    if last is not None and last.nargs == 0:
        return f"{told}: {_explain_switch(before[-1])}"
    if last is None and len(before) > 1 and before[-2] in known and known[before[-2]].nargs != 0:
        quoted = shlex.quote(f"{before[-1]} {word}"[:120])
        return f"{told}; a value with spaces is quoted: {before[-2]} {quoted}"
    return told + suggest("--" + word, known)


def _explain_switch(flag: str) -> str:
    modes = {f"--{mode}" for mode in MODES.names()}
    if flag in modes or flag == "--version":
        return f"{flag} takes no value: write {flag} alone"
    positive = flag.replace("--no-", "--", 1)
    return f"{flag} takes no value: write {positive} or {positive.replace('--', '--no-', 1)}"


def _explain_joined(flag: str, value: str) -> str:
    return f"a value that begins with - is joined with =: {flag}={shlex.quote(value[:60])}"
