"""What an importer and an exporter are, and what passes between them and the modes.

A format is one file with an `Importer`, an `Exporter`, or both, and a row for each in
`preflight.settings.kinds`. Weights have the names of our model (`transformer_model.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from preflight.settings import ModelConfig
from preflight.tokenization import Tokenizer


@dataclass(frozen=True)
class ImportedModel:
    """A model that came from a file of another tool.

    Attributes:
        config: the architecture.
        weights: by our names and in our shapes, finite, fp32 or the file's own floating type, on
            the CPU. They are all that `config` needs and nothing else.
        tokenizer: at most as many ids as `config` has rows.
        chat_template: in Jinja, as the file has it; ``None``: it has none.
        origin: where it came from, as plain JSON types: ``format`` (huggingface, gguf or nanogpt),
            ``source`` (the file's name), ``sha256``, and ``quantization`` (``q4_1``; ``None`` for
            floating-point weights).
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    chat_template: str | None
    origin: dict[str, Any]


@dataclass(frozen=True)
class OutgoingModel:
    """A model on its way to another tool: that of a checkpoint, adapters merged.

    Attributes:
        config: the architecture.
        weights: all of them, by our names, in fp32 on the CPU.
        tokenizer: the checkpoint's.
        chat_template: in Jinja; ``None``: the model was not made for chats.
        facts: of the run, as plain JSON types, for the model card. ``name`` is what the model is
            called, ``origin`` the `ImportedModel.origin` that it began with, if any.
        sample: ids (T,) of text, validation text where there is some, to measure a loss on.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    chat_template: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    sample: Tensor | None = None


@runtime_checkable
class Importer(Protocol):
    """Reads a model from a file or a folder that a stranger may have written.

    Attributes:
        name: the format's, as a user calls it.
    """

    name: str

    def accepts(self, path: Path) -> bool:
        """Whether what is at `path` looks like this format, by names and first bytes alone."""

    def read(self, path: Path) -> ImportedModel:
        """The model, whole and checked.

        Sizes, counts and names are bounded before anything is allocated. Nothing is executed.

        Raises:
            PreflightError: code CHECKPOINT, for damage, and for a part of the model that we lack,
                which is named; code FLAGS, for a library that is missing.
        """


@runtime_checkable
class Exporter(Protocol):
    """Writes a model in another tool's format, and proves that the result is the model.

    Attributes:
        name: the format's, as a user calls it.
        quantizations: what ``--quantize`` can be; the first is the default.
        makes_folder: it writes a folder; otherwise one file.
    """

    name: str
    quantizations: tuple[str, ...]
    makes_folder: bool

    def accepts(self, path: Path) -> bool:
        """Whether this format is meant by a path to write, by its name alone."""

    def check(self, model: OutgoingModel, quantization: str) -> None:
        """Refuse a model that the format cannot hold, before anything is written.

        Raises:
            PreflightError: code CHECKPOINT, naming every part that the format lacks.
        """

    def export(self, model: OutgoingModel, path: Path, quantization: str) -> None:
        """Write the model to `path`: an empty folder, or a file that is not there yet.

        Raises:
            OSError: it cannot be written.
        """

    def verify(self, model: OutgoingModel, path: Path, quantization: str) -> list[str]:
        """Read back what `export` wrote, and ask the receiving engine where it is installed.

        Returns:
            What was found, a line for each thing that was compared.

        Raises:
            PreflightError: code CHECK_FAILED, naming the first thing that differs.
        """
