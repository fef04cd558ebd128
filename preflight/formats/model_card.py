"""``README.md`` of an export: what is known of the model and its run, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from preflight import __version__
from preflight.formats.protocol import OutgoingModel
from preflight.models.cost import count_parameters

_MAX_CHARACTERS = 400  # of a line that a stranger may have written
_MAX_SCORES = 40
_ROLES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def write_card(model: OutgoingModel, quantization: str) -> str:
    """The card, in Markdown, from `OutgoingModel.facts`.

    The keys that it shows, each where it is there: ``name``, ``step``, ``training_tokens``,
    ``losses`` (nats per token by name), ``data`` (by name), ``commands``, ``scores`` (task, figure
    and value), ``origin``.
    """
    facts = model.facts
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation"),
        *("tags:", "- preflight", "---", ""),
        f"# {_clean(facts.get('name', 'A model of Preflight'))}",
        "",
        f"A language model with {count_parameters(model.config):,} parameters, trained with "
        f"Preflight {__version__}. This text is made of the run's own records.",
        "",
        *_describe_model(model, quantization),
        *_describe_run(facts),
        *_describe_scores(facts),
        *_describe_use(model),
    ]
    return "\n".join(lines) + "\n"


def _clean(text: object) -> str:
    """A text in one line, without what would end the line or a code span."""
    shown = "".join(c if c.isprintable() else " " for c in str(text)[:_MAX_CHARACTERS])
    return shown.replace("`", "'")


def _describe_model(model: OutgoingModel, quantization: str) -> Iterator[str]:
    config, tokenizer = model.config, model.tokenizer
    yield from ("## Model", "", "| | |", "|---|---|")
    rows = {
        "shape": config.label,
        "context": f"{config.context_length:,} tokens",
        "weights": _ROLES.get(quantization, quantization),
        "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} ids",
        "end of text": f"id {tokenizer.end_of_text_id}; nothing is put before a text",
        "chat template": "in tokenizer_config.json" if model.chat_template else "none",
    }
    for name, value in rows.items():
        yield f"| {name} | {_clean(value)} |"
    yield ""


def _describe_run(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Training", "", "| | |", "|---|---|")
    origin = facts.get("origin")
    if isinstance(origin, Mapping):
        kind = origin.get("quantization") or "floating-point weights"
        yield f"| began with | {_clean(origin.get('source'))} ({_clean(kind)}) |"
        yield f"| its SHA-256 | {_clean(origin.get('sha256'))} |"
    for name, key in (("steps", "step"), ("tokens seen", "training_tokens")):
        if isinstance(facts.get(key), int):
            yield f"| {name} | {facts[key]:,} |"
    for title in ("data", "losses"):
        section = facts.get(title)
        for name, value in section.items() if isinstance(section, Mapping) else ():
            if isinstance(value, bool | int | float | str):
                shown = f"{value:,}" if isinstance(value, int) else value
                shown = f"{value:.4f} nats per token" if title == "losses" else shown
                yield f"| {title}: {_clean(name)} | {_clean(shown)} |"
    yield ""
    commands = facts.get("commands")
    if isinstance(commands, list) and commands:
        yield from ("```sh", *(_clean(command) for command in commands), "```", "")


def _describe_scores(facts: Mapping[str, Any]) -> Iterator[str]:
    scores = facts.get("scores")
    if not isinstance(scores, list) or not scores:
        return
    yield from ("## Evaluation", "", "| task | figure | value |", "|---|---|---|")
    for task, figure, value in scores[:_MAX_SCORES]:
        yield f"| {_clean(task)} | {_clean(figure)} | {_clean(value)} |"
    yield ""


def _describe_use(model: OutgoingModel) -> Iterator[str]:
    yield from (
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))",
        "```",
        "",
        "The spelling of a special token in a text is read as that token here; Preflight reads it "
        "as text.",
    )
