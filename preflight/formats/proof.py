"""Whether what was read back from an export is the model that was meant.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats.protocol import ImportedModel, OutgoingModel
from preflight.models.base import TokenModel
from preflight.models.building import build_on_meta
from preflight.settings import ModelConfig, model_config_to_dict
from preflight.tokenization import Tokenizer
from preflight.tokenization.characters import CharTokenizer

N_TEXTS = 3000
N_GREEDY = 30  # tokens that another engine must choose as we do
PROMPTS = ("Once upon a time", "The capital of France is", "def main():\n", "1 + 1 =")
_WINDOW_TOKENS = 256
# What texts are made of: words, numbers, code, spaces of all kinds, other scripts, half a special
# token, and characters outside the first plane.
_UNITS = (
    *(
        "the",
        "The",
        " quick",
        "brown ",
        "don't",
        "I'LL",
        "x've",
        "naïve",
        "Straße",
        "日本語",
        "שלום",
    ),
    *("Ünï", "e\u0301", "123", "4567", "0.5", "²", "½", "  ", "\n", "\n\n", "\t", "\r\n", " \n "),
    *(
        "\xa0",
        "\u3000",
        "\u200d",
        "🙂",
        "👩‍💻",
        "\ufeff",
        "def f(x):",
        "    return",
        "{}",
        "!=",
        "//",
    ),
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "</s>",
        "[INST]",
        "...",
        "?!",
        "\u2013",
        "“”",
        "$",
        "%",
        "_",
    ),
)


def proof_error(what: str, *more: str) -> PreflightError:
    """The error for an export that is not the model: code CHECK_FAILED."""
    return PreflightError(
        ExitCode.CHECK_FAILED, f"the export is not the model: {what}", *more, "nothing was written"
    )


def prove_equal(meant: OutgoingModel, found: ImportedModel) -> list[str]:
    """Compare a model that was read back with the one that was meant, part by part.

    Args:
        meant: with the weights that the file should hold, rounded or quantised as they are there.
        found: what our own importer reads.

    Returns:
        A line for each part.

    Raises:
        PreflightError: code CHECK_FAILED, naming the first difference.
    """
    return [
        _prove_config(meant.config, found.config),
        _prove_weights(meant.weights, found.weights),
        prove_tokenizer(meant.tokenizer, found.tokenizer),
        _prove_template(meant.chat_template, found.chat_template),
        _prove_logits(meant, found),
    ]


# ---- configuration, weights, template -----------------------------------------------------------


def describe_computation(config: ModelConfig) -> ModelConfig:
    """`config` without what changes no logit, so that two that compute the same are equal."""
    theta, scaling, factor = config.rope_theta, config.rope_scaling, config.rope_factor
    if scaling == "ntk":  # it is a larger theta, and other formats have it as one
        theta *= factor ** (config.head_dim / (config.head_dim - 2))
        scaling, factor = "none", 1.0
    return dataclasses.replace(
        config,
        dropout=0.0,
        model_family="llama" if config.positions == "rope" else "gpt2",
        n_kv_heads=None if config.kv_heads == config.n_heads else config.kv_heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_factor=factor,
    )


def _prove_config(meant: ModelConfig, found: ModelConfig) -> str:
    first, second = (model_config_to_dict(describe_computation(c)) for c in (meant, found))
    names = [n for n in sorted(first.keys() | second.keys()) if first.get(n) != second.get(n)]
    if names:
        name = names[0]
        raise proof_error(f"{name} is {second.get(name)}, not {first.get(name)}")
    return "the architecture is equal"


def _prove_weights(meant: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    odd = sorted(meant.keys() ^ found.keys())
    if odd:
        raise proof_error(f"{odd[0]} is {'missing' if odd[0] in meant else 'too much'}")
    for name, weight in meant.items():
        if weight.shape != found[name].shape:
            raise proof_error(f"{name} has the shape {tuple(found[name].shape)}")
        if not torch.equal(weight.float(), found[name].float()):
            raise proof_error(f"the weights {name} differ")
    n_weights = sum(weight.numel() for weight in meant.values())
    return f"all {n_weights:,} weights are bit-equal"


def _prove_template(meant: str | None, found: str | None) -> str:
    if meant != found:
        raise proof_error("the chat template differs")
    return "the chat template is equal" if meant else "there is no chat template"


# ---- tokenizer ----------------------------------------------------------------------------------


def build_texts(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[str]:
    """Texts of many kinds that `tokenizer` has ids for; the same for the same arguments."""
    draw = random.Random(seed)
    known = tokenizer.characters if isinstance(tokenizer, CharTokenizer) else None
    return [
        "".join(draw.choice(known or _UNITS) for _ in range(length))
        if known or draw.random() < 0.6
        else _draw_characters(draw, length)
        for length in (draw.randrange(1, 40) for _ in range(count))
    ]


def _draw_characters(draw: random.Random, length: int) -> str:
    ranges = ((0x20, 0x7F), (0x20, 0x250), (0x370, 0x600), (0x4E00, 0x9FA6), (0x1F300, 0x1F650))
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(length))


def _iterate_tokens(tokenizer: Tokenizer) -> Iterator[str]:
    """Each token that is text by itself: a wrong merge shows in it first."""
    for token in range(tokenizer.vocab_size):
        try:
            text = (tokenizer.token_bytes(token) or b"").decode()
        except UnicodeDecodeError:
            continue
        if text:
            yield text


def prove_tokenizer(meant: Tokenizer, found: Tokenizer) -> str:
    """Equal ids on `N_TEXTS` texts and on every token alone, and an equal end of text.

    Raises:
        PreflightError: code CHECK_FAILED, with the first text whose ids differ.
    """
    n_texts = 0
    for text in (*build_texts(meant, N_TEXTS), *_iterate_tokens(meant)):
        first, second = meant.encode(text).tolist(), found.encode(text).tolist()
        if first != second:
            raise proof_error(
                f"its tokenizer gives other ids for {text[:40]!r}",
                f"ours: {first[:12]}, there: {second[:12]}",
            )
        n_texts += 1
    if meant.end_of_text_id != found.end_of_text_id:
        raise proof_error(f"its end of text is {found.end_of_text_id}, not {meant.end_of_text_id}")
    return f"the tokenizers agree on {n_texts:,} texts, the end of text is {found.end_of_text_id}"


# ---- what the model computes --------------------------------------------------------------------


def build_from(config: ModelConfig, weights: dict[str, Tensor]) -> TokenModel:
    """The model of these weights in fp32, which are not copied where they are fp32 already."""
    model = build_on_meta(config)
    state = {name: weight.float() for name, weight in weights.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def draw_ids(config: ModelConfig, count: int = 2, seed: int = 0) -> Tensor:
    """Random ids (`count` T) of a model's vocabulary; T is 64, or less where its context is."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, min(64, config.context_length))
    return torch.randint(config.vocab_size, shape, generator=generator)


def _prove_logits(meant: OutgoingModel, found: ImportedModel) -> str:
    ids = draw_ids(meant.config)
    with torch.inference_mode():
        first = build_from(meant.config, meant.weights)(ids)
        second = build_from(found.config, found.weights)(ids)
    gap = float((first - second).abs().max())
    bound = 0.0 if meant.config == found.config else 1e-4  # a theta may be computed in two steps
    if gap > bound * max(1.0, float(first.abs().max())):
        raise proof_error(f"its logits differ by {gap:.2g}")
    return f"the logits of {ids.numel()} tokens differ by {gap:.2g} at most"


def continue_greedily(model: TokenModel, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` most probable next ids after `prompt`, one after another."""
    capacity = min(len(prompt) + count, model.config.context_length)
    device, chosen = torch.device("cpu"), list(prompt)
    with torch.inference_mode():
        cache = model.build_cache(1, device, torch.float32, capacity)
        before = torch.tensor([chosen[:-1]], dtype=torch.long)
        model.prefill(before, cache, [0], [len(chosen) - 1])
        while len(chosen) < capacity:
            logits = model.decode(torch.tensor(chosen[-1:]), cache)
            chosen.append(int(logits[0].argmax()))
    return chosen[len(prompt) :]


@dataclass(frozen=True)
class Change:
    """What rounding or quantisation does to a model, in nats per token.

    Attributes:
        loss_before, loss_after: mean cross-entropy on the sample.
        kl: mean Kullback-Leibler divergence from the distribution before to the one after.
        n_tokens: of the sample.
    """

    loss_before: float
    loss_after: float
    kl: float
    n_tokens: int

    def describe(self) -> str:
        """In one line, with perplexities."""
        before, after = (torch.tensor(x).exp() for x in (self.loss_before, self.loss_after))
        return (
            f"perplexity on {self.n_tokens:,} tokens: {before:,.4g} before, {after:,.4g} after; "
            f"KL {max(self.kl, 0):.3g} nats a token"
        )


def measure_change(
    config: ModelConfig, before: dict[str, Tensor], after: dict[str, Tensor], sample: Tensor
) -> Change:
    """Compare two sets of weights of one architecture on a text.

    Args:
        config: the architecture.
        before: by our names.
        after: the same, rounded or quantised.
        sample: ids (T,), more than one. They are read in windows.
    """
    models = build_from(config, before), build_from(config, after)
    width = min(_WINDOW_TOKENS, config.context_length)
    totals = torch.zeros(3, dtype=torch.float64)
    n_tokens = 0
    with torch.inference_mode():
        for begin in range(0, len(sample) - 1, width):
            ids, targets = sample[begin : begin + width], sample[begin + 1 : begin + width + 1]
            ids = ids[: len(targets)]
            first, second = (F.log_softmax(model(ids[None])[0], dim=-1) for model in models)
            kl = F.kl_div(second, first, reduction="sum", log_target=True)
            losses = [F.nll_loss(scores, targets, reduction="sum") for scores in (first, second)]
            totals += torch.stack([*losses, kl]).double()
            n_tokens += len(targets)
    loss_before, loss_after, kl_total = (totals / n_tokens).tolist()
    return Change(loss_before, loss_after, kl_total, n_tokens)
