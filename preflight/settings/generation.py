"""The flags of `--generate`."""

from dataclasses import dataclass
from pathlib import Path

from preflight.settings.options import setting

OUTPUT_SUFFIXES = (".json", ".jsonl", ".txt")


def _check_output_file(name: str) -> str:
    if "\0" in name or Path(name).suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"must end in {', '.join(OUTPUT_SUFFIXES)}")
    return name


def _check_prompt(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


@dataclass(frozen=True)
class GenerationSettings:
    """The checkpoint, the prompts, and where completions go."""

    checkpoint_path: str | None = setting(
        None,
        "checkpoint to generate from (its folder, or a file in it); unset: the best in "
        "--output-dir",
        metavar="PATH",
    )
    prompts: tuple[str, ...] = setting(
        (),
        'prompts to complete; "" starts a new text; unset: asked for on a terminal, else what a '
        "pipe brings, as one prompt",
        metavar="TEXT",
        check=_check_prompt,
    )
    prompts_file: str | None = setting(
        None, 'file of prompts, one per line; .jsonl: objects with a "prompt" key', metavar="FILE"
    )
    chat: bool = setting(
        False, "talk with the model: every line is a message, on a terminal or from a pipe"
    )
    system_prompt: str | None = setting(
        None, "the system message that --chat begins with", metavar="TEXT", check=_check_prompt
    )
    num_return_sequences: int = setting(1, "completions per prompt", ge=1, le=100_000)
    generation_batch_size: int = setting(
        8,
        "sequences generated at once; in fp32 completions do not depend on it",
        ge=1,
        le=65_536,
    )
    output_file: str | None = setting(
        None,
        "write the completions to this file, as .json, .jsonl or .txt by its suffix",
        metavar="FILE",
        check=_check_output_file,
    )
    overwrite: bool = setting(False, "replace an --output-file that exists already")
    replace_unknown: bool = setting(
        False, "replace characters of a prompt that a char tokenizer does not know; else refuse it"
    )
    interactive: bool | None = setting(
        None,
        "read prompts from the keyboard; unset: on a terminal, without --output-file, with up "
        "to 5 prompts",
    )
