"""Each part of a model alone, against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preflight.models.building import build_model, build_on_meta
from preflight.models.mlp import MLP
from preflight.models.ngram_mlp import HiddenLayer
from preflight.models.norms import RMSNorm
from preflight.settings import ModelConfig, ModelSettings
from preflight.settings.kinds import ACTIVATIONS, FEED_FORWARDS

torch.set_num_threads(1)
CPU = torch.device("cpu")


def make_config(family: str, **flags: Any) -> ModelConfig:
    shape: dict[str, Any] = {"n_layers": 2, "n_embeddings": 48, "n_heads": 4, "context_length": 6}
    return ModelSettings("custom", **(shape | flags), model_family=family).resolve(2000)


FAMILIES = {
    "gpt2": make_config("gpt2"),
    "llama": make_config("llama"),
    "modern": make_config("modern"),
    "mlp": make_config("mlp", n_heads=None),
    "mlp, untied": make_config("mlp", n_heads=None, tied=False),
}
every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rms_norm(eps: float, dtype: torch.dtype) -> None:
    """Computed in fp32, and rounded once, at the end."""
    torch.manual_seed(0)
    ours, theirs = RMSNorm(48, eps), nn.RMSNorm(48, eps)
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(1))
    x = (torch.randn(64, 3, 48) / 3).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    result, expected = ours(x), theirs(wide)
    exact = dtype == torch.float32
    if exact:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    else:  # another order of the sum may turn a few roundings
        assert (result != expected.to(dtype)).float().mean() < 0.01
    weights = torch.randn(64, 3, 48).to(dtype)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=1e-5 if exact else 0.01, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


ACTIVATION_FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}
GATES = {"swiglu": "silu", "geglu": "gelu_tanh", "reglu": "relu"}


def activate(name: str, x: Tensor) -> Tensor:
    formula = ACTIVATION_FORMULAS[name]
    return torch.tensor([formula(value) for value in x.flatten().tolist()]).view(x.shape)


def test_every_activation_and_gate_has_its_formula_here() -> None:
    assert set(ACTIVATION_FORMULAS) == set(ACTIVATIONS.names())
    assert set(GATES) | {"mlp"} == set(FEED_FORWARDS.names())


@pytest.mark.parametrize("name", ACTIVATION_FORMULAS)
def test_activations(name: str) -> None:
    torch.manual_seed(0)
    x = 2 * torch.randn(3, 48)
    part, hidden = (
        MLP(make_config("gpt2", activation=name)),
        HiddenLayer(make_config("mlp", n_heads=None, activation=name), 48),
    )
    expected = part.down_proj(activate(name, part.up_proj(x)))
    torch.testing.assert_close(part(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden(x), activate(name, hidden.up_proj(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    torch.manual_seed(0)
    part = FEED_FORWARDS.load(name)(make_config("gpt2", feed_forward=name))
    x = 2 * torch.randn(3, 48)
    gate, up = part.gate_up_proj(x).chunk(2, dim=-1)
    expected = part.down_proj(activate(GATES[name], gate) * up)
    torch.testing.assert_close(part(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_ngram_model_is_that_of_its_formula(tied: bool) -> None:
    """Token by token; each token of the window has its own columns in the first layer."""
    config = make_config("mlp", n_heads=None, tied=tied)
    torch.manual_seed(0)
    model = build_model(config)
    n, table = config.context_length, model.embed_tokens.weight
    tokens = torch.randint(0, 2000, (n,))
    named = dict(model.named_parameters())
    logits = model(tokens[None])[0]
    first = named["layers.0.up_proj.weight"].unflatten(1, (config.n_embeddings, n))  # F C n
    for t in range(n):
        x = named["layers.0.up_proj.bias"]
        for back in range(t + 1):
            x = x + first[:, :, n - 1 - back] @ (
                math.sqrt(config.n_embeddings) * table[tokens[t - back]]
            )
        x = named["layers.1.up_proj.weight"] @ x.tanh() + named["layers.1.up_proj.bias"]
        x = named["down_proj.weight"] @ x.tanh() + named["down_proj.bias"]
        head = table if tied else named["lm_head.weight"]
        torch.testing.assert_close(logits[t], head @ x, rtol=1e-4, atol=1e-5)


@every_family
def test_initialisation(config: ModelConfig) -> None:
    """Of a model that is built after the shapes of another, which are not initialised."""
    build_on_meta(config)
    model = build_model(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:
                is_gain = not isinstance(module, nn.Linear) and names[id(parameter)].endswith(
                    "weight"
                )
                assert torch.equal(parameter, torch.full_like(parameter, float(is_gain)))
                continue
            std = 0.02
            if config.model_family == "mlp":
                is_table = parameter.shape[0] == config.vocab_size
                std = 0.02 if is_table else parameter.shape[1] ** -0.5
            elif names[id(parameter)].endswith(("o_proj.weight", "down_proj.weight")):
                std = 0.02 / math.sqrt(2 * config.n_layers)
            assert parameter.std().item() == pytest.approx(std, rel=0.1), names[id(parameter)]
            assert abs(parameter.mean().item()) < 0.1 * std


@every_family
def test_gradient_checkpointing_computes_each_layer_again(config: ModelConfig) -> None:
    for checkpointing, expected in ((False, 1), (True, 2)):
        model = build_model(config, gradient_checkpointing=checkpointing)
        calls: list[nn.Module] = []
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda layer, _, calls=calls: calls.append(layer))
        tokens = torch.zeros((1, 4), dtype=torch.long)
        model(tokens, tokens).backward()
        assert [calls.count(layer) for layer in model.layers] == [expected] * config.n_layers


@every_family
def test_more_tokens_than_the_context_or_the_cache_are_refused(config: ModelConfig) -> None:
    model, tokens = build_model(config).eval(), torch.zeros((1, 7), dtype=torch.long)
    for arguments in ((tokens,), (tokens, tokens)):
        with pytest.raises(ValueError, match="7 tokens are longer than the context of 6"):
            model(*arguments)
    cache = model.build_cache(1, CPU, torch.float32, capacity=4)
    assert all(4 in layer.shape for layer in cache.layers)
    with pytest.raises(ValueError, match="5 tokens are more than the cache's 4"):
        model.prefill(tokens[:, :5], cache, [0], [5])
    model.prefill(tokens[:, :4], cache, [0], [4])
    with pytest.raises(ValueError, match="5 tokens are more than the cache's 4"):
        model.decode(tokens[:, 0], cache)
    assert cache.lengths == [4]
    assert model.build_cache(1, CPU, torch.float32, capacity=7).capacity == 6
