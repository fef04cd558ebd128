"""Exports of random models: read back bit by bit, and computed by llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import KINDS, load, make_model

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats import gguf_export, gguf_llama_cpp, gguf_vocabulary
from preflight.formats.gguf_export import GgufExporter
from preflight.formats.gguf_import import GgufImporter
from preflight.formats.gguf_layout import Part, split_weights
from preflight.formats.proof import build_from
from preflight.formats.protocol import OutgoingModel
from preflight.models.building import build_on_meta
from preflight.models.mlp import MLP
from preflight.tokenization.characters import CharTokenizer
from preflight.tokenization.huggingface import HuggingFaceTokenizer

EXPORTER = GgufExporter()


def write(model: OutgoingModel, path: Path, quantization: str = "f32") -> Path:
    EXPORTER.check(model, quantization)
    EXPORTER.export(model, path, quantization)
    return path


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is read back counts, as where llama.cpp is not installed."""
    monkeypatch.setattr(gguf_llama_cpp, "is_installed", lambda: False)


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick comparison of tokenizers, where it is not what is tested."""
    monkeypatch.setattr("preflight.formats.proof.N_TEXTS", 50)


CASES = [
    ("gpt2", "byte"),
    ("gpt2-untied-without-bias", "bpe"),
    ("llama-ntk", "byte"),
    ("llama-tied-grouped", "bpe"),
    pytest.param("gpt2", "gpt2", marks=pytest.mark.slow),
    pytest.param("llama", "gpt2", marks=pytest.mark.slow),
    *(pytest.param(kind, "bpe", marks=pytest.mark.slow) for kind in KINDS),
]


def _gelu_of_ggml(x: torch.Tensor) -> torch.Tensor:
    """A table in fp16 (ggml-cpu/vec.h, ggml_vec_gelu_f32)."""
    table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


@pytest.mark.parametrize(("kind", "tokenizer"), CASES)
def test_llama_cpp_computes_the_same(
    kind: str, tokenizer: str, tmp_path: Path, few_texts: None
) -> None:
    model = make_model(kind, tokenizer)
    path = write(model, tmp_path / "x.gguf")
    assert EXPORTER.verify(model, path, "f32")[-1].startswith("llama.cpp: 30 of 30")

    assert model.sample is not None
    ids = model.sample[:40].tolist()
    answer = gguf_llama_cpp.ask_llama_cpp(path, [], [], ids, 24)
    assert answer is not None
    theirs = torch.from_numpy(answer.logits).log_softmax(-1)
    ours = build_from(model.config, model.weights)
    assert theirs.std() > 0.5  # a file of nearly equal logits would prove nothing
    with torch.inference_mode():
        plain = ours(torch.tensor([ids]))[0].log_softmax(-1)
        for module in ours.modules():
            if isinstance(module, MLP):
                module.activation = _gelu_of_ggml
        strict = ours(torch.tensor([ids]))[0].log_softmax(-1)
    assert float((plain - theirs).abs().max()) < 5e-3
    assert float((strict - theirs).abs().mean()) < 5e-5


@pytest.mark.parametrize("quantization", EXPORTER.quantizations)
@pytest.mark.parametrize("kind", ["gpt2-untied-without-bias", "llama-tied-grouped"])
def test_numbers_read_back_are_those_of_the_packages_own_reader(
    kind: str, quantization: str, tmp_path: Path
) -> None:
    model = make_model(kind, n_spare=3)
    path = write(model, tmp_path / "x.gguf", quantization)
    found = GgufImporter().read(path)
    reader = gguf.GGUFReader(path)
    theirs = {
        t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type)))
        for t in reader.tensors
    }
    architecture = reader.fields["general.architecture"].contents()
    ours = split_weights(found.weights, found.config, architecture)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name].reshape(weight.shape)), name
    meant = split_weights(model.weights, found.config, architecture)
    error = {n: float((meant[n] - ours[n]).abs().max() / meant[n].abs().max()) for n in ours}
    bound = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3}.get(quantization, 0.14)
    assert max(error.values()) <= bound
    assert found.origin["quantization"] == (quantization if quantization[0] == "q" else None)


@pytest.mark.parametrize(
    "quantization",
    ["q4_0", *(pytest.param(q, marks=pytest.mark.slow) for q in ("f16", "q8_0", "q5_1"))],
)
def test_rounded_models_are_proved_and_what_it_costs_is_told(
    quantization: str, tmp_path: Path, few_texts: None
) -> None:
    model = make_model("llama-tied-grouped")
    path = write(model, tmp_path / "x.gguf", quantization)
    lines = "\n".join(EXPORTER.verify(model, path, quantization))
    assert "perplexity on 199 tokens" in lines
    assert "llama.cpp: " in lines


# ---- faults -------------------------------------------------------------------------------------


def _change(patch: pytest.MonkeyPatch, name: str, change: Callable[[Any], None]) -> None:
    """Let a function of the exporter return something else."""
    honest = getattr(gguf_export, name)

    def faulty(*arguments: Any) -> Any:
        result = honest(*arguments)
        change(result)
        return result

    patch.setattr(gguf_export, name, faulty)


def _leave_out_permutation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Part, "to_file", lambda self, rows: rows)


def _flip_tie(patch: pytest.MonkeyPatch) -> None:
    _change(patch, "split_weights", lambda tensors: tensors.pop("output.weight"))


def _swap_merges(patch: pytest.MonkeyPatch) -> None:
    def swap(keys: Any) -> None:
        merges = keys["tokenizer.ggml.merges"][1]
        merges[40], merges[41] = merges[41], merges[40]

    _change(patch, "list_vocabulary", swap)


def _move_theta(patch: pytest.MonkeyPatch) -> None:
    _change(
        patch, "list_keys", lambda keys: keys.update({"llama.rope.freq_base": ("FLOAT32", 1e4)})
    )


def _move_epsilon(patch: pytest.MonkeyPatch) -> None:
    name = "llama.attention.layer_norm_rms_epsilon"
    _change(patch, "list_keys", lambda keys: keys.update({name: ("FLOAT32", 1e-6)}))


def _double_bos(patch: pytest.MonkeyPatch) -> None:
    name = "tokenizer.ggml.add_bos_token"
    _change(patch, "list_vocabulary", lambda keys: keys.update({name: ("BOOL", True)}))


def _pad_head(patch: pytest.MonkeyPatch) -> None:
    def pad_rows(tensors: Any) -> None:
        for name in ("token_embd.weight", "output.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(32, 64)])

    def pad_tokens(keys: Any) -> None:
        keys["tokenizer.ggml.tokens"][1].extend(f"[MORE{i}]" for i in range(32))
        keys["tokenizer.ggml.token_type"][1].extend([5] * 32)

    _change(patch, "split_weights", pad_rows)
    _change(patch, "list_vocabulary", pad_tokens)


def _lose_template(patch: pytest.MonkeyPatch) -> None:
    _change(
        patch, "list_keys", lambda keys: keys.update({"tokenizer.chat_template": ("STRING", "x")})
    )
    honest = gguf_export.write_file

    def faulty(path: Path, keys: Any, tensors: Any) -> None:
        del keys["tokenizer.chat_template"]
        honest(path, keys, tensors)

    patch.setattr(gguf_export, "write_file", faulty)


FAULTS = {
    fault.__name__: fault
    for fault in (
        _leave_out_permutation,
        _flip_tie,
        _swap_merges,
        _move_theta,
        _move_epsilon,
        _double_bos,
        _pad_head,
        _lose_template,
    )
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_exporter_is_caught_without_llama_cpp(
    fault: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_llama_cpp: None,
    few_texts: None,
) -> None:
    model = make_model("llama")
    fault(monkeypatch)
    path = write(model, tmp_path / "x.gguf")
    with pytest.raises(PreflightError) as caught:
        EXPORTER.verify(model, path, "f32")
    assert caught.value.code == ExitCode.CHECK_FAILED


@pytest.mark.parametrize("quantization", ["q8_0", pytest.param("f32", marks=pytest.mark.slow)])
def test_rows_in_our_order_on_both_sides_are_caught_by_llama_cpp(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_texts: None
) -> None:
    model = make_model("llama")
    for name in ("to_file", "from_file"):
        monkeypatch.setattr(Part, name, lambda self, rows: rows)
    path = write(model, tmp_path / "x.gguf", quantization)
    with pytest.raises(PreflightError, match=r"log-probabilities of llama\.cpp") as caught:
        EXPORTER.verify(model, path, quantization)
    assert caught.value.code == ExitCode.CHECK_FAILED


def test_another_way_to_split_texts_is_caught_by_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_texts: None
) -> None:
    """Digits by themselves there, and in groups of three here."""
    rows = gguf_vocabulary._PRE_TOKENIZERS
    monkeypatch.setitem(rows, "qwen2", rows["llama-bpe"])
    name = "tokenizer.ggml.pre"
    _change(monkeypatch, "list_vocabulary", lambda keys: keys.update({name: ("STRING", "qwen2")}))
    model = make_model("llama")
    path = write(model, tmp_path / "x.gguf")
    with pytest.raises(PreflightError, match=r"llama\.cpp gives other ids"):
        EXPORTER.verify(model, path, "f32")


def test_a_file_that_llama_cpp_cannot_load_is_no_export(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(write(make_model("gpt2"), path).read_bytes()[:5000])
    with pytest.raises(PreflightError, match=r"llama\.cpp cannot use it") as caught:
        gguf_llama_cpp.ask_llama_cpp(path, [], [], [1], 1)
    assert caught.value.code == ExitCode.CHECK_FAILED


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gpt2", {"activation": "gelu"}, "activation gelu"),
        ("gpt2", {"norm": "rms"}, "norm rms"),
        ("gpt2", {"qk_norm": True}, "qk_norm True"),
        ("llama", {"logit_softcap": 30.0}, "logit_softcap 30.0"),
        ("llama", {"feed_forward": "geglu"}, "feed_forward geglu"),
        ("llama", {"feed_forward": "mlp", "activation": "relu_squared"}, "feed_forward mlp"),
    ],
)
def test_a_part_that_the_format_lacks_is_named(
    kind: str, changes: dict[str, Any], named: str
) -> None:
    model = make_model(kind)
    model = replace(model, config=replace(model.config, **changes))
    with pytest.raises(PreflightError, match=named) as caught:
        EXPORTER.check(model, "f16")
    assert caught.value.code == ExitCode.CHECKPOINT


def test_numbers_beyond_f16_are_refused() -> None:
    model = make_model("gpt2")
    model.weights["layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    EXPORTER.check(model, "bf16")
    with pytest.raises(PreflightError, match="bf16"):
        EXPORTER.check(model, "f16")


def test_types_of_tokens(tmp_path: Path) -> None:
    """Special tokens are control tokens, a user's are always found in a text, others are unused."""
    path = write(make_model("gpt2", n_spare=3), tmp_path / "x.gguf")
    found = GgufImporter().read(path)
    document = json.loads(found.tokenizer.content)  # type: ignore[attr-defined]
    flags = document["added_tokens"][0]
    for token, special in (("<tool>", False), ("<|im_end|>", True)):
        i = len(document["model"]["vocab"])
        document["model"]["vocab"][token] = i
        document["added_tokens"].append(flags | {"content": token, "id": i, "special": special})
    tokenizer = HuggingFaceTokenizer(json.dumps(document).encode(), "x", "<|endoftext|>")
    model = replace(make_model("gpt2", n_spare=3), tokenizer=tokenizer)
    lines = EXPORTER.verify(model, write(model, tmp_path / "y.gguf"), "f32")
    assert any("llama.cpp: the ids" in line for line in lines)
    keys = gguf.GGUFReader(tmp_path / "y.gguf").fields
    types = keys["tokenizer.ggml.token_type"].contents()
    assert types[599:] == [3, 4, 3, 5]
    answer = gguf_llama_cpp.ask_llama_cpp(
        tmp_path / "y.gguf", ["a<tool>b<|im_end|>"], ["a<|im_end|>"], [1], 1
    )
    assert answer is not None
    assert answer.plain == [tokenizer.encode("a<tool>b<|im_end|>").tolist()]
    assert 600 in answer.plain[0]
    assert 601 not in answer.plain[0]
    assert answer.special[0][-1] == 601


def test_char_has_no_place() -> None:
    model = replace(make_model("gpt2"), tokenizer=CharTokenizer("abc"))
    with pytest.raises(PreflightError, match="byte-level"):
        EXPORTER.check(model, "f16")


def test_rows_that_are_no_multiple_of_a_block_stay_in_f16(tmp_path: Path) -> None:
    model = make_model("gpt2")
    config = replace(model.config, n_embeddings=24, n_heads=2)
    shapes = {name: w.shape for name, w in build_on_meta(config).state_dict().items()}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    path = write(replace(model, config=config, weights=weights), tmp_path / "x.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_qkv.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["position_embd.weight"] == kinds["output_norm.weight"] == "F32"
    assert load("bpe").vocab_size == 600
