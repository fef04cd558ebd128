"""The flags of sampling."""

from dataclasses import dataclass

from preflight.settings.options import MAX_COUNT, setting


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and when generation ends."""

    max_new_tokens: int = setting(
        200, "most tokens to generate per completion", ge=1, le=10_000_000
    )
    temperature: float = setting(0.8, "sampling temperature; 0 is greedy", ge=0, le=1e6)
    top_k: int | None = setting(
        50, "sample from the k most probable tokens; 0: from all", ge=0, le=MAX_COUNT
    )
    top_p: float = setting(
        1.0,
        "nucleus sampling: sample from the most probable tokens that together have probability p",
        gt=0,
        le=1,
    )
    repetition_penalty: float = setting(
        1.0,
        "penalty on tokens that occurred before (Keskar et al. 2019); 1: none",
        gt=0,
        le=1e6,
    )
    stop: tuple[str, ...] = setting(
        (), "stop sequences; they are not part of the completion", metavar="TEXT"
    )
    do_sample: bool = setting(True, "sample; --no-do-sample: greedy decoding")
    seed: int = 42  # no flag of its own: `TrainingSettings.seed` sets it
    first_stream: int = 0  # of the seed's random numbers: the i-th completion has stream first + i
