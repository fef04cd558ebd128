"""A report: rows by section, problems that stand in the way, as text for people and as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.units import format_bytes, format_seconds
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
    is_writable: bool = True

    @contextlib.contextmanager
    def guard(self, section: str) -> Iterator[None]:
        """Record a `PreflightError` as a problem and continue; signals still end the program."""
        try:
            yield
        except PreflightError as error:
            if error.code in (ExitCode.SIGINT, ExitCode.SIGTERM):
                raise
            self.problems.append(Problem(error.lines[0], "; ".join(error.lines[1:])))
            self.sections[section].setdefault("not_known", error.lines[0])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, in the order of `SECTIONS`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "ok": not self.problems,
            **{name.replace(" ", "_"): rows for name, rows in self.sections.items()},
            "warnings": [vars(advice) for advice in self.warnings],
            "recommendations": self.recommendations,
            "problems": [vars(problem) for problem in self.problems],
        }

    def to_text(self) -> str:
        """The report for people: the same rows, formatted by the unit in their key."""
        lines = []
        for name, rows in self.sections.items():
            lines += ["", name.capitalize()]
            lines += [
                f"  {format_label(key):<28} {format_value(key, value)}"
                for key, value in rows.items()
            ]
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


def format_label(key: str) -> str:
    """A key for people; its unit is shown with the value."""
    for unit in ("_bytes", "_seconds", "_share"):
        key = key.removesuffix(unit)
    return key.replace("_", " ")


def format_value(key: str, value: Any) -> str:
    """A value for people, by the unit that its key ends with."""
    if isinstance(value, dict):
        unit = key if key.endswith(("_bytes", "_seconds", "_share")) else ""
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
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def compare(predicted: float, measured: float | None) -> Any:
    """A figure beside a figure: both and their ratio, or the prediction alone."""
    if measured is None:
        return predicted
    return {"predicted": predicted, "measured": measured, "ratio": round(measured / predicted, 4)}
