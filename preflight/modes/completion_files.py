"""Completions as records, as a table of log-probabilities, and in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preflight.core.log import log
from preflight.core.storage import publish_file
from preflight.decoding.completions import Generation
from preflight.tokenization import Tokenizer

SEPARATOR = "-" * 40


def build_record(generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    """A completion in JSON: `score` of a beam search, and `logprobs` where they were asked for."""
    record: dict[str, Any] = {
        "text": generation.text,
        "n_tokens": generation.n_tokens,
        "finish_reason": generation.finish_reason,
    }
    if generation.score is not None:
        record["score"] = generation.score
    if generation.logprobs:
        record["logprobs"] = [
            _build_token(tokenizer, each.token, each.logprob)
            | {"alternatives": [_build_token(tokenizer, *other) for other in each.alternatives]}
            for each in generation.logprobs
        ]
    return record


def _build_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"id": token, "token": describe_token(tokenizer, token), "logprob": logprob}


def describe_token(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of a token, bytes that are not UTF-8 as ``\\xe2``; None for the end of text."""
    data = tokenizer.token_bytes(token)
    if data is None or token == tokenizer.end_of_text_id:
        return None
    return data.decode("utf-8", errors="backslashreplace")


def format_logprobs(generation: Generation, tokenizer: Tokenizer) -> str:
    """A line for each token of a completion: log-probability, token, what was most probable.

    Empty where no log-probabilities were asked for.
    """
    if not generation.logprobs:
        return ""
    lines = ["", " logprob  token  (most probable)"]
    for each in generation.logprobs:
        near = "  ".join(f"{_quote(tokenizer, i)} {at:.3f}" for i, at in each.alternatives)
        shown = _quote(tokenizer, each.token)
        lines.append(f"{each.logprob:8.3f}  {shown}" + (f"  ({near})" if near else ""))
    return "\n".join(lines) + "\n"


def _quote(tokenizer: Tokenizer, token: int) -> str:
    text = describe_token(tokenizer, token)
    return "end of text" if text is None else json.dumps(text, ensure_ascii=False)


def save_completions(
    path: Path,
    prompts: list[str],
    done: Mapping[int, Generation],
    n_sequences: int,
    tokenizer: Tokenizer,
) -> None:
    """Publish the finished completions, in the order of the prompts."""
    suffix = path.suffix.lower()
    records = [
        {"prompt": prompts[i], "sequence": i % n_sequences} | build_record(done[i], tokenizer)
        for i in sorted(done)
    ]
    if suffix == ".json":
        content = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    elif suffix == ".jsonl":
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        content = f"\n{SEPARATOR}\n".join(
            f"{prompts[i]}{done[i].text}\n{format_logprobs(done[i], tokenizer)}"
            for i in sorted(done)
        )
    with publish_file(path, len(data := content.encode())) as file:
        file.write(data)
    log.info(f"{len(records):,} completions in {path}")
