"""The proof that a GGUF file is the model: it is read back, and llama.cpp is asked.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats import gguf_llama_cpp
from preflight.formats.gguf_header import KINDS, TensorEntry
from preflight.formats.gguf_import import GgufImporter
from preflight.formats.gguf_layout import (
    choose_architecture,
    choose_kind,
    describe_in_file,
    find_parts,
    list_shapes,
)
from preflight.formats.gguf_library import pack_tensor, unpack_tensor
from preflight.formats.protocol import ImportedModel, OutgoingModel
from preflight.formats.tokenizer_export import build_tokenizer_json
from preflight.models.building import build_on_meta
from preflight.settings import ModelConfig

_MAX_MEASURED = 4096  # tokens
_WINDOW = 256
_N_ASKED, _N_NEW = 32, 30  # ids whose logits llama.cpp computes, and that it continues them with
_MAX_DIFFERENCE = 5e-3  # of a log-probability in fp32; ggml's GELU is a table in fp16
# Nats. llama.cpp rounds the inputs of a matmul as the weights are: 9e-3 was measured in Q4_1. A
# file whose rows are in another order has 3.
_MAX_DIVERGENCE = 0.1
_TEXTS = (
    "Hello world",
    " leading and trailing  ",
    "\n\n\t tabs\r\n and   runs \n",
    "It's 12345.678 o'clock; they'LL say I've 3³ ½ ٣",
    "naïve café Ünïcödé, ﬁ ligature, ſ, İ",
    "漢字かな交じり文。한국어 ไทย العربية עברית हिन्दी",
    "😀👩‍👩‍👧‍👦🏴‍☠️ e\u0301 \u200b\ufeff\u00a0|\u3000|\u2028",
    "def f(x):\n    return x**2  # !?@#$%^&*()[]{}<>\\/|~`\"'",
    "<|endoftext|> <s> </s> <unk> <|im_start|> [PAD1] <0x0A>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " the" * 20,
    "\x00\x01\x7f\x80",
)


def prove_file(model: OutgoingModel, path: Path, quantization: str) -> list[str]:
    """Compare the file with the model that it was made of; see `Exporter.verify`."""
    architecture, _ = choose_architecture(model.config)
    config = describe_in_file(model.config, architecture)
    try:
        found = GgufImporter().read(path)
    except PreflightError as error:
        raise _build_error(path, error.lines[0]) from None
    if found.config != config:
        raise _build_error(path, f"it describes {found.config}, not {config}"[:300])
    for name, shape in list_shapes(config).items():
        expected = _round_weight(model, name, shape, config, architecture, quantization)
        if not torch.equal(found.weights[name], expected):
            raise _build_error(path, f"the weights {name} are not those of the model")
    n_texts = _compare_tokenizers(model, found, path)
    lines = [
        f"read back: {len(found.weights)} weights bit-equal to the model's in {quantization}",
        f"tokenizer: equal ids on {n_texts} texts, equal merges; chat template equal",
    ]
    ids = list(model.sample_ids)[:_MAX_MEASURED]
    original = _build(model.config, model.weights)
    written = _build(config, found.weights)
    if quantization != "f32":
        lines.append(_describe_cost(original, written, ids, quantization))
    if gguf_llama_cpp.is_installed():
        lines += _ask_engine(model, written, path, quantization)
    else:
        lines.append("llama.cpp was not asked: pip install cyllama")
    return lines


def _round_weight(
    model: OutgoingModel,
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    architecture: str,
    quantization: str,
) -> Tensor:
    """Our weight called `name`, as far as the file's type of tensor can hold it."""
    weight = model.weights.get(name)
    if weight is None:
        return torch.zeros(shape)
    tensor = find_parts(name, config, architecture)[0].tensor
    kind = choose_kind(tensor, weight, quantization, config.tied)
    if kind == "F32":
        return weight
    packed = pack_tensor(weight, kind)
    return unpack_tensor(packed.tobytes(), TensorEntry(name, shape, KINDS[kind], 0))


def _compare_tokenizers(model: OutgoingModel, found: ImportedModel, path: Path) -> int:
    """The number of texts that were compared; PreflightError where anything differs."""
    ours, theirs = model.tokenizer, found.tokenizer
    for text in _TEXTS:
        if ours.encode(text).tolist() != theirs.encode(text).tolist():
            raise _build_error(path, f"its tokenizer encodes {text!r} otherwise")
    for i in range(ours.vocab_size):
        if ours.token_bytes(i) != theirs.token_bytes(i):
            raise _build_error(path, f"token {i} stands for another text")
    if ours.end_of_text_id != theirs.end_of_text_id:
        raise _build_error(path, "another token ends a text")
    merges = [_list_merges(build_tokenizer_json(tokenizer)) for tokenizer in (ours, theirs)]
    if merges[0] != merges[1]:
        raise _build_error(path, "its merges are not those of the tokenizer")
    if found.chat_template != model.chat_template:
        raise _build_error(path, "its chat template is another one")
    return len(_TEXTS)


def _list_merges(document: dict[str, object]) -> list[str]:
    merges = json.loads(json.dumps(document["model"]))["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


# ---- what rounding costs ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    """Nats per token: the mean divergence of the second model, and the losses of both."""

    divergence: float
    losses: tuple[float, float]


def _describe_cost(
    original: nn.Module, written: nn.Module, ids: Sequence[int], quantization: str
) -> str:
    if len(ids) < 2:
        return "what rounding costs was not measured: there is no text to measure it on"
    cost = measure_cost(original, written, ids)
    before, after = (math.exp(min(loss, 700.0)) for loss in cost.losses)
    return (
        f"{quantization} on {len(ids):,} tokens: perplexity {before:.4f} before, {after:.4f} after; "
        f"KL {cost.divergence:.2e} nats per token"
    )


@torch.inference_mode()
def measure_cost(original: nn.Module, written: nn.Module, ids: Sequence[int]) -> _Cost:
    """What the second model's predictions differ by, on windows of one text."""
    window = min(_WINDOW, original.config.context_length)  # type: ignore[union-attr]
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for begin in range(0, len(ids) - 1, window):
        tokens = torch.tensor([ids[begin : begin + window + 1]])
        inputs, targets = tokens[:, :window], tokens[0, 1:]
        rows = [model(inputs)[0].log_softmax(-1)[: len(targets)] for model in (original, written)]
        sums[0] += (rows[0].exp() * (rows[0] - rows[1])).sum(-1).double().sum()
        for number, row in enumerate(rows, 1):
            sums[number] -= row.gather(1, targets[:, None]).double().sum()
        count += len(targets)
    divergence, *losses = (sums / count).tolist()
    return _Cost(divergence, (losses[0], losses[1]))


def _build(config: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    model = build_on_meta(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


# ---- llama.cpp ----------------------------------------------------------------------------------


def _ask_engine(
    model: OutgoingModel, written: nn.Module, path: Path, quantization: str
) -> list[str]:
    """What llama.cpp says of the file, beside the model that was read back from it."""
    tokenizer = model.tokenizer
    asked = list(model.sample_ids)[:_N_ASKED]
    asked = asked or tokenizer.encode("".join(_TEXTS[:4])).tolist()[:_N_ASKED]
    n_new = min(_N_NEW, model.config.context_length - len(asked))
    asked = asked[: model.config.context_length - n_new]
    texts = [text for text in _TEXTS if "\0" not in text]  # its end in C
    end = _find_end(model)
    special = [f"{end}{texts[0]}"]
    answer = gguf_llama_cpp.ask_llama_cpp(path, texts, special, asked, n_new)
    for text, ids in zip(texts, answer.plain, strict=True):
        if ids != tokenizer.encode(text).tolist():
            raise _build_error(path, f"llama.cpp encodes {text!r} otherwise")
    expected = [tokenizer.end_of_text_id, *tokenizer.encode(texts[0]).tolist()]
    if answer.special != [expected]:
        raise _build_error(path, f"llama.cpp begins a chat with {answer.special[0][:4]}")
    difference, divergence, n_equal = _compare_logits(written, asked, answer)
    if difference > _MAX_DIFFERENCE and (quantization == "f32" or divergence > _MAX_DIVERGENCE):
        raise _build_error(
            path,
            f"llama.cpp's log-probabilities differ by up to {difference:.1e}, "
            f"KL {divergence:.1e} nats per token",
        )
    return [
        f"llama.cpp: equal ids on {len(texts)} texts, no token put before a text",
        f"llama.cpp continues with the same {n_equal} of {n_new} tokens; largest difference of a "
        f"log-probability {difference:.1e}, KL {divergence:.1e} nats per token",
    ]


def _find_end(model: OutgoingModel) -> str:
    """The name of the token that ends a text."""
    document = build_tokenizer_json(model.tokenizer)
    names = {token["id"]: token["content"] for token in document["added_tokens"]}
    return str(names[model.tokenizer.end_of_text_id])


@torch.inference_mode()
def _compare_logits(
    written: nn.Module, asked: list[int], answer: gguf_llama_cpp.Answer
) -> tuple[float, float, int]:
    """Largest difference of a log-probability, mean divergence, and how many tokens are equal.

    A continuation is compared token by token on llama.cpp's own text. A tie within the difference
    of the engines is equal.
    """
    logits = written(torch.tensor([asked + answer.continuation]))[0].double().log_softmax(-1)
    theirs = torch.from_numpy(answer.logits.astype(np.float64)).log_softmax(-1)  # T V
    ours = logits[: len(asked)]
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    n_equal = 0
    for i, token in enumerate(answer.continuation):
        row = logits[len(asked) - 1 + i]
        if row.max() - row[token] > _MAX_DIFFERENCE:
            break
        n_equal += 1
    return float((ours - theirs).abs().max()), float(divergence), n_equal


def _build_error(path: Path, what: str) -> PreflightError:
    return PreflightError(
        ExitCode.CHECK_FAILED,
        f"the export to {path.name} is wrong: {what}",
        "no file was kept; please report it",
    )
