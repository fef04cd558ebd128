"""The flags of `--compare`, which is a mode too."""

from dataclasses import dataclass

from preflight.settings.options import setting


@dataclass(frozen=True)
class ComparisonSettings:
    """What `--compare` compares."""

    compare: tuple[str, ...] = setting(
        (),
        "runs or checkpoints; a run stands for its best checkpoint; all: every run below "
        "--output-dir, or below this folder; ask: choose on the terminal",
        metavar="RUN",
    )
    with_evaluation: str | None = setting(
        None,
        "evaluate each of them first, at this level; unset: results of --evaluate are compared "
        "where there are some",
        choices=("quick", "standard", "comprehensive", "all"),
    )
