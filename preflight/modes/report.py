"""A report: rows by section, problems that stand in the way, as text for people and as JSON."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.units import format_bytes, format_seconds
from preflight.device.runtime import is_out_of_memory
from preflight.foresight.learnability import Advice

FORMAT, VERSION = "preflight-check", 1
SECTIONS = (
    "model",
    "dataset",
    "training configuration",
    "memory analysis",
    "performance estimation",
    "system information",
    "warnings",
    "recommendations",
)


Example = list[tuple[str, bool]]  # a chat in stretches: the text, and whether it is learned

# Green, yellow and red of a terminal (ECMA-48, "select graphic rendition").
_COLOURS = {"yes": 32, "tight": 33, "doubtful": 33, "unknown": 33, "no": 31}


@dataclass(frozen=True)
class Answer:
    """A question, the verdict in a word or two, and what it stands on."""

    question: str
    verdict: str
    text: str

    def format(self, *, in_colour: bool) -> str:
        """One line."""
        verdict = self.verdict
        if in_colour and verdict in _COLOURS:
            verdict = f"\x1b[{_COLOURS[verdict]}m{verdict}\x1b[0m"
        return f"{self.question:<20} {verdict}: {self.text}"


@dataclass(frozen=True)
class Problem:
    """Something that stands in the way, and the flag that mends it."""

    text: str
    fix: str


@dataclass
class Report:
    """Rows by section; a row is a key, which carries its unit, and a plain JSON value."""

    sections: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: {} for name in SECTIONS[:-2]}
    )
    warnings: list[Advice] = field(default_factory=list)
    recommendations: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    is_writable: bool = False

    @contextlib.contextmanager
    def guard(self, section: str) -> Iterator[None]:
        """Record an error as a problem and continue; signals still end the program."""
        try:
            yield
        except Exception as error:  # a broken section must not hide what the others find
            problem = Problem(*describe_error(error))
            if problem not in self.problems:
                self.problems.append(problem)
            self.sections.get(section, {}).setdefault("not_known", problem.text)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, in the order of `SECTIONS`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "ok": not self.problems,
            "answers": [vars(answer) for answer in self.answers],
            **{name.replace(" ", "_"): rows for name, rows in self.sections.items()},
            "warnings": [vars(advice) for advice in self.warnings],
            "recommendations": self.recommendations,
            "examples": [
                [{"text": text, "learned": learned} for text, learned in example]
                for example in self.examples
            ],
            "problems": [vars(problem) for problem in self.problems],
        }

    def to_text(self, *, in_colour: bool = False) -> str:
        """The report for people: the answers, then all rows, formatted by the unit in their key."""
        lines = ["", *(answer.format(in_colour=in_colour) for answer in self.answers)]
        if self.problems:
            lines.append(f"{'First of all':<20} {self.problems[0].text}")
        for name, rows in self.sections.items():
            lines += ["", name.capitalize()]
            lines += [
                f"  {format_label(key):<28} {format_value(key, value)}"
                for key, value in rows.items()
            ]
        if self.examples:
            lines += ["", "Chats, with what is learned " + _mark("marked", in_colour=in_colour)]
        for example in self.examples:
            stretches = (
                _mark(text, in_colour=in_colour) if learned else text for text, learned in example
            )
            lines += [f"  {line}" for line in "".join(stretches).split("\n")] + ["  --"]
        lines += ["", "Warnings"]
        for advice in self.warnings:
            lines += [f"  - {advice.text}", f"    {advice.fix}"]
        lines += ["", "Recommendations"]
        lines += [f"  - {text}" for text in self.recommendations]
        lines += [""]
        if self.problems:
            lines.append(f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)} in the way")
            for number, problem in enumerate(self.problems, 1):
                lines += [f"  {number}. {problem.text}"] + [f"     {problem.fix}"] * bool(
                    problem.fix
                )
        else:
            lines.append("All checks passed.")
        return "\n".join(lines[1:]) + "\n"


def _mark(text: str, *, in_colour: bool) -> str:
    """Text that is learned: inverse on a terminal, each line by itself; else in brackets."""
    before, after = ("\x1b[7m", "\x1b[27m") if in_colour else ("[[", "]]")
    return "\n".join(f"{before}{line}{after}" if line else "" for line in text.split("\n"))


def is_in_colour(stream: TextIO) -> bool:
    """Whether colours are shown: on a terminal that has them, unless NO_COLOR (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt"
    return stream.isatty() and not plain


def describe_error(error: Exception) -> tuple[str, str]:
    """What a part of a report failed with, and what to do about it.

    Raises:
        PreflightError: it is a signal, which ends the program.
    """
    if isinstance(error, PreflightError):
        if error.code in (ExitCode.SIGINT, ExitCode.SIGTERM):
            raise error
        return error.lines[0], "; ".join(error.lines[1:])
    log.debug("".join(traceback.format_exception(error)))
    fix = "this may be a fault of the installation: pip install -r requirements.txt"
    if is_out_of_memory(error):
        fix = "a smaller --model-size or --context-length, or --gradient-checkpointing"
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}", fix


def format_label(key: str) -> str:
    """A key for people; its unit is shown with the value."""
    for unit in ("_bytes", "_seconds", "_share"):
        key = key.removesuffix(unit)
    return key.replace("_", " ")


def format_value(key: str, value: Any) -> str:
    """A value for people, by the unit that its key ends with."""
    if isinstance(value, dict):
        unit = key if key.endswith(("_bytes", "_seconds", "_share", "_per_byte")) else ""
        return ", ".join(
            f"{name.replace('_', ' ')} {format_value(unit or name, item)}"
            if name != "ratio"
            else f"ratio {item:.3f}"
            for name, item in value.items()
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or value is None:
        return value or "unknown"
    if key.endswith("bytes"):
        return format_bytes(value)
    if key.endswith("share"):
        return f"{value:.1%}"
    if key.endswith("seconds"):
        if value < 10:
            return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"
        return format_seconds(value)
    if key.endswith("learning_rate"):
        return f"{value:.2e}"
    if key.endswith("bits_per_byte"):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def compare(predicted: float, measured: float | None) -> Any:
    """A figure beside a figure: both and their ratio, or the prediction alone."""
    if measured is None:
        return predicted
    return {"predicted": predicted, "measured": measured, "ratio": round(measured / predicted, 4)}
