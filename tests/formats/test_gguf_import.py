"""GGUF files that are read: every type of tensor, the kinds of vocabularies, and hostile ones."""

from __future__ import annotations

import importlib
import random
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import make_model

from preflight.core.errors import ExitCode, PreflightError
from preflight.formats.gguf_export import GgufExporter
from preflight.formats.gguf_header import KINDS, TENSOR_KINDS, read_header
from preflight.formats.gguf_import import GgufImporter
from preflight.formats.gguf_layout import list_keys, split_weights
from preflight.formats.gguf_library import write_file
from preflight.formats.gguf_llama_cpp import ask_llama_cpp
from preflight.formats.gguf_vocabulary import list_vocabulary
from preflight.formats.proof import build_from, build_texts
from preflight.formats.protocol import ImportedModel, OutgoingModel

IMPORTER = GgufImporter()


def write_parts(
    path: Path,
    model: OutgoingModel,
    architecture: str,
    keys: dict[str, tuple[str, Any] | None] | None = None,
    tensors: dict[str, torch.Tensor | None] | None = None,
) -> Path:
    """A file in fp32 with some keys or tensors changed, or left out where they are None."""
    known: dict[str, Any] = {
        "general.architecture": ("STRING", architecture),
        **list_keys(model.config, "llama" if architecture == "qwen2" else architecture),
        **list_vocabulary(model.tokenizer, model.config.vocab_size),
    }
    if architecture == "qwen2":
        known = {name.replace("llama.", "qwen2."): value for name, value in known.items()}
    known |= keys or {}
    content: dict[str, Any] = split_weights(model.weights, model.config, architecture)
    content |= tensors or {}
    write_file(
        path,
        {name: value for name, value in known.items() if value is not None},
        {name: ("F32", weight) for name, weight in content.items() if weight is not None},
    )
    return path


def refuse(path: Path, named: str = "") -> PreflightError:
    with pytest.raises(PreflightError, match=named) as caught:
        IMPORTER.read(path)
    assert caught.value.code == ExitCode.CHECKPOINT
    return caught.value


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [name for name in KINDS if name.endswith("_K")])
def test_k_quants_are_read_as_the_package_reads_them(kind: str, tmp_path: Path) -> None:
    model = make_model("llama", "byte")
    config = replace(model.config, n_embeddings=256, ffn_hid_dim=256, n_layers=1)
    random_bytes = np.random.default_rng(1)
    shape = (config.vocab_size, 256)
    # Bytes below 0x3c, so that scales, which are fp16, are finite and below one.
    content = random_bytes.integers(0, 0x3C, (shape[0], KINDS[kind].block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    keys = list_keys(config, "llama") | list_vocabulary(model.tokenizer, config.vocab_size)
    for name, (value_kind, value) in keys.items():
        writer.add_key_value(name, value, gguf.GGUFValueType[value_kind])
    number = gguf.GGMLQuantizationType[kind]
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, content if name[0] == "t" else content[::-1], raw_dtype=number)
    rows = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"), content[:256])
    rows |= dict.fromkeys(("ffn_gate", "ffn_up"), content[:256])
    for name, part in rows.items():
        writer.add_tensor(f"blk.0.{name}.weight", part, raw_dtype=number)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = IMPORTER.read(tmp_path / "x.gguf")
    expected = torch.from_numpy(gguf.dequantize(content, number))
    assert torch.equal(found.weights["embed_tokens.weight"], expected)
    assert torch.equal(found.weights["lm_head.weight"], expected.flip(0))
    assert not found.config.tied
    assert found.origin["quantization"] == kind.lower()


def test_sizes_of_tensors_are_those_of_the_package() -> None:
    for number, kind in TENSOR_KINDS.items():
        known = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
        assert gguf.GGMLQuantizationType(number).name == kind.name
        assert known == (kind.block_size, kind.block_bytes)


def test_a_head_beside_the_table_is_compared_with_it(tmp_path: Path) -> None:
    model = make_model("llama-tied-grouped")
    table = model.weights["embed_tokens.weight"]
    path = write_parts(tmp_path / "x.gguf", model, "llama", tensors={"output.weight": table})
    assert IMPORTER.read(path).config.tied
    head = table.clone()
    head[3, 4] += 1e-3
    found = IMPORTER.read(write_parts(path, model, "llama", tensors={"output.weight": head}))
    assert not found.config.tied
    assert torch.equal(found.weights["lm_head.weight"], head)


def _compute(found: ImportedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        model = build_from(found.config, found.weights)
        return model(torch.tensor([ids]))[0].log_softmax(-1)


def test_qwen2_with_biases_of_queries_keys_and_values_alone(tmp_path: Path) -> None:
    model = make_model("llama-bias")
    left_out = {
        f"blk.{layer}.{name}.bias": None
        for layer in range(2)
        for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    path = write_parts(tmp_path / "x.gguf", model, "qwen2", tensors=left_out)
    found = IMPORTER.read(path)
    assert not found.weights["layers.1.mlp.down_proj.bias"].any()
    name = "layers.1.self_attn.qkv_proj.bias"
    assert torch.equal(found.weights[name], model.weights[name])
    ids = list(range(5, 45))
    answer = ask_llama_cpp(path, [], [], ids, 1)
    assert answer is not None
    theirs = torch.from_numpy(answer.logits).log_softmax(-1)
    assert float((_compute(found, ids) - theirs).abs().max()) < 2e-4


# ---- vocabularies -------------------------------------------------------------------------------


def test_a_vocabulary_of_sentencepiece_gives_llama_cpps_ids(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    draw = random.Random(3)
    letters = list("\u2581abcdefghijklmnopqrstuvwxyz.,'ABCTé日本0123456789")
    pieces = dict.fromkeys(letters)
    while len(pieces) < 300:
        pieces[draw.choice([*pieces]) + draw.choice([*pieces])] = None
    longer = sorted([*pieces][len(letters) :], key=len)
    tokens += [*letters, *longer, "<tool>"]
    types += [1] * (len(letters) + len(longer)) + [4]
    scores = [0.0] * 259 + [-1000.0] * len(letters) + [-float(i) for i in range(len(longer))]
    model = make_model("llama", "byte")
    config = replace(model.config, vocab_size=len(tokens))
    weights = dict(model.weights)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(len(tokens), 64)
    model = replace(model, config=config, weights=weights)
    prefix = "tokenizer.ggml."
    keys = {
        f"{prefix}model": ("STRING", "llama"),
        f"{prefix}pre": ("STRING", "default"),
        f"{prefix}tokens": ("ARRAY", tokens),
        f"{prefix}token_type": ("ARRAY", types),
        f"{prefix}scores": ("ARRAY", [*scores, 0.0]),
        f"{prefix}merges": None,
        f"{prefix}bos_token_id": ("UINT32", 1),
        f"{prefix}eos_token_id": ("UINT32", 2),
        f"{prefix}unknown_token_id": ("UINT32", 0),
    }
    # `list_vocabulary` of the byte tokenizer has 257 ids; its own keys are replaced here.
    path = write_parts(tmp_path / "x.gguf", model, "llama", keys)
    found = IMPORTER.read(path).tokenizer
    texts = ["".join(draw.choices([*pieces, " ", "\n", "ü", "😀"], k=12)) for _ in range(300)]
    texts = [text.replace("\u2581", " ") for text in texts] + ["a<tool>b <s> </s>", " ", "  x", ""]
    answer = ask_llama_cpp(path, texts, [], [5], 1)
    assert answer is not None
    for text, theirs in zip(texts, answer.plain, strict=True):
        assert found.encode(text).tolist() == theirs, text
        # As in llama.cpp, a word after a token of the user's begins with a space.
        assert found.decode(theirs) == text.replace("<tool>", "<tool> ")
    assert found.end_of_text_id == 2


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"tokenizer.ggml.pre": ("STRING", "bloom")}, "pre-tokenizer 'bloom'"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer 'default'"),
        ({"tokenizer.ggml.model": ("STRING", "bert")}, "kind 'bert'"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.merges": ("ARRAY", ["a b c"])}, "pairs of tokens"),
        ({"tokenizer.ggml.tokens": ("ARRAY", ["a"])}, "1 tokens for the"),
        ({"tokenizer.ggml.tokens": ("ARRAY", ["a"] * 608)}, "twice"),
        ({"tokenizer.ggml.token_type": ("ARRAY", [9] * 608)}, "token_type"),
        ({"tokenizer.ggml.eos_token_id": ("UINT32", 608)}, "eos_token_id"),
        ({"general.architecture": ("STRING", "mamba")}, "'mamba'"),
        ({"llama.expert_count": ("UINT32", 8)}, "llama.expert_count is 8"),
        ({"llama.attention.sliding_window": ("UINT32", 512)}, "sliding_window is 512"),
        ({"llama.rope.scaling.type": ("STRING", "yarn")}, "rope scaling is 'yarn'"),
        ({"llama.attention.key_length": ("UINT32", 32)}, "key_length is 32"),
        ({"llama.rope.dimension_count": ("UINT32", 8)}, "dimension_count is 8"),
        ({"llama.attention.head_count": ("UINT32", 0)}, "head_count is 0"),
        ({"llama.attention.head_count": ("ARRAY", [4, 4])}, "head_count is"),
        ({"llama.attention.head_count": ("UINT32", 3)}, "n_heads 3 does not divide"),
        ({"llama.block_count": ("UINT32", 2**31)}, "block_count is 2147483648"),
        ({"llama.context_length": ("UINT32", 2**31)}, "context_length is"),
        ({"llama.rope.freq_base": ("FLOAT32", float("nan"))}, "freq_base is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon is 0.0, or missing"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(
    keys: dict[str, Any], named: str, tmp_path: Path
) -> None:
    refuse(write_parts(tmp_path / "x.gguf", make_model("llama"), "llama", keys), named)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"rope_freqs.weight": torch.ones(8)}, "'rope_freqs.weight' belongs to no part"),
        ({"blk.2.attn_q.weight": torch.ones(64, 64)}, "'blk.2.attn_q.weight' belongs to no part"),
        ({"blk.1.attn_q.weight": torch.ones(64, 32)}, "expected"),
        ({"blk.1.attn_q.weight": None}, "'blk.1.attn_q.weight' is missing"),
        ({"blk.1.attn_q.weight": torch.full((64, 64), float("inf"))}, "NaN or infinite"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tensors: dict[str, Any], named: str, tmp_path: Path
) -> None:
    refuse(write_parts(tmp_path / "x.gguf", make_model("llama"), "llama", tensors=tensors), named)


def test_the_missing_library_is_told_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parts(tmp_path / "x.gguf", make_model("llama"), "llama")

    def refuse_import(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse_import)
    with pytest.raises(PreflightError, match="pip install gguf") as caught:
        IMPORTER.read(path)
    assert caught.value.code == ExitCode.FLAGS


# ---- hostile headers ----------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _entry(name: str = "a", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return _text(name) + numbers


def _file(keys: list[bytes], entries: list[bytes], *, n_bytes: int = 96, version: int = 3) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, len(entries), len(keys))
    head += b"".join(keys) + b"".join(entries)
    return head + bytes(-len(head) % 32 + n_bytes)


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


HOSTILE = {
    "empty": (b"", "cut short"),
    "another format": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "version 1": (_file([], [], version=1), "version 1"),
    "big endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "version 50331648"),
    "counts": (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 2**63), "claims"),
    "cut": (struct.pack("<4sIQQ", b"GGUF", 3, 1, 0), "cut short"),
    "long name": (_file([struct.pack("<Q", 2**62)], []), "string claims"),
    "long array": (_file([_key("a", 9, struct.pack("<IQ", 8, 2**40))], []), "array claims"),
    "many strings": (_file([_key("a", 9, struct.pack("<IQ", 8, 2**20))], []), "cut short"),
    "many numbers": (_file([_key("a", 9, struct.pack("<IQ", 10, 2**21))], []), "cut short"),
    "nested arrays": (_file([_key("a", 9, struct.pack("<IQ", 9, 1))], []), "holds the type 9"),
    "unknown value": (_file([_key("a", 99, bytes(8))], []), "unknown type 99"),
    "two keys": (_file([_key("a", 0, b"1")] * 2, []), "given twice"),
    "not UTF-8": (_file([struct.pack("<Q", 1) + b"\xff" + bytes(8)], []), "utf-8"),
    "alignment 0": (_file([_key("general.alignment", 4, bytes(4))], []), "power of two"),
    "alignment 3": (_file([_key("general.alignment", 4, b"\3\0\0\0")], []), "power of two"),
    "two tensors": (_file([], [_entry(), _entry(offset=32)]), "same name"),
    "overlap": (_file([], [_entry(dims=(16,)), _entry("b", offset=32)]), "overlap"),
    "outside": (_file([], [_entry(dims=(25,))]), "cut short"),
    "far outside": (_file([], [_entry(offset=2**63)]), "cut short"),
    "unaligned": (_file([], [_entry(offset=8)]), "not aligned"),
    "huge": (_file([], [_entry(dims=(2**62, 2**62, 2**62, 2**62))]), "cut short"),
    "no content": (_file([], [_entry(dims=(8, 0))]), "is empty"),
    "no dimensions": (_file([], [_entry(dims=())]), "0 dimensions"),
    "five dimensions": (_file([], [_entry(dims=(1,) * 5)]), "5 dimensions"),
    "unknown tensor": (_file([], [_entry(kind=16)]), "type 16"),
    "part of a block": (_file([], [_entry(dims=(33,), kind=8)]), "rows of 32s"),
}


@pytest.mark.parametrize(("content", "named"), HOSTILE.values(), ids=HOSTILE)
def test_impossible_headers_are_refused(content: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with open(path, "rb") as file, pytest.raises(PreflightError, match=named):
        read_header(path, file)


def test_the_smallest_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    keys = [_key("t", 7, b"\2"), _key("list", 9, struct.pack("<IQ", 8, 2) + _text("é") * 2)]
    path.write_bytes(_file(keys, [_entry(), _entry("b", (2, 4), 1, 32)], version=2))
    with open(path, "rb") as file:
        header = read_header(path, file)
    assert header.keys == {"t": True, "list": ["é", "é"]}
    assert header.tensors["b"].shape == (4, 2)
    assert path.stat().st_size == header.tensors["b"].offset + 64


MUTATIONS: list[Callable[[random.Random, bytearray], None]] = []


def _mutation(function: Callable[[random.Random, bytearray], None]) -> None:
    MUTATIONS.append(function)


@_mutation
def _flip_bits(draw: random.Random, content: bytearray) -> None:
    for _ in range(draw.randrange(1, 4)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


@_mutation
def _write_numbers(draw: random.Random, content: bytearray) -> None:
    at = draw.randrange(len(content) - 8)
    value = draw.choice([0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
    content[at : at + 8] = struct.pack("<Q", value)


@_mutation
def _cut(draw: random.Random, content: bytearray) -> None:
    del content[draw.randrange(len(content)) :]


@_mutation
def _remove(draw: random.Random, content: bytearray) -> None:
    at = draw.randrange(len(content))
    del content[at : at + draw.randrange(1, 64)]


@_mutation
def _double(draw: random.Random, content: bytearray) -> None:
    at = draw.randrange(len(content))
    content[at:at] = content[at : at + draw.randrange(1, 200)]


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_end_in_an_error_or_a_whole_model(count: int, tmp_path: Path) -> None:
    draw = random.Random(5)
    exporter, path = GgufExporter(), tmp_path / "x.gguf"
    exporter.export(make_model("llama"), path, "q8_0")
    whole = path.read_bytes()
    with open(path, "rb") as file:
        header = read_header(path, file)
    n_head = min(entry.offset for entry in header.tensors.values())
    IMPORTER.read(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes = []
    for number in range(count):
        # Most in the header, which says how the rest is to be read.
        head, rest = bytearray(whole[:n_head]), bytearray(whole[n_head:])
        part = rest if number % 10 == 0 else head
        draw.choice(MUTATIONS)(draw, part)
        path.write_bytes(head + rest)
        try:
            found = IMPORTER.read(path)
        except PreflightError as error:
            assert error.code == ExitCode.CHECKPOINT, error
            codes.append(error.code)
        else:
            build_from(found.config, found.weights)
    assert len(codes) > count // 3
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 64 * 1024


def test_texts_encode_as_before_a_round_trip(tmp_path: Path) -> None:
    """What was imported is exported with the same ids: the document is translated both ways."""
    model = make_model("gpt2")
    exporter, path = GgufExporter(), tmp_path / "x.gguf"
    exporter.export(model, path, "f32")
    first = IMPORTER.read(path)
    again = OutgoingModel(first.config, first.weights, first.tokenizer, first.chat_template)
    exporter.check(again, "f32")
    exporter.export(again, tmp_path / "y.gguf", "f32")
    second = IMPORTER.read(tmp_path / "y.gguf")
    assert second.config == first.config
    for text in build_texts(model.tokenizer, 200):
        ids = model.tokenizer.encode(text).tolist()
        assert first.tokenizer.encode(text).tolist() == ids
        assert second.tokenizer.encode(text).tolist() == ids
