"""Model parts and families: transformers' Llama as the oracle, and what every family must do.

With norms of queries and keys, a Llama is what transformers calls Qwen3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from generate import generate_batch, window_start
from preflight.models import loss as losses
from preflight.models.base import TokenModel
from preflight.models.building import build_model
from preflight.models.cost import (
    count_embedding_parameters,
    count_parameters,
    count_tensors,
    estimate_flops_per_token,
)
from preflight.settings import ModelConfig, ModelSettings, SamplingConfig
from preflight.tokenization import load_tokenizer

torch.set_num_threads(1)
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "model_size": "custom",
    "n_layers": 2,
    "n_embeddings": 48,
    "n_heads": 4,
    "context_length": 24,
}


def make_config(family: str, **flags: Any) -> ModelConfig:
    return ModelSettings(**(SHAPE | flags), model_family=family).resolve(97)


def build_spread(config: ModelConfig, seed: int = 0) -> TokenModel:
    """Weights far from initialisation, norms and biases too, so that no part is idle."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def draw_tokens(n_rows: int = 3, n_tokens: int = 24) -> Tensor:
    return torch.randint(0, 97, (n_rows, n_tokens), generator=torch.Generator().manual_seed(5))


def to_llama(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients under the names of transformers' Llama."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("qkv_proj.weight"):
            heads = (config.n_heads, config.kv_heads, config.kv_heads)
            parts = tensor.split([n * config.head_dim for n in heads])
            result |= {name.replace("qkv", x): part for x, part in zip("qkv", parts, strict=True)}
        elif name.endswith("gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            result |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            result[name] = tensor
    return {n if n.startswith("lm_head") else f"model.{n}": t for n, t in result.items()}


def build_llama(model: TokenModel, rope: dict[str, Any]) -> LlamaForCausalLM | Qwen3ForCausalLM:
    config = model.config
    build, build_config = (
        (Qwen3ForCausalLM, Qwen3Config) if config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    )
    peer = build(
        build_config(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embeddings,
            intermediate_size=config.ffn_hid_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tied,
        )
    )
    weights = to_llama(config, dict(model.named_parameters()))
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    peer.tie_weights()
    return peer


def ntk_theta(config: ModelConfig) -> float:
    return config.rope_theta * config.rope_factor ** (config.head_dim / (config.head_dim - 2))


PARTS: list[dict[str, Any]] = [
    {},
    {"rope_theta": 500_000.0},
    {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "ntk", "rope_factor": 2.0},
    {"norm_eps": 0.1},
    {"qk_norm": True},
]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_and_gradients_equal_those_of_llama(
    tied: bool, kv_heads: int, parts: dict[str, Any]
) -> None:
    model = build_spread(make_config("llama", tied=tied, n_kv_heads=kv_heads, **parts))
    theirs: dict[str, Any] = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    if model.config.rope_scaling == "linear":
        theirs |= {"rope_type": "linear", "factor": model.config.rope_factor}
    elif model.config.rope_scaling == "ntk":
        theirs["rope_theta"] = ntk_theta(model.config)
    peer = build_llama(model, theirs)
    tokens = draw_tokens()
    logits, expected = model(tokens[:, :-1]), peer(tokens[:, :-1]).logits
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4
    targets = tokens[:, 1:]
    model(tokens[:, :-1], targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in to_llama(model.config, gradients).items():
        wanted = peer.get_parameter(name).grad
        assert wanted is not None
        assert (gradient - wanted).norm() < 1e-5 * wanted.norm(), name


@pytest.mark.parametrize("rope", [{}, {"rope_scaling": "linear", "rope_factor": 4.0}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_ragged_cached_batches_equal_those_of_llama(
    tied: bool, kv_heads: int, rope: dict[str, Any]
) -> None:
    """Prompts of 9, 4 and 1 tokens, then tokens one by one; they pad on the left, with a mask."""
    model = build_spread(make_config("llama", tied=tied, n_kv_heads=kv_heads, **rope)).eval()
    theirs: dict[str, Any] = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    if rope:
        theirs |= {"rope_type": "linear", "factor": model.config.rope_factor}
    peer = build_llama(model, theirs).eval()
    tokens, lengths = draw_tokens(3, 24), torch.tensor([9, 4, 1])
    longest = int(lengths.max())
    left, right = torch.zeros(2, 3, longest, dtype=torch.long)
    mask = torch.zeros(3, longest, dtype=torch.long)
    for row, n in enumerate(lengths.tolist()):
        left[row, longest - n :] = right[row, :n] = tokens[row, :n]
        mask[row, longest - n :] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model.build_cache(3, CPU, torch.float32)
    with torch.no_grad():
        past = peer(left, mask, places, use_cache=True).past_key_values
        model.prefill(right, cache, [0, 1, 2], lengths.tolist())
        for _ in range(12):
            newest = tokens.gather(1, lengths[:, None])
            mask = F.pad(mask, (0, 1), value=1)
            output = peer(newest, mask, lengths[:, None], past, use_cache=True)
            past, expected = output.past_key_values, output.logits[:, -1]
            assert expected.std() > 0.5
            assert (model.decode(newest[:, 0], cache) - expected).abs().max() < 1e-4
            lengths = lengths + 1
    assert past.get_seq_length() == longest + 12


FAMILIES: dict[str, ModelConfig] = {
    "gpt2": make_config("gpt2"),
    "llama": make_config("llama"),
    "llama, 2 KV heads": make_config("llama", n_kv_heads=2, tied=True),
    "modern": make_config("modern", n_kv_heads=1, logit_softcap=20.0),
    "geglu, learned": make_config("gpt2", feed_forward="geglu", bias=False, qk_norm=True),
    "mlp": make_config("mlp", n_heads=None, context_length=24),
    "mlp, untied": make_config("mlp", n_heads=None, tied=False, bias=False, logit_softcap=20.0),
    "reglu, rope": make_config("llama", feed_forward="reglu", norm="layer", bias=True),
}
every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


@every_family
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_counts_are_those_of_the_model(config: ModelConfig, n_layers: int) -> None:
    config = dataclasses.replace(config, n_layers=n_layers)
    model = build_model(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert count_tensors(config) == len(model.state_dict())
    groups = model.parameter_groups()
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(id(p) for group in groups for p in group.parameters) == sorted(names)
    head = {"embed_tokens.weight"} if config.tied else {"embed_tokens.weight", "lm_head.weight"}
    assert head <= {names[id(p)] for p in groups[1].parameters}
    assert count_embedding_parameters(config) == sum(p.numel() for p in groups[1].parameters)


@every_family
def test_flops_are_those_of_the_matmuls(config: ModelConfig) -> None:
    """Of a real step, whose attention torch does not count on the CPU."""
    model, tokens = build_model(config), draw_tokens(2)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    attention = 12 * config.n_layers * config.n_embeddings * config.context_length
    attention = 0 if config.model_family == "mlp" else attention
    expected = counter.get_total_flops() / tokens.numel() + attention
    assert estimate_flops_per_token(config) == expected


@every_family
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(config: ModelConfig) -> None:
    """Ragged rows, one of them replaced, then all decoded together; then some are dropped."""
    model = build_spread(config).eval().requires_grad_(False)
    tokens = draw_tokens(3, 24)
    expected = model(tokens)
    cache = model.build_cache(3, CPU, torch.float32)
    lengths = [9, 4, 1]
    padded = tokens[:, :9].clone()
    padded[1, 4:] = padded[2, 1:] = 0
    model.prefill(padded, cache, [0, 1, 2], lengths)
    model.prefill(tokens[1:2, :6], cache, [1], [6])
    lengths[1] = 6
    for _ in range(10):
        newest = torch.stack([tokens[row, n] for row, n in enumerate(lengths)])
        logits = model.decode(newest, cache)
        wanted = torch.stack([expected[row, n] for row, n in enumerate(lengths)])
        assert (logits - wanted).abs().max() < 1e-4
        lengths = [n + 1 for n in lengths]
    assert cache.lengths == lengths
    cache.keep_rows([2, 0])
    logits = model.decode(torch.stack([tokens[2, lengths[2]], tokens[0, lengths[0]]]), cache)
    wanted = torch.stack([expected[2, lengths[2]], expected[0, lengths[0]]])
    assert (logits - wanted).abs().max() < 1e-4


@every_family
def test_generation_goes_on_past_the_context_as_without_a_cache(config: ModelConfig) -> None:
    """The window slides three times; its positions begin anew each time."""
    config = dataclasses.replace(config, vocab_size=257)
    model, tokenizer = build_spread(config).eval().requires_grad_(False), load_tokenizer("byte")
    settings = SamplingConfig(max_new_tokens=40, temperature=0.0)
    prompts = ["a prompt", "one that is longer than the context of 24"]
    for prompt, result in zip(
        prompts, generate_batch(model, tokenizer, prompts, settings), strict=True
    ):
        tokens = tokenizer.encode(prompt).tolist()[-config.context_length :]
        start = len(tokens)
        for _ in range(40):
            window = tokens[window_start(len(tokens), config.context_length) :]
            tokens.append(int(model(torch.tensor([window]))[0, -1, :257].argmax()))
            if tokens[-1] == tokenizer.end_of_text_id:
                break
        expected = tokenizer.decode_bytes(t for t in tokens[start:] if t < 256)
        # A character that the end cuts is left out.
        text = expected.decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}")
        assert result.text.rstrip("\N{REPLACEMENT CHARACTER}") == text


@every_family
def test_no_token_sees_a_later_one(config: ModelConfig) -> None:
    model, tokens = build_spread(config), draw_tokens()
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert (before[:, 15] - after[:, 15]).abs().max() > 0.01


@every_family
def test_gradients_are_those_of_autograd(config: ModelConfig) -> None:
    """Of the loss in chunks, against the logits; and along one direction, against differences."""
    model = build_spread(config).double()
    tokens = draw_tokens()
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :3] = -100

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    loss = model(inputs, targets)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    expected = loss_of(model(inputs))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.manual_seed(1)
    slope = 0.0
    directions = [torch.randn_like(p) for p in model.parameters()]
    for gradient, parameter, direction in zip(
        gradients, model.parameters(), directions, strict=True
    ):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)
        slope += float((parameter.grad * direction).sum())
    step, ends = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            ends.append(float(loss_of(model(inputs))))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)


@every_family
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(config: ModelConfig, dropout: float) -> None:
    config = dataclasses.replace(config, dropout=dropout)
    tokens, results = draw_tokens(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(config, gradient_checkpointing=checkpointing)
        torch.manual_seed(11)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        again = model(tokens[:, :-1], tokens[:, 1:])
        assert torch.equal(loss, again) == (dropout == 0)
        model.eval()
        assert torch.equal(model(tokens), model(tokens))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)


@every_family
def test_loss_in_bf16_autocast_is_near_fp32(config: ModelConfig) -> None:
    model, tokens = build_spread(config), draw_tokens(8)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        assert loss.dtype == torch.float32
        loss.backward()
        results.append(
            (loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    assert results[1][0] == pytest.approx(results[0][0], rel=0.01)
    for exact, rounded in zip(results[0][1], results[1][1], strict=True):
        assert F.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.97


@every_family
def test_one_batch_equals_the_sum_of_its_parts(config: ModelConfig) -> None:
    model, tokens = build_spread(config), draw_tokens(4)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in tokens.split(2):
        model(part[:, :-1], part[:, 1:]).backward()
    for expected, parameter in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_family
def test_a_compiled_model_computes_the_same(config: ModelConfig) -> None:
    config = dataclasses.replace(config, n_layers=1)  # the layers are alike, and each takes seconds
    model, tokens = build_spread(config), draw_tokens()
    results = []
    torch._dynamo.reset()
    counters.clear()
    for forward in (model, model.compile_for_training()):
        model.zero_grad()
        losses._kept_buffers.clear()
        forward(tokens[:, :-1], tokens[:, 1:]).backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert model.head_weight in losses._kept_buffers  # the loss is in no graph
    assert counters["stats"]["unique_graphs"] == 1  # and all else is in one
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)
