"""The flags of `--get-optimal-bs`."""

from dataclasses import dataclass

from preflight.settings.options import MAX_COUNT, setting


@dataclass(frozen=True)
class SearchSettings:
    """How `--get-optimal-bs` searches for a batch size."""

    test_batch_sizes: tuple[int, ...] = setting(
        (), "batch sizes to try, instead of a search", ge=1, le=1_048_576
    )
    target_batch_size: int | None = setting(
        None,
        "report whether this batch size fits, and which others keep its tokens per step",
        ge=1,
        le=1_048_576,
    )
    gpu_safety_margin: float = setting(
        0.15, "fraction of the device's (or the CPU's) memory to leave free", ge=0, lt=1
    )
    tokens_per_step: int | None = setting(
        None,
        "report the gradient accumulation that keeps this many tokens per step",
        ge=1,
        le=MAX_COUNT,
    )
