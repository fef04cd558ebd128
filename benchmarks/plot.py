"""Draws what the README says of speed from the results in ``benchmarks/results``.

    python benchmarks/plot.py              (results/*.json -> benchmarks/speed.png)

Each result is the last line of ``train.py``, ``generate.py``, ``prepare.py`` or ``curves.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent


def read_result(name: str) -> dict[str, Any]:
    """One benchmark's JSON."""
    result: dict[str, Any] = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    return result


def collect_ratios() -> list[tuple[str, float, float | None]]:
    """(what, ratio found, its goal) of each comparison with a peer."""
    train = {row[0]: row[1] for row in read_result("train")["rows"]}
    write = {row[0]: row[1] for row in read_result("generate")["rows"]}
    prepare = read_result("prepare")
    return [
        (
            "training, 6 layers of width 384\nover Hugging Face's loop (fp32)",
            train["ours over fp32"],
            None,
        ),
        ("the same over litgpt's loop (fp32)", train["ours over litgpt fp32"], None),
        (
            "writing, small, one text\nover Hugging Face's generate (fp32)",
            write["ours over Hugging Face"],
            1.7,
        ),
        (
            f"preparing {prepare['text_mb']:,} MB of text\n"
            f"over {prepare['workers']} cores of tiktoken",
            prepare["text"]["ratio"],
            0.9,
        ),
    ]


def main() -> int:
    left_rows, curves = collect_ratios(), read_result("curves")
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for place, (name, ratio, goal) in enumerate(reversed(left_rows)):
        bars.barh(place, ratio, color="tab:blue", height=0.55)
        bars.text(max(ratio, goal or 0) + 0.03, place, f"{ratio:.2f}", va="center")
        if goal is not None:
            bars.plot([goal, goal], [place - 0.38, place + 0.38], color="black")
        bars.text(0.04, place, name, va="center", color="white", fontsize=8)
    bars.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    bars.set(yticks=[], xlabel="times as fast as the peer (line: goal)", xlim=(0, None))
    bars.margins(x=0.12)
    lines.plot(curves["plain"], color="tab:orange", linewidth=3, label="plain fp32 loop")
    lines.plot(curves["ours"], color="tab:blue", linewidth=1, label="default")
    lines.set(xlabel="step", ylabel="training loss (nats per token)")
    lines.legend(frameon=False)
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "speed.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
