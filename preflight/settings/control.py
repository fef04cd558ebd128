"""The flags of checkpoints, evaluation, logging and resuming."""

from dataclasses import dataclass

from preflight.settings.options import MAX_COUNT, setting


@dataclass(frozen=True)
class ControlSettings:
    """Checkpoints, evaluation, logging and resuming."""

    output_dir: str = setting(
        "training_output", "folder of checkpoints, metrics and plots", metavar="DIR"
    )
    checkpoint_every: int | None = setting(
        None, "steps between checkpoints; unset: a tenth of the run", ge=1, le=MAX_COUNT
    )
    checkpoint_minutes: float = setting(
        10.0, "longest time between checkpoints, in minutes", gt=0, le=1e6
    )
    eval_every: int | None = setting(
        None, "steps between evaluations; unset: at every checkpoint", ge=1, le=MAX_COUNT
    )
    early_stopping_patience: int | None = setting(
        None,
        "stop after so many evaluations in a row without a lower validation loss; unset: never",
        ge=1,
        le=MAX_COUNT,
    )
    log_every: int | None = setting(
        None,
        "steps between log lines where there is no progress bar; unset: 1 % of the run",
        ge=1,
        le=MAX_COUNT,
    )
    tensorboard: bool = setting(
        False, "write TensorBoard's event files too, into tensorboard/ of --output-dir"
    )
    max_checkpoints: int = setting(
        3, "newest checkpoints to keep, in addition to the best", ge=2, le=1_000_000
    )
    resume_from: str | None = setting(
        None, "checkpoint to resume from (its folder, or a file in it)", metavar="PATH"
    )
    init_from: str | None = setting(
        None,
        "begin a new run with the weights of a checkpoint, its architecture and its tokenizer; "
        "the step is 0, optimizer and plan are new",
        metavar="CHECKPOINT",
    )
    auto_resume: bool = setting(True, "resume from the newest checkpoint in --output-dir")
    allow_batch_change: bool = setting(
        False, "allow a checkpoint to be resumed with another number of tokens per step"
    )
