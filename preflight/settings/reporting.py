"""The flags of `--report`."""

from dataclasses import dataclass

from preflight.settings.options import setting


@dataclass(frozen=True)
class ReportSettings:
    """Which runs `--report` describes, and where it writes the page."""

    runs: tuple[str, ...] = setting(
        (), "output folders of the runs, side by side; unset: --output-dir", metavar="DIR"
    )
    report_file: str | None = setting(
        None, "the page; unset: report.html in the (first) run's folder", metavar="FILE.html"
    )
