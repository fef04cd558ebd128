"""Low-rank adapters: the library PEFT as the oracle, torch's count of FLOPs, and frozen weights."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from generate import generate_ids
from preflight.checkpoints.adapter_config import render_adapter_config
from preflight.checkpoints.adapters import read_peft_adapter
from preflight.core.errors import ExitCode, PreflightError
from preflight.device.runtime import Runtime
from preflight.models.base import TokenModel
from preflight.models.building import build_model, build_on_meta
from preflight.models.cost import (
    count_adapter_parameters,
    estimate_adapter_flops_per_token,
    estimate_flops_per_token,
    resolve_adapter,
)
from preflight.models.lora import (
    LoRALinear,
    add_adapters,
    derive_adapter_shapes,
    list_adapter_weights,
    list_trained_weights,
    load_adapter_weights,
    load_trained_weights,
    merge_adapter,
)
from preflight.settings import (
    ControlSettings,
    ModelConfig,
    ModelSettings,
    SamplingConfig,
    TrainingSettings,
)
from preflight.settings.finetuning import ADAPTER_TARGETS, AdapterConfig
from preflight.training.optimizers import build_optimizer
from preflight.training.plan import build_plan
from trainer import Trainer

SHAPE: dict[str, Any] = {
    "model_size": "custom",
    "n_layers": 3,
    "n_embeddings": 24,
    "n_heads": 4,
    "context_length": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"n_kv_heads": 2},
    "modern": {"logit_softcap": 20.0},
    "mlp": {"n_heads": 1},
}
ALL = AdapterConfig(3, 7.0, ADAPTER_TARGETS)
VARIANTS = [
    ALL,
    AdapterConfig(1, 0.5, ("o_proj", "up_proj")),
    AdapterConfig(40, 40.0, ("down_proj", "gate_up_proj", "up_proj")),
]
TOKENS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(5))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def make_config(family: str) -> ModelConfig:
    return ModelSettings(**(SHAPE | FAMILIES[family]), model_family=family).resolve(97)


def build_base(family: str) -> TokenModel:
    """Weights far from initialisation, so that no part is idle."""
    torch.manual_seed(0)
    model = build_model(make_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def build_adapted(family: str, adapter: AdapterConfig = ALL) -> TokenModel:
    """The same base with adapters whose B is no longer zero."""
    model = build_base(family)
    add_adapters(model, adapter)
    with torch.no_grad():
        for name, weight in list_adapter_weights(model).items():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def build_peer(family: str, adapter: AdapterConfig) -> Any:
    """The same base in PEFT's wrapper, with adapters of its own."""
    base = build_base(family)
    targets = list(resolve_adapter(base.config, adapter).targets)
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, lora_dropout=0.0
    )
    if family == "mlp":  # its last layer is called like one in a block
        config.target_modules = r"layers\..*up_proj"
    return peft.get_peft_model(base, config)


def copy_to_peer(model: TokenModel, peer: Any) -> None:
    found = peft.set_peft_model_state_dict(peer, list_adapter_weights(model))
    assert not found.unexpected_keys


def list_peer_gradients(peer: Any) -> dict[str, Tensor]:
    parameters = [(n.replace(".default", ""), p) for n, p in peer.named_parameters()]
    return {name: p.grad for name, p in parameters if p.requires_grad}


@pytest.mark.parametrize("adapter", VARIANTS, ids=lambda a: f"rank {a.rank}")
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_gradients_are_those_of_peft(family: str, adapter: AdapterConfig) -> None:
    model, peer = build_adapted(family, adapter), build_peer(family, adapter)
    copy_to_peer(model, peer)
    logits, expected = model(INPUTS), peer(INPUTS)
    torch.testing.assert_close(
        logits, expected, rtol=1e-5, atol=1e-6 * float(expected.detach().abs().max())
    )
    model(INPUTS, TARGETS).backward()
    peer(INPUTS, TARGETS).backward()
    gradients = list_peer_gradients(peer)
    layers = dict(model.named_modules())
    for name in list_adapter_weights(model):
        path, half = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        mine = getattr(layers[path], half).grad
        torch.testing.assert_close(mine, gradients.pop(name), rtol=1e-4, atol=1e-5)
    assert not gradients
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_bf16_it_is_no_further_from_fp32_than_peft(family: str) -> None:
    model, peer = build_adapted(family), build_peer(family, ALL)
    copy_to_peer(model, peer)
    exact = model(INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = model(INPUTS), peer(INPUTS)
        loss = model(INPUTS, TARGETS)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    errors = [float((x.float() - exact).detach().square().mean()) for x in (mine, theirs)]
    assert errors[0] < 1.2 * errors[1]
    loss.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)


def test_a_begins_as_in_peft_and_b_at_zero() -> None:
    base = build_base("gpt2")
    before = base(INPUTS)
    torch.manual_seed(11)
    add_adapters(base, AdapterConfig(4, 8.0, ("qkv_proj",)))
    torch.manual_seed(11)
    expected = [nn.Linear(24, 4, bias=False).weight for _ in range(3)]  # initialised as LoRA's A
    found = [m.lora_A for m in base.modules() if isinstance(m, LoRALinear)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(base(INPUTS), before)


@pytest.mark.parametrize("adapter", VARIANTS, ids=lambda a: f"rank {a.rank}")
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_adapter_on_its_base_and_not_the_base(
    family: str, adapter: AdapterConfig
) -> None:
    base, model = build_base(family), build_adapted(family, adapter)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merge_adapter(weights, list_adapter_weights(model), adapter)
    merged = copy.deepcopy(base)
    merged.load_state_dict(weights)
    torch.testing.assert_close(merged(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)
    assert (merged(INPUTS) - base(INPUTS)).abs().max() > 0.01
    peer = build_peer(family, adapter)
    copy_to_peer(model, peer)
    theirs = peer.merge_and_unload().state_dict()
    assert theirs.keys() == weights.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-6)
    changed = {n for n in weights if not torch.equal(weights[n], base.state_dict()[n])}
    assert changed == {
        n.replace("lora_A.", "").removeprefix("base_model.model.")
        for n in list_adapter_weights(model)
        if "lora_A" in n
    }


def test_an_adapter_of_zeros_changes_nothing_and_bf16_becomes_fp32() -> None:
    base, model = build_base("gpt2"), build_base("gpt2")
    add_adapters(model, ALL)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merge_adapter(weights, list_adapter_weights(model), ALL)
    assert all(torch.equal(weights[n], t) for n, t in base.state_dict().items())
    half = {name: tensor.bfloat16() for name, tensor in base.state_dict().items()}
    merge_adapter(half, list_adapter_weights(build_adapted("gpt2")), ALL)
    name = "layers.0.mlp.up_proj.weight"
    assert half[name].dtype == torch.float32
    assert half["norm.weight"].dtype == torch.bfloat16


def test_peft_and_this_read_each_others_files(tmp_path: Path) -> None:
    model = build_adapted("llama")
    adapter = resolve_adapter(model.config, ALL)
    section = {
        "rank": 3,
        "alpha": 7.0,
        "targets": list(adapter.targets),
        "base_sha256": "0" * 64,
    }
    weights = list_adapter_weights(model)
    content = render_adapter_config(adapter, {"adapter": section}, weights)
    (tmp_path / "adapter_config.json").write_bytes(content)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    base: Any = build_base("llama")
    base.prepare_inputs_for_generation = None  # PEFT wants it of whatever has CAUSAL_LM adapters
    peer: Any = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(peer.base_model(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)

    peer.save_pretrained(str(tmp_path / "theirs"))
    found, read = read_peft_adapter(tmp_path / "theirs")
    assert found == adapter
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    again = build_base("llama")
    add_adapters(again, found)
    load_adapter_weights(again, read)
    assert torch.equal(again(INPUTS), model(INPUTS))


@pytest.mark.parametrize("adapter", VARIANTS, ids=lambda a: f"rank {a.rank}")
@pytest.mark.parametrize("family", FAMILIES)
def test_formulas_are_what_torch_counts(family: str, adapter: AdapterConfig) -> None:
    config = make_config(family)
    model = build_on_meta(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    add_adapters(model, adapter)
    trained = list_adapter_weights(model)
    assert {n: tuple(p.shape) for n, p in trained.items()} == derive_adapter_shapes(shapes, adapter)
    count = count_adapter_parameters(config, adapter)
    assert count == sum(p.numel() for p in trained.values())
    groups = {group.kind: group.parameters for group in model.parameter_groups()}
    assert sum(p.numel() for p in groups["matrix"]) == count
    assert groups["embedding"] == groups["scalar"] == []

    real = build_adapted(family, adapter)
    tokens = INPUTS[:1, : config.context_length]
    counts = []
    for training in (False, True):
        # Its flash kernel computes some of the forward pass again.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = real(tokens).sum()
            if training:
                loss.backward()
        counts.append(counter.get_total_flops() // tokens.shape[1])
        assert estimate_adapter_flops_per_token(config, adapter, training=training) == counts[-1]
    assert counts[0] > estimate_flops_per_token(config, training=False)
    if adapter.rank < 8:
        assert counts[1] < estimate_flops_per_token(config)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_moves_the_adapters_alone_and_learns(
    optimizer: str, gradient_checkpointing: bool
) -> None:
    config = make_config("gpt2")
    torch.manual_seed(0)
    model = build_model(config, gradient_checkpointing=gradient_checkpointing)
    add_adapters(model, ALL)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = TrainingSettings(
        batch_size=2, max_steps=30, learning_rate=2e-2, warmup_steps=0, optimizer=optimizer
    )
    plan = build_plan(training, ControlSettings(), config.context_length, 1000, 20)
    runtime = Runtime(torch.device("cpu"), torch.float32, False, ())
    held = build_optimizer(model, training, plan.peak_learning_rate)
    trainer = Trainer(model, held, plan, runtime, skips_on_device=optimizer == "adamw")
    losses = [float(trainer.train_step(i, [(INPUTS, TARGETS)]).loss) for i in range(30)]
    assert losses[-1] < losses[0] - 0.3
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name
    optimized = [p for group in held.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in model.parameters() if p.requires_grad}
    # Weights that are being trained have no decoder of their own; generating goes through `decode`.
    cache = model.build_cache(1, torch.device("cpu"), torch.float32)
    assert model.fast_decoder(cache) is None  # type: ignore[operator]
    sampling = SamplingConfig(max_new_tokens=8, temperature=0)
    sampled = generate_ids(model, [[1, 2, 3]], sampling)
    model.requires_grad_(False)
    assert model.fast_decoder(cache) is None  # type: ignore[operator]
    weights = {n: p for n, p in before.items() if "lora_" not in n}
    weights = {n.replace("base_layer.", ""): p for n, p in weights.items()}
    merge_adapter(weights, list_adapter_weights(model), ALL)
    merged = build_model(config)
    merged.load_state_dict(weights)
    assert generate_ids(merged.requires_grad_(False), [[1, 2, 3]], sampling) == sampled


def measure_kept(model: TokenModel) -> int:
    """Bytes that one block keeps for its backward pass, besides weights."""
    kept: dict[int, int] = {}
    held = {p.data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in held:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 16, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = model.layers[1](x, 1)
    return sum(kept.values())


def test_a_block_keeps_r_channels_more_for_each_adapter_than_without() -> None:
    plain, adapted = measure_kept(build_base("gpt2")), measure_kept(build_adapted("gpt2"))
    assert adapted - plain == 4 * 3 * 32 * 4  # four layers, rank 3, 32 tokens, fp32


def test_a_target_that_no_model_has_is_refused_by_name() -> None:
    for build in (
        lambda: add_adapters(build_base("gpt2"), AdapterConfig(2, 4.0, ("gate_up_proj",))),
        lambda: count_adapter_parameters(
            make_config("gpt2"), AdapterConfig(2, 4.0, ("gate_up_proj",))
        ),
    ):
        with pytest.raises(PreflightError, match="down_proj, o_proj, qkv_proj, up_proj") as caught:
            build()
        assert caught.value.code == ExitCode.FLAGS
    base = build_base("gpt2")
    with contextlib.suppress(PreflightError):
        add_adapters(base, AdapterConfig(2, 4.0, ("gate_up_proj",)))
    assert all(p.requires_grad for p in base.parameters())


def test_weights_of_other_adapters_are_refused_and_nothing_changes() -> None:
    model = build_adapted("gpt2")
    before = {n: t.clone() for n, t in list_trained_weights(model).items()}
    other = list_adapter_weights(build_adapted("gpt2", AdapterConfig(2, 4.0, ADAPTER_TARGETS)))
    llama = list_adapter_weights(build_adapted("llama"))
    short = dict(list(before.items())[1:])
    base = dict(build_base("gpt2").state_dict())
    for wrong in (other, llama, short, {}):
        with pytest.raises(ValueError, match=r"not of this model's adapters: base_model.model"):
            load_trained_weights(model, wrong)
    assert all(torch.equal(t, before[n]) for n, t in list_trained_weights(model).items())
    for wrong in (other, llama, short):
        weights = {n: t.clone() for n, t in base.items()}
        with pytest.raises(ValueError, match=r"has no layer for|does not fit"):
            merge_adapter(weights, wrong, ALL)
        assert all(torch.equal(weights[n], t) for n, t in base.items())
    plain = build_base("llama")
    load_trained_weights(plain, list_trained_weights(build_base("llama")))
