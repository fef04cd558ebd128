"""Hugging Face folders against transformers: logits, ids, seeded faults, and the round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from formats.shapes import GPT2, LLAMA, TEMPLATE, draw_model, train_bpe
from safetensors.torch import load_file, save_file

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats import hf_export, proof, tokenizer_export, transformers_check
from preflight.formats.hf_export import HuggingFaceExporter, round_model
from preflight.formats.hf_import import HuggingFaceImporter
from preflight.formats.model_card import write_card
from preflight.formats.proof import build_from, draw_ids, prove_equal
from preflight.formats.protocol import ImportedModel, OutgoingModel
from preflight.formats.tokenizer_export import build_tokenizer_json, list_merges
from preflight.settings import ModelConfig
from preflight.tokenization import load_tokenizer
from preflight.tokenization.characters import CharTokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2_SHAPE = {"vocab_size": 260, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
THEIRS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: build("GPT2", **GPT2_SHAPE),
    "gpt2 untied": lambda: build(
        "GPT2",
        **GPT2_SHAPE,
        tie_word_embeddings=False,
        activation_function="relu2",
        layer_norm_epsilon=1e-3,
        n_inner=50,
    ),
    "llama": lambda: build(
        "Llama",
        **SHAPE,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        rms_norm_eps=1e-3,
    ),
    "llama tied with biases": lambda: build(
        "Llama",
        **SHAPE,
        tie_word_embeddings=True,
        attention_bias=True,
        hidden_act="gelu_pytorch_tanh",
    ),
    "llama stretched": lambda: build("Llama", **SHAPE, rope_parameters=LINEAR),
    "mistral": lambda: build("Mistral", **SHAPE, num_key_value_heads=2, sliding_window=None),
    "qwen2": lambda: build("Qwen2", **SHAPE, num_key_value_heads=1),
}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof reads 3,000; here the same faults show in a tenth of them."""
    monkeypatch.setattr(proof, "N_TEXTS", 300)


def build(family: str, **shape: Any) -> Any:
    """A model of transformers with drawn weights."""
    config = getattr(transformers, f"{family}Config")(**shape)
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(3)
    model = getattr(transformers, head)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    document = build_tokenizer_json(load_tokenizer("byte"))
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def compare(theirs: Any, ours: ImportedModel | OutgoingModel) -> float:
    ids = draw_ids(ours.config)
    with torch.no_grad():
        return float((theirs(ids).logits - build_from(ours.config, ours.weights)(ids)).abs().max())


@pytest.mark.parametrize("kind", THEIRS)
def test_an_import_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    theirs = THEIRS[kind]()
    found = HuggingFaceImporter().read(save(theirs, tmp_path))
    assert compare(theirs, found) < 1e-5
    assert found.chat_template is None
    assert found.tokenizer.encode("hi").tolist() == [104, 105]
    assert found.origin["quantization"] is None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_parts_are_joined(kind: str, tmp_path: Path) -> None:
    theirs = THEIRS[kind]()
    save(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    found = HuggingFaceImporter().read(tmp_path / "config.json")
    assert compare(theirs, found) < 1e-5


def test_names_and_buffers_of_older_files(tmp_path: Path) -> None:
    """Without the head's prefix, with masks, a copy of the table, and bf16."""
    theirs = THEIRS["gpt2"]()
    save(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): t.bfloat16() for name, t in tensors.items()}
    old |= {"lm_head.weight": old["wte.weight"].clone(), "h.0.attn.bias": torch.ones(64, 64)}
    save_file(old, tmp_path / "model.safetensors")
    found = HuggingFaceImporter().read(tmp_path)
    assert found.config.tied
    assert {weight.dtype for weight in found.weights.values()} == {torch.bfloat16}
    assert compare(theirs.bfloat16().float(), found) < 1e-5


def test_a_head_that_contradicts_the_flag_is_refused(tmp_path: Path) -> None:
    save(THEIRS["gpt2"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PreflightError, match="another matrix"):
        HuggingFaceImporter().read(tmp_path)


@pytest.mark.parametrize("place", ["config", "list", "file"])
def test_the_chat_template_comes_along(place: str, tmp_path: Path) -> None:
    save(THEIRS["gpt2"](), tmp_path)
    content: Any = TEMPLATE
    if place == "list":
        content = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        text = json.dumps({"chat_template": content})
        (tmp_path / "tokenizer_config.json").write_text(text)
    assert HuggingFaceImporter().read(tmp_path).chat_template == TEMPLATE


# ---- export -------------------------------------------------------------------------------------

ALPHABET = CharTokenizer("".join(sorted({*"abcdefghij klmnop\n\u00e9\U0001f600"})))


def vary(config: ModelConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(config, **changes)


EXPORTS: dict[str, tuple[ModelConfig, Any]] = {
    "gpt2": (GPT2, train_bpe),
    "gpt2 without biases, untied": (
        vary(GPT2, bias=False, tied=False, activation="relu_squared"),
        lambda: load_tokenizer("byte"),
    ),
    "gpt2 padded": (vary(GPT2, vocab_size=384, activation="gelu"), lambda: load_tokenizer("byte")),
    "llama": (LLAMA, train_bpe),
    "llama tied, stretched": (
        vary(LLAMA, tied=True, bias=True, rope_scaling="linear", rope_factor=3.0),
        lambda: ALPHABET,
    ),
    "llama by ntk": (
        vary(LLAMA, rope_scaling="ntk", rope_factor=2.0, feed_forward="reglu", n_kv_heads=None),
        lambda: load_tokenizer("byte"),
    ),
}


def export(model: OutgoingModel, folder: Path, quantization: str = "f32") -> Path:
    exporter = HuggingFaceExporter()
    exporter.check(model, quantization)
    exporter.export(model, folder, quantization)
    return folder


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    config, tokenizer = EXPORTS[kind]
    model = draw_model(config, tokenizer(), template=TEMPLATE)
    export(model, tmp_path)
    lines = HuggingFaceExporter().verify(model, tmp_path, "f32")
    assert any("greedy tokens are equal" in line for line in lines)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert compare(theirs, model) < 1e-5


@pytest.mark.parametrize("quantization", ["f16", "bf16"])
def test_a_round_trip_is_bit_equal_to_what_was_meant(quantization: str, tmp_path: Path) -> None:
    model = dataclasses.replace(draw_model(LLAMA), sample=draw_ids(LLAMA)[0])
    export(model, tmp_path, quantization)
    found = HuggingFaceImporter().read(tmp_path)
    meant = round_model(model, quantization)
    assert len(prove_equal(meant, found)) == 5
    assert found.weights["norm.weight"].dtype == {"f16": torch.float16}.get(
        quantization, torch.bfloat16
    )
    lines = HuggingFaceExporter().verify(model, tmp_path, quantization)
    assert any(line.startswith("perplexity on 63 tokens") for line in lines)
    again = tmp_path / "again"
    again.mkdir()
    export(dataclasses.replace(meant, tokenizer=found.tokenizer), again, quantization)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (vary(GPT2, qk_norm=True, norm="rms"), "qk_norm True"),
        (vary(GPT2, logit_softcap=30.0), "logit_softcap 30.0"),
        (vary(GPT2, n_kv_heads=2), "n_kv_heads 2"),
        (vary(LLAMA, norm="layer"), "norm layer"),
        (vary(LLAMA, feed_forward="mlp"), "feed_forward mlp"),
        (ModelConfig(257, 16, 8, 1, 1, 16, "tanh", model_family="mlp"), "model_family mlp"),
    ],
)
def test_what_transformers_lacks_is_refused_by_name(config: ModelConfig, named: str) -> None:
    with pytest.raises(PreflightError, match=named) as caught:
        HuggingFaceExporter().check(draw_model(config), "f16")
    assert caught.value.code == ExitCode.CHECKPOINT


def test_values_that_f16_does_not_hold_are_refused() -> None:
    model = draw_model(GPT2)
    model.weights["norm.bias"][0] = 1e6
    with pytest.raises(PreflightError, match="has values above"):
        HuggingFaceExporter().check(model, "f16")
    HuggingFaceExporter().check(model, "bf16")


# ---- seeded faults ------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_tie(folder: Path) -> None:
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    edit(folder / "config.json", tie_word_embeddings=not tied)


def swap_merges(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    merges = document["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def double_bos(folder: Path) -> None:
    """The tokenizer puts before each text what the template has already."""
    end = {"id": "<|endoftext|>", "type_id": 0}
    process = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": end}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {
                "id": "<|endoftext|>",
                "ids": [json.loads((folder / "config.json").read_text())["eos_token_id"]],
                "tokens": ["<|endoftext|>"],
            }
        },
    }
    edit(folder / "tokenizer.json", post_processor=process)


def pad_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name in ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"):
            tensors[name] = torch.cat((tensor, torch.zeros(8, tensor.shape[1])))
            rows = len(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    edit(folder / "config.json", vocab_size=rows)


def move_theta(folder: Path) -> None:
    edit(folder / "config.json", rope_theta=1e4)


def move_eps(folder: Path) -> None:
    edit(folder / "config.json", rms_norm_eps=1e-5)


def swap_queries(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32).contiguous()
    save_file(tensors, folder / "model.safetensors")


def end_elsewhere(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=0)


FAULTS = (
    *(flip_tie, swap_merges, double_bos, pad_head, move_theta, move_eps, swap_queries),
    end_elsewhere,
)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_seeded_fault_is_caught(
    fault: Callable[[Path], None], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our own reading alone, where transformers is not installed."""
    monkeypatch.setattr(hf_export, "ask_transformers", lambda *_: [])
    model = draw_model(vary(LLAMA, tied=tied), train_bpe(), template="{{ bos_token }}" + TEMPLATE)
    export(model, tmp_path)
    HuggingFaceExporter().verify(model, tmp_path, "f32")
    fault(tmp_path)
    with pytest.raises(PreflightError) as caught:
        HuggingFaceExporter().verify(model, tmp_path, "f32")
    assert caught.value.code == ExitCode.CHECK_FAILED


@pytest.mark.parametrize("fault", [swap_merges, double_bos, move_theta, move_eps, swap_queries])
def test_transformers_alone_catches_what_it_computes_with(
    fault: Callable[[Path], None], tmp_path: Path
) -> None:
    """A fault of the writer and of the reader alike would be seen by the other engine."""
    model = draw_model(LLAMA, train_bpe())
    export(model, tmp_path)
    fault(tmp_path)
    if fault is swap_merges:  # of merges that do not meet, no text shows the order
        document = json.loads((tmp_path / "tokenizer.json").read_text())
        document["model"]["merges"].reverse()
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(PreflightError) as caught:
        transformers_check.ask_transformers(model, tmp_path)
    assert caught.value.code == ExitCode.CHECK_FAILED


def test_merges_that_were_recovered_in_a_wrong_order_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the writer that the file alone does not show."""
    pairs = list_merges(train_bpe())
    merges = pairs.merges[:-2] + pairs.merges[:-3:-1]
    monkeypatch.setattr(
        tokenizer_export, "list_merges", lambda _: dataclasses.replace(pairs, merges=merges)
    )
    model = draw_model(LLAMA, train_bpe())
    export(model, tmp_path)
    with pytest.raises(PreflightError, match="order of their ids"):
        HuggingFaceExporter().verify(model, tmp_path, "f32")


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("weights", "the weights embed_positions"),
        ("missing", "bias is missing"),
        ("template", "the chat template differs"),
        ("config", "norm_eps is 2e-05"),
    ],
)
def test_each_part_is_compared_by_itself(part: str, told: str, tmp_path: Path) -> None:
    """A weight that no logit depends on, too: the position after all that are computed."""
    model = draw_model(vary(GPT2, context_length=100))
    export(model, tmp_path)
    found = HuggingFaceImporter().read(tmp_path)
    weights, changes = dict(found.weights), {}
    if part == "weights":
        weights["embed_positions.weight"] = weights["embed_positions.weight"].clone()
        weights["embed_positions.weight"][99, 0] += 1e-6
    elif part == "missing":
        del weights["norm.bias"]
    elif part == "template":
        changes = {"chat_template": "x"}
    else:
        changes = {"config": vary(found.config, norm_eps=2e-5)}
    with pytest.raises(PreflightError, match=told):
        prove_equal(model, dataclasses.replace(found, weights=weights, **changes))


def test_a_template_that_doubles_the_first_token_is_caught(tmp_path: Path) -> None:
    model = draw_model(LLAMA, template="{{ bos_token }}{{ bos_token }}" + TEMPLATE)
    export(model, tmp_path)
    with pytest.raises(PreflightError, match="twice"):
        HuggingFaceExporter().verify(model, tmp_path, "f32")


# ---- the model card -----------------------------------------------------------------------------


def test_the_card_says_what_the_run_recorded() -> None:
    model = draw_model(
        GPT2,
        name="my run",
        step=1000,
        training_tokens=12_345,
        losses={"val_loss": 1.5},
        data={"train_tokens": 99_000},
        commands=["python main.py --train"],
        scores=[("own-pages", "bits_per_byte", "1.2 (1.1 to 1.3)")],
        origin={"source": "x", "sha256": "ab", "quantization": "q4_1"},
    )
    card = write_card(model, "f16")
    for text in ("# my run", "1,000", "12,345", "1.5000 nats", "99,000", "--train", "1.2 (1.1"):
        assert text in card
    assert "began with | x (q4_1)" in card
    hostile = write_card(draw_model(GPT2, name="a\n# b", commands=["```\nx"]), "f16")
    assert "\n# b" not in hostile
    assert hostile.count("```") == 4
