"""What the fork server runs: Preflight's own command line, made light for thousands of starts.

A vocabulary of 257 ids (the bytes and an end-of-text id) stands in for GPT-2's 50,257, and the
loss curve is not drawn, though it is still published. All else is the product.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
import torch._dynamo  # an optimizer loads it at its first use: once here, not in every case
from matplotlib.figure import Figure

import checkpoint
import generate
import main
import prepare
import storage
import training_run
from config import ExitCode, RunConfig
from signals import StopFlag
from tokenizer import Tokenizer, load_tokenizer

__all__ = ["DRIVERS", "build_byte_tokenizer", "generate", "load_tokenizer"]


@functools.cache
def build_byte_tokenizer() -> Tokenizer:
    """One id per byte."""
    return Tokenizer(tiktoken.Encoding(
        "gpt2", pat_str=r"[^\s]+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256}))


def lighten() -> None:
    """Make a forked process cheap; the calls on the disk stay those of the product."""
    torch.set_num_threads(1)
    tokenizer = build_byte_tokenizer()
    for module in (training_run, generate):
        module.load_tokenizer = lambda name: tokenizer  # type: ignore[attr-defined]
    Figure.savefig = lambda self, file, **options: file.write(b"\x89PNG")  # type: ignore


def run_main(argv: list[str]) -> int:
    """The whole command line."""
    return main.main(argv)


def run_preparation(argv: list[str]) -> int:
    """The command line of `--train` up to the prepared data folder."""
    def prepare_only(mode: str, config: RunConfig) -> int:
        with StopFlag() as stop:
            prepare.prepare_data(config.data, build_byte_tokenizer(), 8, stop)
        return ExitCode.DONE

    main.run_mode = prepare_only
    return main.main(argv)


# ---- deliberately broken products, for the checks of the checks ---------------------------------


def break_publishing() -> None:
    """Writers that put their content under the final name at once, as many tools do."""
    @contextlib.contextmanager
    def in_place(path: Path, size_bytes: int = 0) -> Iterator[Any]:
        with open(path, "wb") as file:
            yield file

    @contextlib.contextmanager
    def folder_in_place(folder: Path, size_bytes: int = 0) -> Iterator[Path]:
        folder.mkdir()
        yield folder

    storage.publish_folder = folder_in_place
    for module in list(sys.modules.values()):
        if getattr(module, "publish_file", None) is storage.publish_file and module != storage:
            module.publish_file = in_place  # type: ignore[attr-defined]
    storage.publish_file = in_place


BREAKS = {"publishing": break_publishing}
DRIVERS = {"main": run_main, "preparation": run_preparation}
