"""A model as a GGUF file, for llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log
from preflight.formats.gguf_layout import (
    choose_architecture,
    choose_kind,
    describe_in_file,
    list_keys,
    split_weights,
)
from preflight.formats.gguf_library import Value, load_gguf, write_file
from preflight.formats.gguf_proof import prove_file
from preflight.formats.gguf_vocabulary import list_vocabulary
from preflight.formats.protocol import OutgoingModel

# ``--quantize`` and the number of the file's type (llama.h, LLAMA_FTYPE).
_FILE_TYPES = {
    "f16": 1,
    "f32": 0,
    "bf16": 32,
    "q8_0": 7,
    "q5_1": 9,
    "q5_0": 8,
    "q4_1": 3,
    "q4_0": 2,
}
_MAX_F16 = 65504.0


class GgufExporter:
    """Writes GPT-2's shape as `gpt2`, and Llama's as `llama`."""

    name = "gguf"
    quantizations = tuple(_FILE_TYPES)
    makes_folder = False

    def accepts(self, path: Path) -> bool:
        """Names that end in ``.gguf``."""
        return path.suffix == ".gguf"

    def check(self, model: OutgoingModel, quantization: str) -> None:
        """Refuse what a file cannot hold; see `Exporter.check`."""
        load_gguf()
        architecture, faults = choose_architecture(model.config)
        if faults:
            raise _build_error(f"a GGUF file of kind {architecture} has no {', no '.join(faults)}")
        try:
            list_vocabulary(model.tokenizer, model.config.vocab_size)
        except ValueError as error:
            raise _build_error(str(error)) from None
        if quantization == "f16":
            large = [n for n, w in model.weights.items() if w.abs().max() > _MAX_F16]
            if large:
                raise _build_error(
                    f"{large[0]} holds numbers above {_MAX_F16:,.0f}, which f16 lacks",
                    "use --quantize bf16",
                )

    def export(self, model: OutgoingModel, path: Path, quantization: str) -> None:
        """Write the file; see `Exporter.export`."""
        architecture, _ = choose_architecture(model.config)
        config = describe_in_file(model.config, architecture)
        tensors = {}
        for name, weight in split_weights(model.weights, config, architecture).items():
            kind = choose_kind(name, weight, quantization, config.tied)
            tensors[name] = (kind, weight)
        n_odd = sum(kind == "F16" for kind, _ in tensors.values()) if quantization != "f16" else 0
        if n_odd:
            log.warning(
                f"{n_odd} tensors stay in f16: {quantization} needs rows of a multiple of 32"
            )
        keys: dict[str, Value] = {
            "general.architecture": ("STRING", architecture),
            "general.name": ("STRING", str(model.facts.get("name") or path.stem)),
            "general.file_type": ("UINT32", _FILE_TYPES[quantization]),
            "general.quantization_version": ("UINT32", 2),
            **list_keys(config, architecture),
            **list_vocabulary(model.tokenizer, config.vocab_size),
        }
        if model.chat_template is not None:
            keys["tokenizer.chat_template"] = ("STRING", model.chat_template)
        write_file(path, keys, tensors)

    def verify(self, model: OutgoingModel, path: Path, quantization: str) -> list[str]:
        """Read the file back, and ask llama.cpp; see `Exporter.verify`."""
        return prove_file(model, path, quantization)


def _build_error(what: str, fix: str = "export to a Hugging Face folder instead") -> PreflightError:
    return PreflightError(ExitCode.CHECKPOINT, what, f"nothing was written; {fix}")
