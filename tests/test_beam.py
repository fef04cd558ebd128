"""Beam search against every text there is and a plain search; log-probabilities against a full
forward pass; ids in, ids out.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generate import (
    Generation,
    generate_batch,
    generate_ids,
    generate_text,
    load_model,
    stream_text,
)
from preflight.checkpoints.saving import save_checkpoint
from preflight.core.errors import PreflightError
from preflight.decoding.beam import BeamSearcher
from preflight.decoding.vocabulary import AnyIds, Vocabulary
from preflight.models.kv_cache import KVCache
from preflight.models.ngram_mlp import NgramMLP
from preflight.modes.generate import check_vocabulary
from preflight.settings import ModelConfig, SamplingConfig, build_config
from preflight.settings.unused import drop_unused
from preflight.tokenization import Tokenizer, load_tokenizer
from transformer_model import DecoderOnlyTransformer

torch.set_num_threads(1)
PROMPTS = ["a", "a longer prompt", "", "one that does not fit into sixteen tokens", "four"]


def build_model(vocab_size: int, context: int = 16, seed: int = 1) -> DecoderOnlyTransformer:
    """Random weights, the blocks' large: what follows depends on all that came before."""
    torch.manual_seed(seed)
    model = DecoderOnlyTransformer(ModelConfig(vocab_size, context, 32, 4, 2, 64)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if name.startswith("layers") and parameter.dim() > 1 else 1)
        model.embed_tokens.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def byte_model(tokenizer: Tokenizer) -> DecoderOnlyTransformer:
    return build_model(tokenizer.vocab_size + 3)


def search(
    model: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[list[int]],
    config: SamplingConfig,
    batch_size: int = 8,
    n_best: int = 1,
) -> list[Generation]:
    searcher = BeamSearcher(model, vocabulary, prompts, config, batch_size, n_best)
    found: dict[int, Generation] = {}
    while searcher.rows:
        found.update(searcher.step())
    return [found[i] for i in sorted(found)]


def read_next(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities (B V) of what follows texts of one length, in fp64, from a pass over the
    whole window.
    """
    context = model.config.context_length
    excess, stride = len(texts[0]) - context, max(1, context // 4)
    start = 0 if excess <= 0 else stride * ((excess + stride - 1) // stride)
    with torch.no_grad():
        logits = model(torch.tensor([list(text[start:]) for text in texts]))[:, -1]
    return torch.log_softmax(logits.double(), dim=-1)


def search_plainly(
    model: Any, prompt: list[int], config: SamplingConfig, end: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Finished texts with their scores, best first: no cache, all continuations are looked at."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, config.max_new_tokens + 1):
        at = read_next(model, [[*prompt, *tokens] for _, tokens in beams]).tolist()
        options = [
            (total + value, (*tokens, i))
            for (total, tokens), values in zip(beams, at, strict=True)
            for i, value in enumerate(values)
        ]
        options.sort(reverse=True)
        beams = []
        for rank, (total, tokens) in enumerate(options):
            if tokens[-1] != end and length < config.max_new_tokens:
                beams.append((total, tokens))
            elif rank < config.beams:
                finished.append((total / length**config.length_penalty, tokens))
        beams = beams[: config.beams]
        finished = sorted(finished, reverse=True)[: config.beams]
        if len(finished) == config.beams:
            break
    return finished


@pytest.mark.parametrize("end", [-1, 3])
def test_enough_beams_find_what_trying_every_text_finds(end: int) -> None:
    """Five ids and four steps; also where one of the ids ends a text."""
    model, n_steps = build_model(5), 4
    every = torch.cartesian_prod(*[torch.arange(5)] * n_steps)
    with torch.no_grad():
        prompts = torch.tensor([[0, 2]]).expand(len(every), 2)
        logits = model(torch.cat([prompts, every], dim=1))[:, 1:-1].double()
    steps = torch.log_softmax(logits, dim=-1).gather(2, every[:, :, None])[:, :, 0].tolist()
    totals: dict[tuple[int, ...], float] = {}
    for ids, logprobs in zip(every.tolist(), steps, strict=True):
        n = ids.index(end) + 1 if end in ids else n_steps
        totals[tuple(ids[:n])] = sum(logprobs[:n])
    for penalty in (-1.0, 0.0, 1.0, 2.0):
        scores = {tokens: total / len(tokens) ** penalty for tokens, total in totals.items()}
        expected = sorted(scores, key=lambda tokens: -scores[tokens])
        config = SamplingConfig(n_steps, beams=5**n_steps, length_penalty=penalty)
        found = search(model, AnyIds(5, end), [[0, 2]], config, n_best=len(expected))
        assert [each.tokens for each in found] == expected
        assert [each.score for each in found] == pytest.approx(
            [scores[tokens] for tokens in expected], abs=1e-4
        )


@pytest.mark.parametrize("n_beams", [2, 3, 7])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
def test_fewer_beams_find_what_a_plain_search_finds(n_beams: int, penalty: float) -> None:
    """Prompts of different lengths in one batch, and windows that slide three times."""
    model, end = build_model(40, context=8), 7
    with torch.no_grad():  # the end comes often enough to be the next best
        model.get_parameter("norm.bias").add_(model.embed_tokens.weight[end])
    prompts = [[1], [2, 3, 4], [5] * 8, [9, 30], [11, 12, 13, 14, 15]]
    config = SamplingConfig(26, beams=n_beams, length_penalty=penalty)
    found = search(model, AnyIds(40, end), prompts, config, batch_size=3, n_best=n_beams)
    lengths = set()
    for i, prompt in enumerate(prompts):
        expected = search_plainly(model, prompt, config, end)
        ours = found[i * n_beams : (i + 1) * n_beams]
        assert [each.tokens for each in ours] == [tokens for _, tokens in expected]
        assert [each.score for each in ours] == pytest.approx([s for s, _ in expected], abs=1e-4)
        lengths |= {len(tokens) for _, tokens in expected}
    assert max(lengths) > 8 + 6  # past the context and two moves


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_prompt_of_a_batch_gets_what_it_gets_alone(
    byte_model: DecoderOnlyTransformer, tokenizer: Tokenizer, batch_size: int, device: str
) -> None:
    """With stop texts, so that searches end at different times, and windows that slide."""
    stop = tuple(map(chr, range(32, 127)))
    config = SamplingConfig(20, beams=3, stop=stop, logprobs=2)
    model = copy.deepcopy(byte_model).to(device)
    together = generate_batch(model, tokenizer, PROMPTS, config, batch_size)
    alone = [generate_batch(model, tokenizer, [prompt], config)[0] for prompt in PROMPTS]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert len({each.n_tokens for each in alone}) > 1
    for each in alone:
        data = tokenizer.decode_bytes(each.tokens)
        places = [i for i, byte in enumerate(data) if chr(byte) in stop]
        assert places in ([], [len(data) - 1])  # it ends with the first
        assert each.finish_reason == ("stop" if places else "length")
        if places:
            assert each.text == data[:-1].decode(errors="replace")


class Gaps(AnyIds):
    """Ids of which every third stands for nothing."""

    def token_bytes(self, token: int) -> bytes | None:
        return b"" if token % 3 else None


@pytest.mark.parametrize("repetition", [1.0, 1.5])
def test_ids_without_a_text_are_in_no_beam(repetition: float) -> None:
    """Gaps in the vocabulary, and ids that the model has beyond it."""
    model = DecoderOnlyTransformer(ModelConfig(24, 8, 8, 2, 1, 8))
    with torch.no_grad():
        model.get_parameter("norm.bias").fill_(1.0)
        model.embed_tokens.weight[[0, 3, 6, 9, 20, 22]] = 100.0
    config = SamplingConfig(9, beams=3, repetition_penalty=repetition)
    for found in search(model, Gaps(20), [[1], [3, 0]], config, n_best=3):
        assert found.n_tokens == 9
        assert all(token % 3 and token < 20 for token in found.tokens)
    # Four ids for five beams: the fifth stays empty.
    config = SamplingConfig(1, beams=5, repetition_penalty=repetition)
    found_ids = [found.tokens[0] for found in search(model, Gaps(7), [[2, 3]], config, n_best=5)]
    assert sorted(found_ids) == [1, 2, 4, 5]


def test_a_model_without_attention_is_searched_too() -> None:
    torch.manual_seed(3)
    model = NgramMLP(ModelConfig(20, 4, 16, 1, 2, 32, model_family="mlp")).eval()
    config = SamplingConfig(9, beams=3)
    found = search(model, AnyIds(20, 2), [[1, 2, 3], [4]], config, n_best=3)
    for i, prompt in enumerate([[1, 2, 3], [4]]):
        expected = [tokens for _, tokens in search_plainly(model, prompt, config, 2)]
        assert [each.tokens for each in found[3 * i : 3 * i + 3]] == expected


def test_rows_of_the_cache_are_copied_in_place() -> None:
    cache = KVCache(ModelConfig(9, 6, 8, 2, 2, 8), 4, torch.device("cpu"), torch.float32)
    cache.lengths = [3, 1, 2, 3]
    for layer in cache.layers:
        layer.normal_()
    before, addresses = copy.deepcopy(cache), [layer.data_ptr() for layer in cache.layers]
    cache.copy_rows([3, 0, 2, 0])
    assert [layer.data_ptr() for layer in cache.layers] == addresses
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer[..., :3, :], old[:, [3, 0, 2, 0], :, :3])
    assert cache.lengths == [3, 3, 2, 3]


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(40, temperature=0.0, logprobs=3),
        SamplingConfig(40, temperature=1.4, top_k=5, repetition_penalty=1.2, logprobs=4),
        SamplingConfig(40, temperature=1.0, top_k=None, top_p=0.8, logprobs=0),
        SamplingConfig(40, beams=3, logprobs=3),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_log_probabilities_are_those_of_a_full_pass(
    byte_model: DecoderOnlyTransformer, tokenizer: Tokenizer, config: SamplingConfig, frozen: bool
) -> None:
    """Past two contexts; frozen, the last row is decoded in numpy."""
    model = copy.deepcopy(byte_model).requires_grad_(not frozen)
    n_ids, n_asked = tokenizer.vocab_size, config.logprobs or 0
    plain = dataclasses.replace(config, logprobs=None)
    completions = generate_batch(model, tokenizer, PROMPTS, config, 3)
    for prompt, each, other in zip(
        PROMPTS, completions, generate_batch(model, tokenizer, PROMPTS, plain, 3), strict=True
    ):
        assert (each.tokens, other.logprobs) == (other.tokens, ())
        assert [detail.token for detail in each.logprobs] == list(each.tokens)
        text = (tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text_id])[-16:]
        for detail in each.logprobs:
            at = read_next(model, [text])[0]
            assert detail.logprob == pytest.approx(float(at[detail.token]), abs=1e-5)
            values, ids = at[:n_ids].topk(n_asked)
            assert [i for i, _ in detail.alternatives] == ids.tolist()
            assert [v for _, v in detail.alternatives] == pytest.approx(values.tolist(), abs=1e-5)
            text.append(detail.token)
        if config.beams > 1:
            total = sum(detail.logprob for detail in each.logprobs)
            assert each.score == pytest.approx(total / each.n_tokens, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(30, temperature=0.0),
        SamplingConfig(30, temperature=1.3, seed=5, stop=("e",)),
        SamplingConfig(30, beams=3),
    ],
)
def test_ids_get_the_ids_of_the_text(
    byte_model: DecoderOnlyTransformer, tokenizer: Tokenizer, config: SamplingConfig
) -> None:
    rows: list[list[int]] = [tokenizer.encode(prompt).tolist() for prompt in PROMPTS]
    expected = generate_batch(byte_model, tokenizer, PROMPTS, config)
    found = generate_ids(byte_model, rows, config, tokenizer, batch_size=2)
    assert found == [list(each.tokens) for each in expected]
    square = torch.tensor([rows[1], rows[1][::-1]])
    reversed_ = PROMPTS[1][::-1]
    expected = generate_batch(byte_model, tokenizer, [PROMPTS[1], reversed_], config)
    found = generate_ids(byte_model, square, config, tokenizer)
    assert found == [list(each.tokens) for each in expected]
    if not config.stop:
        text = generate_text(byte_model, tokenizer, PROMPTS[1], config)
        assert tokenizer.decode(found[0]).startswith(text)


def test_ids_that_are_none(byte_model: DecoderOnlyTransformer) -> None:
    config = SamplingConfig(5, temperature=0.0)
    size = byte_model.config.vocab_size
    assert [len(row) for row in generate_ids(byte_model, [[1], [2, 3]], config)] == [5, 5]
    assert generate_ids(byte_model, [], config) == []
    refused: list[list[list[int]]] = [[[]], [[1], [size]], [[-1]]]
    for rows in refused:
        with pytest.raises(ValueError, match=f"ids from 0 to {size - 1}"):
            generate_ids(byte_model, rows, config)
    with pytest.raises(ValueError, match="only with the tokenizer"):
        generate_ids(byte_model, [[1]], dataclasses.replace(config, stop=("a",)))


def test_a_loaded_model_generates_ids(
    byte_model: DecoderOnlyTransformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    weights = {name: p.detach() for name, p in byte_model.named_parameters()}
    described = {
        "model": dataclasses.asdict(byte_model.config),
        "tokenizer": tokenizer.describe(),
    }
    checkpoint = save_checkpoint(tmp_path, 1, weights, {}, described, {"val_loss": 1.0})
    model, loaded = load_model(checkpoint, torch.device("cpu"), torch.float32)
    config = SamplingConfig(25, temperature=1.1, stop=("a", "e"))
    expected = [list(g.tokens) for g in generate_batch(model, loaded, PROMPTS, config)]
    rows = [loaded.encode(prompt).tolist() for prompt in PROMPTS]
    assert model.generate(rows, config) == expected
    assert copy.deepcopy(model).generate(rows, config) == expected
    with pytest.raises(RuntimeError, match="generate_ids"):
        byte_model.generate(rows, config)


def test_a_search_is_told_at_its_end(
    byte_model: DecoderOnlyTransformer, tokenizer: Tokenizer
) -> None:
    config = SamplingConfig(12, beams=4)
    told: list[tuple[int, Generation]] = []
    pieces = list(stream_text(byte_model, tokenizer, "x", config, lambda e, n: told.extend(e), 3))
    assert pieces == [generate_text(byte_model, tokenizer, "x", config)]
    assert [(index, each.text) for index, each in told] == [(3, pieces[0])]


def test_a_search_leaves_the_model_in_its_mode(
    byte_model: DecoderOnlyTransformer, tokenizer: Tokenizer
) -> None:
    model = copy.deepcopy(byte_model)
    model.train()
    generate_batch(model, tokenizer, ["x"], SamplingConfig(2, beams=2))
    assert model.training


def test_more_than_a_model_can_generate_is_refused(
    byte_model: DecoderOnlyTransformer, tokenizer: Tokenizer
) -> None:
    n_ids = tokenizer.vocab_size
    check_vocabulary(SamplingConfig(beams=n_ids, logprobs=n_ids), byte_model, tokenizer)
    for flag, config in (
        ("--beams", SamplingConfig(beams=n_ids + 1)),
        ("--logprobs", SamplingConfig(logprobs=n_ids + 1)),
    ):
        with pytest.raises(PreflightError, match=f"{flag} {n_ids + 1} is more than") as caught:
            check_vocabulary(config, byte_model, tokenizer)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"beams": "0"}, "--beams must be at least 1"),
        ({"logprobs": "-1"}, "--logprobs must be at least 0"),
        ({"length_penalty": "11"}, "--length-penalty must be at most 10"),
        ({"beams": "2", "num_return_sequences": "3"}, "--num-return-sequences 3 must be at most"),
    ],
)
def test_flags_that_ask_for_no_search(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PreflightError, match=words):
        build_config(given, {})


def test_what_a_search_does_not_use_is_told() -> None:
    given = {"beams": "4", "temperature": "0.5", "top_k": "3"}
    config, idle = drop_unused("generate", build_config(given, dict.fromkeys(given, "flag")))
    assert sorted(idle) == ["temperature", "top_k"]
    assert config.sampling.beams == 4
    given = {"length_penalty": "2"}
    config, idle = drop_unused("generate", build_config(given, dict.fromkeys(given, "flag")))
    assert idle == {"length_penalty": "is not used: one beam is no search: give --beams"}
