"""TensorBoard's event files, beside `metrics.jsonl`.

They are written row by row: tensorboardX's own `SummaryWriter` hands them to a thread, which a full
disk ends, and the run then waits for it without end.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.training.metrics import METRICS_NAME, read_metrics
from preflight.training.trackers import Row

try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
except ImportError as error:
    raise PreflightError(
        ExitCode.FLAGS,
        f"--tensorboard needs the library tensorboardX ({error})",
        "pip install tensorboardX",
    ) from None

FOLDER_NAME = "tensorboard"
_TAGS = {
    "step": ("loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second"),
    "eval": ("val_loss", "perplexity", "bits_per_byte"),
}
_GROUPS = {"step": "training", "eval": "validation"}


class TensorBoardLog:
    """One event file for each start of the run, of scalars and of the generated texts."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._writer: EventsWriter | None = None

    def resume(self, step: int) -> None:
        """Begin a file that hides the points of `step` and of later ones, which come again.

        That of the training loss at `step` does not, so that it is written here.
        """
        folder = self.output_dir / FOLDER_NAME
        try:
            folder.mkdir(exist_ok=True)
            # The library's names have whole seconds; a second file of one name would replace it.
            self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        except OSError as error:
            self._give_up(error)
        self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        for row in read_metrics(self.output_dir / METRICS_NAME):
            if row["step"] == step and row["event"] == "step":
                self.log(row)

    def log(self, row: Row) -> None:
        """The scalars of a row, or its text."""
        event, step = row["event"], row["step"]
        for name in _TAGS.get(event, ()):
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                scalar = summary.scalar(f"{_GROUPS[event]}/{name}", value)
                self._write(Event(step=step, wall_time=time.time(), summary=scalar))
        if event == "sample":
            text = summary.text("sample", str(row["text"]))
            self._write(Event(step=step, wall_time=time.time(), summary=text))

    def _write(self, event: Event) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A torn event makes the rest of its file unreadable, so that no more is written."""
        log.warning(f"TensorBoard's files end here ({error}); training continues")
        self._writer = None
