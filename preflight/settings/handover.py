"""The flags of `--import` and `--export`, which are modes too, and of quantisation."""

from dataclasses import dataclass

from preflight.settings.options import setting

QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@dataclass(frozen=True)
class HandoverSettings:
    """Where a model of another tool comes from, and where one of ours goes."""

    import_path: str | None = setting(
        None,
        "a Hugging Face folder, a .gguf file, or a state dict such as nanoGPT's ckpt.pt",
        metavar="PATH",
        flag="--import",
    )
    export: str | None = setting(
        None,
        "what to write: a folder for transformers and vLLM, or a .gguf file for llama.cpp",
        metavar="PATH",
    )
    quantize: str | None = setting(
        None,
        "how --export writes the weights: f32, f16 and bf16 in a folder, all but int8 in a .gguf "
        "file (unset: f16); int8: --generate and --evaluate compute with weights of 8 bits",
        choices=(*QUANTIZATIONS, "int8"),
    )
    weights_only: bool = setting(
        False, "--export writes a checkpoint of Preflight's own, without its training state"
    )
    force: bool = setting(
        False, "--export quantises weights again that were quantised otherwise before"
    )
