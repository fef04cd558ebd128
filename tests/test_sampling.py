"""Sampling: filters against Hugging Face's, the cache against none, a batch against each alone."""

from __future__ import annotations

import copy
import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

import generate
from generate import Generation, generate_batch, generate_text, stream_text, window_start
from preflight.core import log
from preflight.core.errors import PreflightError
from preflight.decoding import stepping
from preflight.decoding.assembling import TextAssembler
from preflight.decoding.choosing import choose_tokens, filter_probabilities, penalise_repetition
from preflight.models.kv_cache import KVCache
from preflight.models.protocol import LanguageModel
from preflight.models.single_row import SingleRowDecoder
from preflight.modes.validation_model import check_generation
from preflight.settings import ModelConfig, SamplingConfig, build_config
from preflight.tokenization.tiktoken_bpe import END_OF_TEXT
from preflight.tokenization.tiktoken_bpe import TiktokenTokenizer as Tokenizer
from transformer_model import DecoderOnlyTransformer

torch.set_num_threads(1)
CONTEXT = 16
GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = ["a", "a longer prompt", "", "one that does not fit into sixteen tokens", "four"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One id a byte, and two special ones; id 258 is a gap."""
    return Tokenizer(
        tiktoken.Encoding(
            "bytes",
            pat_str=r"(?s:.)",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|unused|>": 256, END_OF_TEXT: 257, "<|other|>": 259},
        )
    )


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> DecoderOnlyTransformer:
    """Random weights, the blocks' far larger than the embeddings': its text never settles."""
    torch.manual_seed(1)
    config = ModelConfig(tokenizer.vocab_size + 4, CONTEXT, 32, 4, 2, 64)
    model = DecoderOnlyTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if name.startswith("layers") and parameter.dim() > 1 else 1)
        model.embed_tokens.weight[tokenizer.end_of_text_id] *= 0.1  # seldom the end
    return model


def continue_greedily(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, prompt: str, n_tokens: int
) -> list[int]:
    """The plain way: no cache, no batch, the whole window read again for every token."""
    tokens = (tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text_id])[-CONTEXT:]
    n_prompt = len(tokens)
    writable = torch.tensor([*range(256), tokenizer.end_of_text_id])
    for _ in range(n_tokens):
        excess = len(tokens) - CONTEXT
        start = 0 if excess <= 0 else 4 * ((excess + 3) // 4)
        with torch.no_grad():
            scores = model(torch.tensor([tokens[start:]]))[0, -1, writable]
        token = int(writable[scores.argmax()])
        if token == tokenizer.end_of_text_id:
            break
        tokens.append(token)
    return tokens[n_prompt:]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cached_equals_uncached_past_three_contexts(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, prompt: str, device: str
) -> None:
    n_tokens = 4 * CONTEXT + 3
    config = dataclasses.replace(GREEDY, max_new_tokens=n_tokens)
    text = generate_text(copy.deepcopy(model).to(device), tokenizer, prompt, config)
    expected = continue_greedily(model, tokenizer, prompt, n_tokens)
    assert len(set(expected)) > 8
    assert text == tokenizer.decode(expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "config",
    [
        GREEDY,
        SamplingConfig(temperature=1.5),
        SamplingConfig(temperature=1.0, top_k=None, top_p=0.9, repetition_penalty=1.3, stop=("e",)),
    ],
)
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, config: SamplingConfig, batch_size: int
) -> None:
    config = dataclasses.replace(config, max_new_tokens=3 * CONTEXT)
    together = generate_batch(model, tokenizer, PROMPTS, config, batch_size)
    alone: list[tuple[int, Generation]] = []
    for i, prompt in enumerate(PROMPTS):
        pieces = stream_text(model, tokenizer, prompt, config, lambda e, n: alone.extend(e), i)
        assert "".join(pieces) == together[i].text
    assert alone == list(enumerate(together))


def test_the_same_prompt_draws_anew_and_the_same_seed_repeats(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer
) -> None:
    config = SamplingConfig(temperature=2.0, max_new_tokens=12)
    completions = [g.text for g in generate_batch(model, tokenizer, ["x"] * 3, config)]
    assert len(set(completions)) == 3
    assert completions == [g.text for g in generate_batch(model, tokenizer, ["x"] * 3, config)]


def test_seeds_share_no_completion(model: DecoderOnlyTransformer, tokenizer: Tokenizer) -> None:
    texts = []
    for seed in (0, 1, 2, 3):
        config = SamplingConfig(temperature=2.0, max_new_tokens=12, seed=seed)
        texts += [g.text for g in generate_batch(model, tokenizer, ["x"] * 4, config)]
    assert len(set(texts)) == len(texts) == 16


def test_random_numbers_of_completions_are_disjoint() -> None:
    """Also where digits run together; the first completion has the seed's own numbers."""
    pairs = [(seed, index) for seed in (*range(30), 2**63 - 1) for index in range(30)]
    firsts = {generate.build_random(*pair).random() for pair in pairs}
    assert len(firsts) == len(pairs)
    assert generate.build_random(7, 0).random() == random.Random(7).random()


@given(n_tokens=st.integers(1, 500), context=st.integers(2, 64))
def test_the_window_fits_and_moves_rarely(n_tokens: int, context: int) -> None:
    start, following = window_start(n_tokens, context), window_start(n_tokens + 1, context)
    assert 0 <= start <= following
    assert context - max(1, context // 4) < n_tokens - start <= context or start == 0
    assert n_tokens - start <= context
    assert following - start in (0, max(1, context // 4))


def hugging_face_probabilities(scores: Tensor, config: SamplingConfig, tokens: Tensor) -> Tensor:
    steps = LogitsProcessorList()
    if config.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(hf.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(hf.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p > 0:
        steps.append(hf.MinPLogitsWarper(config.min_p))
    return torch.softmax(steps(tokens, scores.clone()), dim=-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.sampled_from([None, 0, 1, 2, 7, 40, 500]),
    penalty=st.sampled_from([1.0, 0.5, 1.2, 10.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.3, 1.0]),
)
def test_filters_equal_those_of_hugging_face(
    seed: int, temperature: float, top_p: float, top_k: int | None, penalty: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 40, generator=generator) * 3
    tokens = torch.randint(0, 40, (3, 9), generator=generator)
    config = SamplingConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        min_p=min_p,
    )
    # At the very edge of top-p, rounding may keep or drop one candidate more.
    before_top_p = dataclasses.replace(config, top_p=1.0, min_p=0.0)
    sorted_, _ = hugging_face_probabilities(scores, before_top_p, tokens).double().sort(dim=1)
    from_the_top = sorted_.flip(1)
    before = from_the_top.cumsum(dim=1) - from_the_top
    assume(float((before - top_p).abs().min()) > 1e-5)
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, tokens, True)
    kept, ids = filter_probabilities(penalise_repetition(scores, seen, penalty), config)
    ours = kept if ids is None else torch.zeros(3, 40).scatter_(1, ids, kept)
    ours = ours / ours.sum(dim=1, keepdim=True)
    expected = hugging_face_probabilities(scores, config, tokens)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-4)


def test_draws_follow_the_distribution() -> None:
    """Chi-square with 9 degrees of freedom: 27.9 is passed once in a thousand."""
    n = 20_000
    scores = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    config = SamplingConfig(temperature=1.3, top_k=None)
    numbers = [generate.build_random(42, i).random() for i in range(n)]  # as a batch of n rows
    ids = choose_tokens(scores.expand(n, 10), config, torch.tensor(numbers))
    counts = torch.bincount(ids, minlength=10)
    expected = n * torch.softmax(scores[0] / 1.3, dim=0)
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
def test_the_ends_of_the_unit_interval_draw_possible_ids(uniform: float) -> None:
    scores = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]])
    for config in (SamplingConfig(), SamplingConfig(top_k=3), SamplingConfig(top_p=0.9)):
        assert choose_tokens(scores, config, torch.tensor([uniform])).item() in (1, 2)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0.0),
        SamplingConfig(do_sample=False),
        SamplingConfig(top_k=1),
        SamplingConfig(top_p=1e-9),
        SamplingConfig(temperature=1e-5),
        SamplingConfig(temperature=1e-300),
    ],
)
def test_every_spelling_of_greedy(config: SamplingConfig) -> None:
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 100
    ids = choose_tokens(scores, config, torch.full((4,), 0.7))
    assert ids.tolist() == scores.argmax(dim=1).tolist()


def scripted(
    monkeypatch: pytest.MonkeyPatch, data: bytes, tokenizer: Tokenizer, end: bool = True
) -> None:
    """Make every model generate `data`, then end."""
    script = [*data, *([tokenizer.end_of_text_id] if end else [])]
    generated: list[int] = []

    def choose(logits: Tensor, *unused: object) -> Tensor:
        generated.append(script[len(generated) % len(script)])
        return torch.tensor(generated[-1:])

    monkeypatch.setattr(stepping, "choose_tokens", choose)


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ((), "ab the end. cd", "end"),
        (("the end",), "ab ", "stop"),
        (("end.", "the end"), "ab ", "stop"),  # complete first
        (("nd", "the end."), "ab the e", "stop"),
        (("d", "nd", "end"), "ab the ", "stop"),  # complete at once: the longest
        (("the ending", "cde"), "ab the end. cd", "end"),  # begun, never complete
        (("a",), "", "stop"),
    ],
)
def test_stop_texts_across_token_borders(
    model: DecoderOnlyTransformer,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[str, ...],
    expected: str,
    reason: str,
) -> None:
    scripted(monkeypatch, b"ab the end. cd", tokenizer)
    config = SamplingConfig(stop=stop, max_new_tokens=100)
    [completion] = generate_batch(model, tokenizer, ["x"], config)
    assert (completion.text, completion.finish_reason) == (expected, reason)
    scripted(monkeypatch, b"ab the end. cd", tokenizer)
    assert "".join(stream_text(model, tokenizer, "x", config)) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (r"\n", "\n"),
        (r"a\tb\r\n", "a\tb\r\n"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        ("\n", "\n"),
        (r"\section", r"\section"),  # no such escape
        ("\\", "\\"),
        ("---", "---"),
    ],
)
def test_stop_texts_as_a_shell_passes_them(typed: str, expected: str) -> None:
    assert build_config({"stop": [typed]}, {}).sampling.stop == (expected,)


def test_a_stop_text_must_not_be_empty() -> None:
    for text in ("", "a\0"):
        with pytest.raises(PreflightError, match="--stop must not be empty"):
            build_config({"stop": [text]}, {})


@settings(max_examples=300)
@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=4)))
@example(text="abb", stops=["abb", "b"])
def test_token_borders_make_no_difference(text: str, stops: list[str]) -> None:
    whole, pieces = TextAssembler(stops), TextAssembler(stops)
    expected = whole.push(text.encode(), final=True)
    got = ""
    for character in [*text, ""]:
        if not pieces.stopped:
            got += pieces.push(character.encode(), final=not character)
    assert (got, pieces.stopped) == (expected, whole.stopped)


def test_streaming_never_breaks_a_character(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a \U0001f600\u00e9\u4e16 z"
    scripted(monkeypatch, text.encode(), tokenizer)
    pieces = list(stream_text(model, tokenizer, "x", SamplingConfig()))
    assert pieces == list(text)


@pytest.mark.parametrize(
    ("data", "max_new_tokens", "expected", "reason"),
    [
        ("a\U0001f600".encode(), 2, "a", "length"),  # cut after each byte of a character
        ("a\U0001f600".encode(), 4, "a", "length"),
        ("a\U0001f600".encode(), 5, "a\U0001f600", "length"),
        ("\u00e9".encode(), 1, "", "length"),
        (b"a\xff" + "\u4e16".encode(), 4, "a\ufffd", "length"),  # wrong in the middle: shown
        (b"a\xf0\x9fb", 4, "a\ufffdb", "length"),
        (b"a\xff", 2, "a\ufffd", "length"),  # wrong, whatever would have followed
        (b"a\xf0\x9f", 9, "a\ufffd", "end"),  # the model's own end: nothing was cut
    ],
)
def test_a_cut_character_is_left_out_and_a_wrong_one_marked(
    model: DecoderOnlyTransformer,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    data: bytes,
    max_new_tokens: int,
    expected: str,
    reason: str,
) -> None:
    config = SamplingConfig(max_new_tokens=max_new_tokens, stop=("zz",))
    scripted(monkeypatch, data, tokenizer)
    [completion] = generate_batch(model, tokenizer, ["x"], config)
    assert (completion.text, completion.finish_reason) == (expected, reason)
    assert completion.n_tokens == min(max_new_tokens, len(data) + 1)
    scripted(monkeypatch, data, tokenizer)
    assert generate_text(model, tokenizer, "x", config) == expected
    scripted(monkeypatch, data, tokenizer)
    assert "".join(stream_text(model, tokenizer, "x", config)) == expected


def test_the_check_of_the_cache_agrees_about_a_cut_character(tokenizer: Tokenizer) -> None:
    model = DecoderOnlyTransformer(ModelConfig(tokenizer.vocab_size, CONTEXT, 8, 2, 1, 8))
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.embed_tokens.weight[0xF0] = 100.0  # it generates the first byte of a character
    runtime = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(model=model, runtime=runtime)
    subject: Any = SimpleNamespace(trainer=trainer, tokenizer=tokenizer)
    assert "the same with and without" in check_generation(subject)


def test_streaming_adds_up_to_the_text(model: DecoderOnlyTransformer, tokenizer: Tokenizer) -> None:
    for prompt in PROMPTS:
        config = SamplingConfig(max_new_tokens=40, temperature=1.2, stop=("e", "st"))
        pieces = list(stream_text(model, tokenizer, prompt, config))
        assert "".join(pieces) == generate_text(model, tokenizer, prompt, config)
        assert all(pieces)


def test_ids_without_a_text_are_never_chosen(tokenizer: Tokenizer) -> None:
    config = ModelConfig(tokenizer.vocab_size + 4, 8, 8, 2, 1, 8)
    model = DecoderOnlyTransformer(config)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.embed_tokens.weight[[256, 258, 259, 260, 263]] = 100.0
    for config_ in (GREEDY, SamplingConfig(top_k=None, temperature=5.0)):
        [completion] = generate_batch(
            model, tokenizer, ["x"], dataclasses.replace(config_, max_new_tokens=30)
        )
        assert completion.n_tokens == 30


def test_a_repetition_penalty_keeps_greedy_text_from_repeating(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, device: str
) -> None:
    config = dataclasses.replace(GREEDY, max_new_tokens=40, repetition_penalty=1e5)
    rows = generate_batch(copy.deepcopy(model).to(device), tokenizer, ["x", "xyz"], config)
    for prompt, row in zip(("x", "xyz"), rows, strict=True):
        ids = tokenizer.encode(prompt).tolist() + list(row.text.encode("utf-8", "replace"))
        if "\ufffd" not in row.text:
            assert len(set(ids)) == len(ids)


class PlainModel(nn.Module):
    """A language model with the methods of the protocol and no more."""

    def __init__(self, inner: DecoderOnlyTransformer) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.build_cache = inner.build_cache
        self.prefill, self.decode = inner.prefill, inner.decode
        self.parameter_groups = inner.parameter_groups
        self.compile_for_training = inner.compile_for_training

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.inner(tokens, targets)


def test_a_model_without_a_single_row_decoder_generates_the_same(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer
) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    plain = PlainModel(frozen)
    assert isinstance(plain, LanguageModel)
    config = SamplingConfig(max_new_tokens=40, temperature=0.9)
    expected = generate_text(frozen, tokenizer, "a prompt", config)
    assert generate_text(plain, tokenizer, "a prompt", config) == expected


def test_numpy_generates_what_torch_generates(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end at different times and windows slide; the last row left is decoded in numpy."""
    config = SamplingConfig(max_new_tokens=40, temperature=0.9)
    expected = generate_batch(model, tokenizer, PROMPTS[:4], config, batch_size=3)
    threads = []
    decode = SingleRowDecoder.decode

    def spy(*given: Any) -> Tensor:
        threads.append(torch.get_num_threads())
        return decode(*given)

    monkeypatch.setattr(SingleRowDecoder, "decode", spy)
    frozen = copy.deepcopy(model).requires_grad_(False)
    torch.set_num_threads(2)
    try:
        assert generate_batch(frozen, tokenizer, PROMPTS[:4], config, batch_size=3) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(threads) == {1}


def test_the_model_is_left_in_its_mode_and_outside_inference(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer
) -> None:
    model.train()
    stream = stream_text(model, tokenizer, "x", SamplingConfig(max_new_tokens=3))
    next(stream)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    list(stream)
    model.eval()
    assert generate_batch(model, tokenizer, [], GREEDY) == []


def test_generating_under_autocast(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, device: str
) -> None:
    with torch.autocast(device, dtype=torch.bfloat16):
        completions = generate_batch(
            copy.deepcopy(model).to(device), tokenizer, PROMPTS, SamplingConfig(max_new_tokens=20)
        )
    assert all(completion.n_tokens for completion in completions)


def test_a_window_that_loses_text_is_told_once(
    model: DecoderOnlyTransformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    log.log_once.cache_clear()
    config = dataclasses.replace(GREEDY, max_new_tokens=1)
    generate_text(model, tokenizer, "x" * (CONTEXT - 1), config)
    assert capsys.readouterr().err == ""
    generate_batch(model, tokenizer, ["x" * (CONTEXT + 1)] * 3, config)
    generate_text(model, tokenizer, "y" * (CONTEXT + 5), config)
    assert capsys.readouterr().err.count("its last 16 tokens") == 1


def test_the_cache_refuses_a_full_row(model: DecoderOnlyTransformer) -> None:
    cache = KVCache(model.config, 2, torch.device("cpu"), torch.float32, capacity=4)
    with pytest.raises(ValueError, match="more than the cache's 4"):
        model.prefill(torch.zeros(1, 5, dtype=torch.long), cache, [0], [5])
    model.prefill(torch.zeros(1, 4, dtype=torch.long), cache, [0], [4])
    with pytest.raises(ValueError, match="5 tokens are more"):
        model.decode(torch.zeros(2, dtype=torch.long), cache)
