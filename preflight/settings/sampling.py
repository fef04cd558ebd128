"""The flags of sampling."""

import re
from dataclasses import dataclass

from preflight.settings.options import MAX_COUNT, setting

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def _read_escapes(text: str) -> str:
    """`text` with line ends and tabs for what stands for them; a shell passes ``\\n`` as it is."""
    if not text or "\0" in text:
        raise ValueError("must not be empty or contain a NUL character")
    return re.sub(r"\\[nrt\\]", lambda match: _ESCAPES[match[0]], text)


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
    min_p: float = setting(
        0.0,
        "sample only from tokens with at least P times the probability of the most probable one; "
        "0: no such limit",
        metavar="P",
        ge=0,
        le=1,
    )
    repetition_penalty: float = setting(
        1.0,
        "penalty on tokens that occurred before (Keskar et al. 2019); 1: none",
        gt=0,
        le=1e6,
    )
    stop: tuple[str, ...] = setting(
        (),
        r"stop sequences; they are not part of the completion; \n, \r, \t and \\ stand for a line "
        "end, a carriage return, a tab and a backslash",
        metavar="TEXT",
        check=_read_escapes,
    )
    do_sample: bool = setting(True, "sample; --no-do-sample: greedy decoding")
    beams: int = setting(
        1,
        "beam search: follow the N most probable texts at once and take the one of the best score, "
        "without sampling; each of --generation-batch-size has N rows in memory",
        metavar="N",
        ge=1,
        le=4096,
    )
    length_penalty: float = setting(
        1.0,
        "score of a beam: its log-probability / generated tokens ** X; above 0 favours longer "
        "completions",
        metavar="X",
        ge=-10,
        le=10,
    )
    logprobs: int | None = setting(
        None,
        "write the log-probability of each token, and the N most probable ones in its place",
        metavar="N",
        ge=0,
        le=MAX_COUNT,
    )
    seed: int = 42  # no flag of its own: `TrainingSettings.seed` sets it
