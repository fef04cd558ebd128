"""Texts that a run did not learn from, continued by the model and scored against themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from generate import generate_batch
from preflight.corpus.shard_reader import ShardReader
from preflight.corpus.shards import DataFolder
from preflight.evaluation.generated_text import cut_text, score_generated
from preflight.evaluation.results import TaskResult
from preflight.models.protocol import LanguageModel
from preflight.settings import SamplingConfig
from preflight.tokenization import Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 32, 32
# Read for each text, since what is decoded and encoded again may have fewer tokens.
_READ_TOKENS = 2 * (PROMPT_TOKENS + NEW_TOKENS)


def read_held_out(
    data: DataFolder, tokenizer: Tokenizer, n_texts: int | None
) -> list[tuple[str, str]]:
    """(prompt, what follows it) of texts evenly spaced over the validation part; None: all.

    Raises:
        PreflightError: code DATA, when a shard cannot be read.
    """
    n_windows = data.val.n_tokens // _READ_TOKENS
    count = min(n_texts or n_windows, n_windows)
    if not count:
        return []
    reader = ShardReader(data.val, data.dtype, data.vocab_size)
    try:
        starts = np.arange(count, dtype=np.int64) * n_windows // count * _READ_TOKENS
        rows = reader.read(starts, _READ_TOKENS)
    finally:
        reader.close()
    pairs = []
    for row in rows:
        ends = np.flatnonzero(row == tokenizer.end_of_text_id)
        # The longest stretch of one document.
        parts = np.split(row, ends)
        longest = max(parts, key=len)
        ids = longest[longest != tokenizer.end_of_text_id].tolist()
        pair = cut_text(tokenizer, tokenizer.decode(ids), PROMPT_TOKENS, NEW_TOKENS)
        if pair is not None:
            pairs.append(pair)
    return pairs


def evaluate_generated(
    model: LanguageModel,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    source: str,
) -> TaskResult:
    """BLEU and ROUGE of what the model generates greedily after each prompt.

    Raises:
        PreflightError: code FLAGS, when sacrebleu or rouge-score is not installed.
    """
    config = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
    found = generate_batch(model, tokenizer, [prompt for prompt, _ in pairs], config)
    scores = score_generated([answer.text for answer in found], [text for _, text in pairs])
    return TaskResult(
        "generated",
        "generated",
        source,
        f"{NEW_TOKENS} tokens after {PROMPT_TOKENS}, greedy",
        list(scores.figures),
        len(pairs),
        len(pairs),
        [f"BLEU by sacrebleu {scores.signature}"],
    )
