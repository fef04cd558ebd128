"""Preflight: trains GPT language models from a person's own text."""

__version__ = "0.2.0"
