"""Which tokenizer a run gets: one that can be loaded, or one that is made from its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.core.registry import describe_unknown
from preflight.core.units import format_bytes
from preflight.settings import ModelSettings
from preflight.settings.kinds import TOKENIZERS
from preflight.tokenization.loading import find_file_kind, load_tokenizer
from preflight.tokenization.own_bpe import MIN_VOCAB_SIZE, check_vocab_size
from preflight.tokenization.protocol import Tokenizer, TrainingText

AUTO = "auto"
_OWN_BPE_BYTES = 50 * 2**20  # a text below this is too small for the 50,257 embeddings of gpt2
_GPT2_IDS = 50_257
_GPT2_SIZES = ("small", "medium", "large", "xl")


@dataclass(frozen=True)
class TokenizerRecipe:
    """A tokenizer that is not there before its text is read.

    Attributes:
        name: a kind that is trained, or ``auto``.
        vocab_size: ids to aim for; unset: chosen by the size of the text.
        model_size: of the run.
    """

    name: str
    vocab_size: int | None = None
    model_size: str = ""

    @property
    def least_vocab_size(self) -> int:
        """Ids that it has at least, known before the text is."""
        return self.vocab_size or (2 if self.name == "char" else MIN_VOCAB_SIZE)

    @property
    def needs_whole_text(self) -> bool:
        """Whether a sample of a long text is too little: every character must be seen."""
        return self.name == "char"

    def accepts(self, facts: Mapping[str, Any]) -> bool:
        """Whether a tokenizer, by the metadata of its data folder, is what the recipe would give.

        The text is compared apart from this. ``auto`` takes what is there.
        """
        if self.name not in (AUTO, facts["name"]):
            return False
        asked = facts.get("asked_vocab_size") or facts["vocab_size"]
        return facts["name"] != "bpe" or self.vocab_size in (None, asked)

    def make(self, text: TrainingText) -> Tokenizer:
        """The tokenizer for `text`.

        Raises:
            PreflightError: code FLAGS, for an impossible vocabulary.
        """
        name = self._choose(text.count_bytes("train", "val")) if self.name == AUTO else self.name
        kind = TOKENIZERS.load(name)
        if not kind.is_trained:
            return load_tokenizer(name)
        tokenizer = kind.train(text, self.vocab_size)
        log.info(f"tokenizer: {name} with {tokenizer.vocab_size:,} ids, made from the text")
        return tokenizer

    def _choose(self, n_bytes: int) -> str:
        """``gpt2`` for much text and for GPT-2's own sizes, else a BPE of the text's own."""
        wants_gpt2_ids = (self.vocab_size or 0) >= _GPT2_IDS
        reasons = {
            f"--model-size {self.model_size} is one of GPT-2's": self.model_size in _GPT2_SIZES,
            f"--vocab-size {self.vocab_size or 0:,} has room for its ids": wants_gpt2_ids,
            f"the text has {format_bytes(n_bytes)}": n_bytes >= _OWN_BPE_BYTES,
        }
        reason = next((why for why, holds in reasons.items() if holds), None)
        if reason is not None:
            log.info(f"--tokenizer auto: gpt2, since {reason}")
            return "gpt2"
        log.info(
            f"--tokenizer auto: bpe, made for the text, since it has only {format_bytes(n_bytes)} "
            "(--tokenizer gpt2 for GPT-2's)"
        )
        return "bpe"


TokenizerChoice = Tokenizer | TokenizerRecipe


def choose_tokenizer(settings: ModelSettings) -> TokenizerChoice:
    """What ``--tokenizer`` means: a tokenizer, or how it is made when the text is known.

    Raises:
        PreflightError: code FLAGS, as `load_tokenizer`, and for a ``--vocab-size`` that a trained
            vocabulary cannot have.
    """
    name = settings.tokenizer
    known = (AUTO, *TOKENIZERS.names())
    if name not in known and find_file_kind(name) is None:
        raise PreflightError(ExitCode.FLAGS, describe_unknown(TOKENIZERS.flag, name, known))
    if name != AUTO and (name not in known or not TOKENIZERS.load(name).is_trained):
        return load_tokenizer(name)
    if settings.vocab_size and name in ("bpe", AUTO):
        check_vocab_size(settings.vocab_size)
    return TokenizerRecipe(name, settings.vocab_size, settings.model_size)


def is_choice(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether ``--tokenizer`` with this value may mean the tokenizer of a checkpoint.

    Args:
        name: the flag's value.
        facts: the ``tokenizer`` section of the checkpoint's ``config.json``.
    """
    if find_file_kind(name) is not None:
        return load_tokenizer(name).fingerprint == facts["fingerprint"]
    return name in (AUTO, facts["name"])
