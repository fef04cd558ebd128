"""The flags of `--check`."""

from dataclasses import dataclass

from preflight.settings.options import setting


@dataclass(frozen=True)
class CheckSettings:
    """What the report of `--check` holds, and for which GPU; that also of `--get-optimal-bs`."""

    json: bool = setting(False, "print the report as JSON")
    measure: bool = setting(
        True, "time real training steps; --no-measure: estimates only, within seconds"
    )
    target_gpu: str | None = setting(
        None,
        "predict for this GPU instead of the one present, such as 'RTX 4090'; --get-optimal-bs "
        "then runs nothing",
        metavar="GPU",
    )
    gpu_memory: float | None = setting(
        None, "predict for a GPU with this much memory, in GiB", gt=0, le=100_000, metavar="GIB"
    )
    price_per_hour: float | None = setting(
        None, "price of the machine per hour, to estimate the cost of the run", ge=0, le=1e6
    )
