"""The model: counts of the design, Hugging Face's GPT-2 as the oracle, the loss, initialisation."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import build_hugging_face, to_hugging_face
from preflight.models.cost import count_parameters, estimate_flops_per_token
from preflight.models.protocol import LanguageModel
from preflight.settings import MODEL_PRESETS, ModelConfig, ModelSettings
from transformer_model import Block, DecoderOnlyTransformer

torch.set_num_threads(1)
GPT2_VOCABULARY = 50_257
PARAMETERS = {  # the table of the design
    "nano": 6_846_080,
    "micro": 16_090_880,
    "tiny": 41_756_672,
    "small": 124_439_808,
    "medium": 354_823_168,
    "large": 774_030_080,
    "xl": 1_557_611_200,
}
CONFIG = ModelConfig(
    vocab_size=97, context_length=24, n_embeddings=32, n_heads=4, n_layers=3, ffn_hid_dim=80
)


def build(config: ModelConfig = CONFIG, seed: int = 0, **settings: bool) -> DecoderOnlyTransformer:
    torch.manual_seed(seed)
    return DecoderOnlyTransformer(config, **settings)


def draw_batch(batch_size: int = 3, n_tokens: int = 24, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, CONFIG.vocab_size, (batch_size, n_tokens + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("size", MODEL_PRESETS)
def test_parameter_counts_are_those_of_the_design(size: str) -> None:
    config = ModelSettings(model_size=size).resolve(GPT2_VOCABULARY)
    with torch.device("meta"):
        model = DecoderOnlyTransformer(config)
    assert count_parameters(config) == PARAMETERS[size]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]


@pytest.fixture(scope="module")
def spread_model() -> DecoderOnlyTransformer:
    """Weights far from initialisation, biases and norms too, so that no part is idle."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_logits_and_gradients_equal_hugging_face(spread_model: DecoderOnlyTransformer) -> None:
    peer, names = build_hugging_face(spread_model)
    tokens, targets = draw_batch()
    logits, peer_logits = spread_model(tokens), peer(tokens).logits
    assert logits.std() > 0.5
    assert (logits - peer_logits).abs().max() < 1e-4

    spread_model.zero_grad()
    loss = spread_model(tokens, targets)
    loss.backward()
    peer_loss = F.cross_entropy(peer_logits.flatten(0, 1), targets.flatten(), reduction="sum")
    peer_loss.backward()
    torch.testing.assert_close(loss, peer_loss)
    theirs = dict(peer.named_parameters())
    assert len(names) == len(theirs) == len(list(spread_model.parameters()))
    for name, parameter in spread_model.named_parameters():
        expected = theirs[names[name]].grad
        assert parameter.grad is not None
        torch.testing.assert_close(
            to_hugging_face(name, parameter.grad),
            expected,
            atol=1e-5 * targets.numel(),
            rtol=1e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_no_token_sees_a_later_one(spread_model: DecoderOnlyTransformer) -> None:
    tokens, _ = draw_batch()
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = spread_model(tokens), spread_model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert (before[:, 15] - after[:, 15]).abs().max() > 0.01


def test_loss_in_bf16_autocast_is_near_fp32(
    spread_model: DecoderOnlyTransformer, device: str
) -> None:
    tokens, targets = (ids.to(device) for ids in draw_batch(batch_size=8))
    spread_model = copy.deepcopy(spread_model).to(device)
    spread_model.zero_grad()
    spread_model(tokens, targets).backward()
    exact = [p.grad.clone() for p in spread_model.parameters() if p.grad is not None]
    exact_loss = spread_model(tokens, targets).item()
    spread_model.zero_grad()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = spread_model(tokens, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.item() == pytest.approx(exact_loss, rel=0.01)
    for parameter, expected in zip(spread_model.parameters(), exact, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        cosine = F.cosine_similarity(parameter.grad.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.98


def test_parameter_groups_hold_every_trainable_parameter_once() -> None:
    model = build()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g.kind: [names[id(p)] for p in g.parameters] for g in model.parameter_groups()}
    assert list(groups) == ["matrix", "embedding", "scalar"]
    assert groups["embedding"] == ["embed_tokens.weight", "embed_positions.weight"]
    assert {name.split(".")[-2] for name in groups["matrix"]} == {
        "qkv_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    }
    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
    model.layers[0].requires_grad_(False)
    left = [p for group in model.parameter_groups() for p in group.parameters]
    assert len(left) == len(names) - 12
    assert isinstance(model, LanguageModel)


@pytest.mark.parametrize("masked", [None, [0, 5, 24, 71]])
def test_no_target_no_loss_and_no_gradient(
    spread_model: DecoderOnlyTransformer, masked: list[int] | None
) -> None:
    """Where a target is -100, the loss is that of the other tokens; ``None`` masks all."""
    tokens, targets = draw_batch()
    targets = targets.clone()
    targets.view(-1)[slice(None) if masked is None else masked] = -100
    spread_model.zero_grad()
    loss = spread_model(tokens, targets)
    loss.backward()
    grads = [p.grad.clone() for p in spread_model.parameters() if p.grad is not None]
    spread_model.zero_grad()
    logits = spread_model(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for grad, parameter in zip(grads, spread_model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(dropout: float, device: str) -> None:
    config = dataclasses.replace(CONFIG, dropout=dropout)
    tokens, targets = (ids.to(device) for ids in draw_batch())
    results = []
    for checkpointing in (False, True):
        model = build(config, gradient_checkpointing=checkpointing).to(device)
        torch.manual_seed(11)
        loss = model(tokens, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        # CUDA's attention adds up its gradients in any order.
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0 if device == "cpu" else 1e-6)


def test_dropout_acts_in_training_alone() -> None:
    model = build(dataclasses.replace(CONFIG, dropout=0.5))
    tokens, _ = draw_batch()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_longer_than_the_context_is_refused() -> None:
    model = build()
    tokens, targets = draw_batch(n_tokens=25)
    for arguments in ((tokens,), (tokens, targets)):
        with pytest.raises(ValueError, match="25 tokens are longer than the context of 24"):
            model(*arguments)


def test_initialisation_is_that_of_gpt2() -> None:
    config = ModelConfig(2000, 64, 128, 4, 8, 512)
    model = build(config)
    residual = 0.02 / (2 * config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected = 1.0 if "norm.weight" in name else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name
        else:
            back = "self_attn.o_proj" in name or "mlp.down_proj" in name
            assert parameter.std().item() == pytest.approx(residual if back else 0.02, rel=0.05)
            assert abs(parameter.mean().item()) < 1e-3
    tokens = torch.randint(0, 2000, (4, 64))
    with torch.no_grad():
        loss = model(tokens, tokens.roll(-1, 1)).item() / tokens.numel()
        assert loss == pytest.approx(7.6, abs=0.3)  # ln 2000


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation: str) -> None:
    modules = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
    }
    part = build(dataclasses.replace(CONFIG, activation=activation)).layers[0].mlp
    x = torch.randn(2, 3, CONFIG.n_embeddings)
    torch.testing.assert_close(part(x), part.down_proj(modules[activation](part.up_proj(x))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", ["nano", "small", "xl"])
def test_flops_per_token_are_those_of_the_closed_formula(size: str, training: bool) -> None:
    """6N + 12 L C T in training (Chowdhery et al. 2022, appendix B); N counts the weights that
    take part in matmuls, the tied embedding once.
    """
    config = ModelSettings(model_size=size).resolve(GPT2_VOCABULARY)
    C, L = config.n_embeddings, config.n_layers
    weights = config.vocab_size * C + L * (4 * C * C + 2 * C * config.ffn_hid_dim)
    expected = (6 if training else 2) * (weights + 2 * L * C * config.context_length)
    assert estimate_flops_per_token(config, training=training) == expected


@pytest.mark.parametrize("training", [True, False])
def test_what_a_block_drops(training: bool) -> None:
    """Where both of its parts are dropped, the input comes through: a share p * p of all places."""
    torch.manual_seed(0)
    block = Block(dataclasses.replace(CONFIG, dropout=0.5)).train(training)
    x = torch.randn(64, 16, CONFIG.n_embeddings)
    unchanged = (block(x, 0) == x).float().mean()
    assert float(unchanged) == pytest.approx(0.25 if training else 0, abs=0.02)
