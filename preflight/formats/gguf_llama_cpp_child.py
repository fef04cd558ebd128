"""Asks llama.cpp about a GGUF file. A program of its own: a fault in llama.cpp ends the process.

It imports nothing of Preflight. Its only argument is a folder with ``request.json``; the answer is
``answer.json`` and ``logits.npy`` beside it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    engine = _Engine(request["path"], len(request["ids"]) + request["n_new"])
    answer: dict[str, Any] = {
        "plain": [engine.tokenize(text, parse_special=False) for text in request["plain"]],
        "special": [engine.tokenize(text, parse_special=True) for text in request["special"]],
    }
    if request["ids"]:
        logits = engine.compute_logits(request["ids"])  # T V
        np.save(folder / "logits.npy", logits)
        answer["continuation"] = engine.continue_greedily(logits[-1], request["n_new"])
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


class _Engine:
    """The binding `cyllama`, on the CPU, with keys and values in fp32."""

    def __init__(self, path: str, n_tokens: int) -> None:
        llama_cpp: Any = importlib.import_module("cyllama.llama.llama_cpp")

        class Model(llama_cpp.LlamaModel):
            """`get_logits` of version 0.2.18 asks the model for its vocabulary's size."""

            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        llama_cpp.disable_logging()
        self._library = llama_cpp
        parameters = llama_cpp.LlamaModelParams()
        parameters.n_gpu_layers = 0
        self._model = Model(path, parameters)
        self._vocabulary = self._model.get_vocab()
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_tokens + 8
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = 0
        # Its threads wait for each other without sleep: on a busy machine, more than there are
        # free cores take a hundred times as long.
        settings.n_threads = settings.n_threads_batch = max(1, (os.cpu_count() or 1) // 2)
        self._context = llama_cpp.LlamaContext(self._model, settings)
        self._n_seen = 0

    def tokenize(self, text: str, parse_special: bool) -> list[int]:
        """Ids as for a prompt: with what the file says comes before it."""
        return list(self._vocabulary.tokenize(text, add_special=True, parse_special=parse_special))

    def compute_logits(self, ids: list[int]) -> np.ndarray:
        """Logits (T V) after each of `ids`, which follow those seen before."""
        batch = self._library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.set_batch(ids, n_past=self._n_seen, logits_all=True)
        self._context.decode(batch)
        self._n_seen += len(ids)
        return np.array([self._context.get_logits_ith(i) for i in range(len(ids))], np.float32)

    def continue_greedily(self, logits: np.ndarray, n_new: int) -> list[int]:
        """The most probable ids that follow, one by one."""
        found: list[int] = []
        while len(found) < n_new:
            found.append(int(logits.argmax()))
            logits = self.compute_logits(found[-1:])[-1]
        return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
