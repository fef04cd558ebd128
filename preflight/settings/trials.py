"""The flags of the modes that try a run before it starts: `--find-lr` and `--sweep`."""

from dataclasses import dataclass

from preflight.settings.options import MAX_COUNT, setting


@dataclass(frozen=True)
class TrialSettings:
    """How `--find-lr` and `--sweep` try a run before it starts."""

    find_lr_steps: int = setting(
        100, "steps of the learning-rate range test of --find-lr", ge=10, le=10_000
    )
    find_lr_min: float = setting(1e-6, "learning rate of its first step", gt=0, le=1e30)
    find_lr_max: float = setting(
        10.0, "learning rate of its last step, unless it diverges before", gt=0, le=1e30
    )
    sweep: tuple[str, ...] = setting(
        (),
        "flags of the model and the training, each with the values to compare; of several flags, "
        "every combination",
        metavar="FLAG=A,B",
    )
    sweep_steps: int | None = setting(
        None, "steps of each training of --sweep; unset: a 16th of the run's", ge=1, le=MAX_COUNT
    )
