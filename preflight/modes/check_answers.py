"""The three questions that `--check` is asked, answered in a line each before the report.

The answers are read from the rows of the report, so that one section that failed leaves the other
answers as they are.
"""

from __future__ import annotations

from preflight.core.units import format_bytes, format_seconds
from preflight.modes.check_sections import Findings
from preflight.modes.report import Answer, Report

# Warnings that say nothing about what the model will learn.
_INTERVALS = {"evaluation_interval", "checkpoint_interval", "early_stopping"}
_OF_THE_MACHINE = {"memory", "bf16"} | _INTERVALS
_SHOWN_WARNINGS = 2


def answer_questions(found: Findings) -> list[Answer]:
    """Does it fit, how long and how dear, will it learn."""
    return [
        Answer("Does it fit?", *_judge_fit(found.report)),
        Answer("How long, how dear?", *_judge_time(found)),
        Answer("Will it learn?", *_judge_learning(found)),
    ]


def _explain_unknown(report: Report, *sections: str) -> tuple[str, str]:
    """Why a section, or one that it needs, has no figures."""
    reasons = [report.sections[name].get("not_known") for name in sections]
    return "unknown", next(filter(None, reasons), "see the problems at the end")


def _judge_fit(report: Report) -> tuple[str, str]:
    rows = report.sections["memory analysis"]
    if "verdict" not in rows:
        return _explain_unknown(report, "model", "performance estimation", "memory analysis")
    needed, available = (format_bytes(rows[f"{name}_bytes"]) for name in ("needed", "available"))
    memory = f"{needed} needed, {available} available on {rows['device']}"
    if rows["verdict"] == "does not fit":
        return "no", memory
    if rows.get("disk_needed_bytes", 0) > rows.get("disk_free_bytes", 0):
        disk = format_bytes(rows["disk_needed_bytes"])
        return "no", f"the disk lacks room for {disk} of checkpoints; memory: {memory}"
    return ("yes" if rows["verdict"] == "fits" else "tight"), memory


def _judge_time(found: Findings) -> tuple[str, str]:
    rows, price = found.report.sections["performance estimation"], found.config.check.price_per_hour
    if "total_seconds" not in rows:
        sections = ("model", "dataset", "performance estimation")
        return _explain_unknown(found.report, *sections)
    how = "measured" if "timed_steps" in rows else "estimated"
    finish = rows.get("finish_if_started_now")
    text = f"{how}; finished {finish} if started now" if finish else how
    duration = "at most " * ("upper_bound" in rows) + format_seconds(rows["total_seconds"])
    if price is None:
        return duration, f"{text}; --price-per-hour adds the cost"
    cost = f"{rows['cost']:,.2f} at {price:g} per hour"
    return duration, f"{text}; cost {cost}"


def _judge_learning(found: Findings) -> tuple[str, str]:
    report = found.report
    if found.plan is None:
        return _explain_unknown(report, "model", "dataset", "training configuration")
    # The head of a warning is the fact, what follows the colon its reason.
    facts = [
        advice.text.split(": ")[0]
        for advice in report.warnings
        if advice.key not in _OF_THE_MACHINE
    ]
    if not facts:
        rows = report.sections["training configuration"]
        if found.config.finetuning.finetune:
            return "yes", report.sections["dataset"].get("chats_2", "no warning")
        return "yes", f"{rows['tokens_per_parameter']:,.1f} tokens per parameter, no warning"
    more = len(facts) - _SHOWN_WARNINGS
    rest = f"; {more} more under Warnings" if more > 0 else "; see Warnings"
    return "doubtful", "; ".join(facts[:_SHOWN_WARNINGS]) + rest
