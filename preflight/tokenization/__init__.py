"""Text to token ids and back. `load_tokenizer` finds a kind of tokenizer by name."""

from preflight.tokenization.loading import load_saved_tokenizer, load_tokenizer
from preflight.tokenization.protocol import Tokenizer

__all__ = ["Tokenizer", "load_saved_tokenizer", "load_tokenizer"]
