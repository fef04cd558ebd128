"""The proof that a GGUF file is the model: it is read back, and llama.cpp is asked.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preflight.core.errors import PreflightError
from preflight.formats import gguf_llama_cpp
from preflight.formats.gguf_header import KINDS, TensorEntry, read_header
from preflight.formats.gguf_import import GgufImporter
from preflight.formats.gguf_layout import (
    choose_architecture,
    choose_kind,
    describe_in_file,
    find_parts,
    list_shapes,
)
from preflight.formats.gguf_library import pack_tensor, unpack_tensor
from preflight.formats.proof import N_GREEDY, build_from, measure_change, proof_error, prove_equal
from preflight.formats.protocol import ImportedModel, OutgoingModel
from preflight.formats.tokenizer_export import build_tokenizer_json, list_special_tokens
from preflight.models.base import TokenModel
from preflight.settings import ModelConfig
from preflight.tokenization import Tokenizer

_MAX_MEASURED = 4096  # tokens that the cost of rounding is measured on
_N_ASKED = 32  # ids whose logits llama.cpp computes
_TIE = 1e-2  # nats between two ids of which llama.cpp may take either: its GELU is a table in fp16
# Divergence in nats a token. It is below 1e-6 in fp32. Elsewhere llama.cpp rounds the inputs of a
# matmul as the weights are: 2e-4 were measured in bf16 and 1e-2 in q5_1. A file whose rows are in
# another order has 3.
_MAX_DIVERGENCE = {"f32": 1e-4, "f16": 1e-2, "bf16": 1e-2}
_MAX_DIVERGENCE_QUANTIZED = 0.1
_TEXTS = (
    "Hello world",
    " leading and trailing  ",
    "\n\n\t tabs\r\n and   runs \n",
    "It's 12345.678 o'clock; they'LL say I've 3³ ½ ٣",
    "naïve café Ünïcödé, ﬁ ligature, \u017f, İ",
    "漢字かな交じり文。한국어 ไทย العربية עברית हिन्दी",
    "😀👩‍👩‍👧‍👦🏴‍☠️ e\u0301 \u200b\ufeff\u00a0|\u3000|\u2028",
    "def f(x):\n    return x**2  # !?@#$%^&*()[]{}<>\\/|~`\"'",
    "<|endoftext|> <s> </s> <unk> <|im_start|> [PAD1] <0x0A>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " the" * 20,
    "\x00\x01\x7f\x80",
)


def prove_file(model: OutgoingModel, path: Path, quantization: str) -> list[str]:
    """Compare the file with the model that it was made of; see `Exporter.verify`."""
    meant = _describe_meant(model, quantization)
    try:
        found = GgufImporter().read(path)
    except PreflightError as error:
        raise proof_error(error.lines[0]) from None
    lines = prove_equal(meant, found)
    _compare_vocabularies(model.tokenizer, found.tokenizer)
    _refuse_added_tokens(path)
    if quantization != "f32" and model.sample is not None and len(model.sample) > 1:
        sample = model.sample[:_MAX_MEASURED].long()
        weights = _fill_biases(model.weights, meant.config)
        lines.append(measure_change(meant.config, weights, found.weights, sample).describe())
    if not gguf_llama_cpp.is_installed():
        return [*lines, "llama.cpp is not installed here and was not asked: pip install cyllama"]
    return [*lines, *_ask_llama_cpp(model, found, path, quantization)]


def _describe_meant(model: OutgoingModel, quantization: str) -> OutgoingModel:
    """The model as the file should hold it: its numbers rounded to the file's types."""
    architecture, _ = choose_architecture(model.config)
    config = describe_in_file(model.config, architecture)
    weights = _fill_biases(model.weights, config)
    for name, weight in weights.items():
        tensor = find_parts(name, config, architecture)[0].tensor
        kind = choose_kind(tensor, weight, quantization, config.tied)
        if kind != "F32":
            content = pack_tensor(weight, kind).tobytes()
            entry = TensorEntry(name, tuple(weight.shape), KINDS[kind], 0)
            weights[name] = unpack_tensor(content, entry)
    return OutgoingModel(config, weights, model.tokenizer, model.chat_template)


def _fill_biases(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """All weights that `config` needs; biases that a model has not are zero."""
    shapes = list_shapes(config)
    return {name: weights.get(name, torch.zeros(1)).expand(s) for name, s in shapes.items()}


def _compare_vocabularies(meant: Tokenizer, found: Tokenizer) -> None:
    """That every id stands for the same bytes, or for none, and that no pair is missing or in
    another place: few texts may show it.
    """
    for token in range(meant.vocab_size):
        if meant.token_bytes(token) != found.token_bytes(token):
            raise proof_error(f"token {token} stands for other bytes")
    first, second = (_list_merges(build_tokenizer_json(tokenizer)) for tokenizer in (meant, found))
    if first != second:
        raise proof_error("its merges are not those of the tokenizer")


def _list_merges(document: dict[str, Any]) -> list[str]:
    merges = document["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def _refuse_added_tokens(path: Path) -> None:
    """That the file asks for no token before or after a text: a chat's own text has them."""
    with open(path, "rb") as file:
        keys = read_header(path, file).keys
    for name in ("add_bos_token", "add_eos_token"):
        if keys.get(f"tokenizer.ggml.{name}") is not False:
            raise proof_error(f"it says {name}")


def _ask_llama_cpp(
    model: OutgoingModel, found: ImportedModel, path: Path, quantization: str
) -> list[str]:
    """What llama.cpp says of the file, beside the model that was read back from it."""
    tokenizer = model.tokenizer
    n_asked = min(_N_ASKED, max(1, model.config.context_length - N_GREEDY))
    asked: list[int] = [] if model.sample is None else model.sample[:n_asked].tolist()
    asked = asked or tokenizer.encode("".join(_TEXTS))[:n_asked].tolist()
    n_new = min(N_GREEDY, model.config.context_length - len(asked))
    texts = [text for text in _TEXTS if "\0" not in text]  # its end in C
    names = {i: name for name, i in list_special_tokens(tokenizer).items()}
    end = tokenizer.end_of_text_id
    answer = gguf_llama_cpp.ask_llama_cpp(path, texts, [f"{names[end]}{texts[0]}"], asked, n_new)
    if answer is None:
        return ["llama.cpp was asked, and did not answer in time"]
    for text, theirs in zip(texts, answer.plain, strict=True):
        if theirs != tokenizer.encode(text).tolist():
            raise proof_error(f"llama.cpp gives other ids for {text[:40]!r}")
    if answer.special[0] != [end, *tokenizer.encode(texts[0]).tolist()]:
        raise proof_error(f"llama.cpp reads special tokens as {answer.special[0][:4]}")
    lines = [f"llama.cpp: the ids of {len(texts)} texts are equal, and nothing comes before them"]
    return [
        *lines,
        *_compare_model(build_from(found.config, found.weights), asked, answer, quantization),
    ]


@torch.inference_mode()
def _compare_model(
    ours: TokenModel, ids: list[int], answer: gguf_llama_cpp.Answer, quantization: str
) -> list[str]:
    """Log-probabilities of all ids, and the most probable ones along llama.cpp's continuation."""
    # One forward pass over the continuation; a tie between two ids is no difference.
    scores = ours(torch.tensor([ids + answer.continuation]))[0].double().log_softmax(-1)
    first, follow = scores[: len(ids)], scores[len(ids) - 1 : -1]
    second = torch.from_numpy(answer.logits.astype(np.float64)).log_softmax(-1)  # T V
    gap = float((first - second).abs().max())
    divergence = float((first.exp() * (first - second)).sum(-1).mean())
    if not divergence <= _MAX_DIVERGENCE.get(quantization, _MAX_DIVERGENCE_QUANTIZED):
        raise proof_error(
            f"log-probabilities of llama.cpp differ by {gap:.2g}, KL {divergence:.2g} nats a token"
        )
    chosen = torch.tensor(answer.continuation)[:, None]
    lost = (follow.max(-1, keepdim=True).values - follow.gather(1, chosen))[:, 0]
    n_equal = int((lost <= _TIE).cumprod(0).sum())
    if quantization == "f32" and n_equal < len(chosen):
        raise proof_error(f"llama.cpp continues otherwise after {n_equal} greedy tokens")
    return [
        f"llama.cpp: {n_equal} of {len(chosen)} greedy tokens are equal; the log-probabilities of "
        f"{len(ids)} tokens differ by {gap:.2g} at most, KL {divergence:.2g} nats a token"
    ]
