"""Filters and duplicates, measured: rate of each on one core, agreement with datatrove.

    python benchmarks/filters.py --texts PAGES.jsonl
    python benchmarks/filters.py --texts PAGES.jsonl --datatrove VENV/bin/python
    python benchmarks/filters.py --smoke       (the project's own documents; seconds)

``--texts`` has a JSON object with the key ``text`` in each line. ``--datatrove`` is a Python that
has datatrove, spacy and nltk; they are no requirement of the project. Agreement is counted twice:
with datatrove's own words and sentences (spaCy's), where the way of splitting accounts for the
differences, and with this project's given to it, where only the rules can differ. The second is
also counted on damaged copies of the pages, so that each rule has texts to drop.

Rates are in bytes a second of CPU time, the best of several turns: other work on the machine
counts for little. ``str.split`` stands beside them as a measure of the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from preflight.corpus.filtering.expressions import build_rules, judge  # noqa: E402
from preflight.corpus.filtering.minhash import sign  # noqa: E402

RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
_DATATROVE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from datatrove.data import Document
from datatrove.pipeline import filters
from datatrove.pipeline.filters import (
    c4_filters, fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter)
if sys.argv[2] == "same":
    from preflight.corpus.filtering.c4 import count_sentences
    for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, language=None: text.split()
    c4_filters.split_into_sentences = lambda text, language=None: [""] * count_sentences(text)
made = (filters.GopherQualityFilter(), filters.GopherRepetitionFilter(),
        filters.C4QualityFilter(), filters.FineWebQualityFilter(char_duplicates_ratio=0.1))
for line in sys.stdin:
    rows = []
    for made_one in made:
        document = Document(text=json.loads(line), id="")
        try:
            verdict = made_one.filter(document)
        except ZeroDivisionError:
            verdict = False, "error"
        reason = "" if verdict is True else verdict[1]
        rows.append([reason, "" if reason else document.text])
    print(json.dumps(rows))
"""


def gather_texts(path: Path | None) -> list[str]:
    """The pages of a file, or pieces of the project's documents."""
    if path is not None:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    texts = []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        content = document.read_text(encoding="utf-8")
        texts += [content[i : i + 2000] for i in range(0, len(content), 2000)]
    return texts[:60]


def damage_texts(texts: list[str]) -> list[str]:
    """Copies that rules are there to drop, each at several degrees."""
    damaged = []
    for i, text in enumerate(texts):
        words, lines = text.split(), text.split("\n")
        some = 2 + i % 20
        damaged += [
            "\n".join(" ".join(words[k : k + some]) for k in range(0, len(words), some)),
            " ".join(word if k % some else "..." for k, word in enumerate(words)),
            " ".join(word if k % some else "12" for k, word in enumerate(words)),
            " ".join(word if k % some else "##" for k, word in enumerate(words)),
            " ".join(words[:some] * (1 + i % 40) + words),
            "\n".join(lines + lines[: 1 + i % 5]),
            "\n\n".join(lines[: 1 + i % 4] * 2 + lines),
            "\n".join(
                ("- " if k % some else "") + line[: 10 * some] for k, line in enumerate(lines)
            ),
            "\n".join(line + ("…" if k % 3 else ".") for k, line in enumerate(lines)),
            text.replace(" ", "" if i % 2 else "  ").replace("the", "{" if i % 3 else "Javascript"),
            " ".join(word[: 1 + i % 5] for word in words),
        ]
    return damaged


def measure_rate(judge_one: Callable[[str], Any], texts: list[str], n_turns: int) -> float:
    """MB/s of CPU time, of the best turn."""
    n_bytes = sum(len(text.encode()) for text in texts)
    best = float("inf")
    for _ in range(n_turns):
        began = time.process_time()
        for text in texts:
            judge_one(text)
        best = min(best, time.process_time() - began)
    return round(n_bytes / best / 1e6, 1)


def measure_rates(texts: list[str], n_turns: int) -> dict[str, float]:
    """MB/s of each rule, of all together, and of signatures."""
    found = {"str.split": measure_rate(str.split, texts, n_turns)}
    chosen = [[name] for name in RULES] + [[*RULES]]
    for names in chosen:
        rules = build_rules(names)
        label = " ".join(names) if len(names) == 1 else "all four"
        found[label] = measure_rate(lambda text, r=rules: judge(r, text, {}, len), texts, n_turns)
    for kind in ("exact", "near"):
        found[f"signature, {kind}"] = measure_rate(
            lambda text, k=kind: sign(text, k), texts, n_turns
        )
    return found


def compare(texts: list[str], python: str, split: str) -> dict[str, Any]:
    """Per rule: pages with the same decision and text; the reasons of the others.

    `split`: "own": datatrove's words and sentences; "same": this project's.
    """
    done = subprocess.run(
        [python, "-c", _DATATROVE, str(ROOT), split],
        input="".join(json.dumps(text) + "\n" for text in texts),
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    found: dict[str, Any] = {}
    for i, name in enumerate(RULES):
        rules, reasons = build_rules([name]), Counter()
        n_dropped = n_text = 0
        for text, rows in zip(texts, theirs, strict=True):
            verdict, (reason, their_text) = judge(rules, text, {}, len), rows[i]
            n_dropped += bool(reason)
            if bool(reason) != bool(verdict.reason):
                ours = verdict.reason.partition(": ")[2]
                reasons[f"{ours or 'kept'} | {reason or 'kept'}"] += 1
            elif not reason and their_text != verdict.text:
                n_text += 1
        n_other = sum(reasons.values()) + n_text
        found[name] = {
            "pages": len(texts),
            "agree": round(1 - n_other / len(texts), 4),
            "dropped_by_datatrove": n_dropped,
            "other_text": n_text,
            "reasons": dict(reasons.most_common()),
        }
    return found


def print_agreement(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in found.items():
        print(
            f"{name:20} {row['pages']:>6} pages, datatrove drops {row['dropped_by_datatrove']:>5}, "
            f"agreement {100 * row['agree']:.2f} %"
        )
        for reason, count in row["reasons"].items():
            print(f"{'':20} {count:>6} ours | theirs: {reason}")
        if row["other_text"]:
            print(f"{'':20} {row['other_text']:>6} kept with another text")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    parser.add_argument("--texts", type=Path, default=None, help="JSON lines with the key text")
    parser.add_argument("--datatrove", default=None, help="a Python that has datatrove")
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    texts = gather_texts(given.texts)
    result: dict[str, Any] = {"mb_s": measure_rates(texts, 1 if given.smoke else given.turns)}
    for name, rate in result["mb_s"].items():
        print(f"{name:20} {rate:>8.1f} MB/s")
    if given.datatrove:
        result["own_splitter"] = compare(texts, given.datatrove, "own")
        print_agreement("datatrove with its own words and sentences", result["own_splitter"])
        result["same_splitter"] = compare(texts, given.datatrove, "same")
        print_agreement("datatrove with our words and sentences", result["same_splitter"])
        result["damaged"] = compare(damage_texts(texts), given.datatrove, "same")
        print_agreement("the same on damaged pages", result["damaged"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
