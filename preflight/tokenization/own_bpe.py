"""A byte-level BPE made from the text: trained by rustbpe, run by tiktoken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import rustbpe
import tiktoken

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.units import format_bytes
from preflight.tokenization.protocol import END_OF_TEXT, TrainingText
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer
from preflight.tokenization.tiktoken_cutting import CL100K_PATTERN

SAMPLED_BYTES = 200 * 2**20  # of a longer text, pieces of this size altogether are trained on
MIN_VOCAB_SIZE = 257  # the bytes and the end of the text
MAX_VOCAB_SIZE = 2**20
# A run without a space is one word to the trainer, which holds every different word.
_MAX_RUN = 2**14
# (bytes of text, below which; ids). An embedding has to be seen often enough to be learnt.
_VOCAB_SIZES = (
    (10**5, 512),
    (1_500_000, 1024),
    (8 * 10**6, 2048),
    (24 * 10**6, 4096),
    (10**8, 8192),
    (10**9, 16_384),
)
_LARGEST_DEFAULT = 32_768


def choose_vocab_size(n_bytes: int) -> int:
    """Ids for a text of this size, where none are asked for."""
    return next((ids for below, ids in _VOCAB_SIZES if n_bytes < below), _LARGEST_DEFAULT)


class OwnBpeTokenizer(TiktokenTokenizer):
    """Merges of the text's own, over cl100k's split pattern."""

    is_trained = True

    @classmethod
    def load(cls, name: str) -> Self:
        """Never: it is made from a text."""
        raise PreflightError(ExitCode.FLAGS, f"--tokenizer {name} is made from a text: give one")

    @classmethod
    def train(cls, text: TrainingText, vocab_size: int | None) -> Self:
        """Merges of the training part, so that the validation part stays unseen.

        The most frequent pair is merged first (Sennrich et al. 2016). rustbpe breaks ties by the
        ids of the pair, so that the order of its threads does not matter.
        """
        asked = vocab_size or choose_vocab_size(text.count_bytes("train", "val"))
        check_vocab_size(asked)
        n_bytes = text.count_bytes("train")
        share = min(1.0, SAMPLED_BYTES / max(n_bytes, 1))
        sampled = f", of which {format_bytes(SAMPLED_BYTES)} are sampled" if share < 1 else ""
        log.info(
            f"training a vocabulary of {asked:,} ids on {format_bytes(n_bytes)} of text{sampled}"
        )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(
            _read_sample(text, share), asked - 1, buffer_size=8, pattern=CL100K_PATTERN
        )
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        found = len(ranks) + 1
        if vocab_size and found < vocab_size:
            log.warning(
                f"the text gives {found:,} ids, fewer than the {vocab_size:,} of --vocab-size: "
                "every word is one token by then"
            )
        encoding = tiktoken.Encoding(
            "bpe",
            pat_str=CL100K_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )
        return cls(encoding)


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a size that no vocabulary of this kind has: PreflightError (FLAGS)."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise PreflightError(
            ExitCode.FLAGS,
            f"--vocab-size {vocab_size:,}: a bpe has {MIN_VOCAB_SIZE} ids (the bytes and the end "
            f"of the text) to {MAX_VOCAB_SIZE:,}",
        )


def _read_sample(text: TrainingText, share: float) -> Iterator[str]:
    """Evenly spaced pieces of the training part, this share of them."""
    for number, piece in enumerate(text.read("train")):
        if int((number + 1) * share) > int(number * share):
            for begin in range(0, len(piece), _MAX_RUN) if " " not in piece else ():
                yield piece[begin : begin + _MAX_RUN]
            if " " in piece:
                yield piece
