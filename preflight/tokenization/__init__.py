"""Text to token ids and back. `choose_tokenizer` says what a value of ``--tokenizer`` means."""

from preflight.tokenization.choosing import (
    TokenizerChoice,
    TokenizerRecipe,
    choose_tokenizer,
    is_choice,
)
from preflight.tokenization.loading import load_saved_tokenizer, load_tokenizer
from preflight.tokenization.protocol import MissingLibraryError, Tokenizer, TrainingText

__all__ = [
    "MissingLibraryError",
    "Tokenizer",
    "TokenizerChoice",
    "TokenizerRecipe",
    "TrainingText",
    "choose_tokenizer",
    "is_choice",
    "load_saved_tokenizer",
    "load_tokenizer",
]
