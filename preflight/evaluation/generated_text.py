"""BLEU and ROUGE of generated continuations against those that the held-out text has.

BLEU comes from sacrebleu (Post 2018) with its signature, ROUGE from rouge-score (Lin 2004). Both
count words that two texts share: a continuation may be good and share few, so that the figures
compare models on the same texts and say little alone. ROUGE knows the letters a to z and digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preflight.core.libraries import import_library
from preflight.evaluation.intervals import find_t_quantile, mean_interval
from preflight.evaluation.items import Figure
from preflight.tokenization import Tokenizer

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")
_NEEDED_FOR = "the score of generated text"


@dataclass(frozen=True)
class GeneratedTextScores:
    """BLEU (0 to 100) and ROUGE-1, -2, -L (F measure, 0 to 1), and sacrebleu's signature."""

    figures: tuple[Figure, ...]
    signature: str


def import_scorers() -> tuple[Any, Any]:
    """sacrebleu and rouge_score.rouge_scorer.

    Raises:
        PreflightError: code FLAGS, when one is not installed, with the pip command. Call it before
            anything is generated.
    """
    return (
        import_library("sacrebleu", "sacrebleu", _NEEDED_FOR),
        import_library("rouge_score.rouge_scorer", "rouge-score", _NEEDED_FOR),
    )


def cut_text(
    tokenizer: Tokenizer, text: str, prompt_tokens: int, new_tokens: int
) -> tuple[str, str] | None:
    """A prompt of about so many tokens, and what follows in the text; None for a short text.

    The prompt ends before a white space where its second half has one, since a word is seldom cut
    as a tokenizer cuts it.
    """
    ids = tokenizer.encode(text)[: prompt_tokens + new_tokens]
    if len(ids) < prompt_tokens + new_tokens:
        return None
    whole = tokenizer.decode(ids)
    prompt = tokenizer.decode(ids[:prompt_tokens]).rstrip("\N{REPLACEMENT CHARACTER}")
    end = max(prompt.rfind(space) for space in " \n")
    if end > len(prompt) // 2:
        prompt = prompt[:end]
    reference = whole[len(prompt) :].rstrip("\N{REPLACEMENT CHARACTER}")
    return (prompt, reference) if prompt.strip() and reference.strip() else None


def score_generated(texts: Sequence[str], references: Sequence[str]) -> GeneratedTextScores:
    """The figures of generated `texts`, each against the reference at its place.

    Raises:
        PreflightError: code FLAGS, when sacrebleu or rouge-score is not installed.
        ValueError: the numbers differ, or there is none.
    """
    if len(texts) != len(references) or not texts:
        raise ValueError(f"{len(texts)} texts against {len(references)} references")
    sacrebleu, rouge_scorer = import_scorers()
    bleu, signature = _score_bleu(sacrebleu, texts, references)
    scorer = rouge_scorer.RougeScorer(list(ROUGE_NAMES), use_stemmer=False)
    rows = [scorer.score(r, t) for t, r in zip(texts, references, strict=True)]
    rouge = []
    for name in ROUGE_NAMES:
        values = [row[name].fmeasure for row in rows]
        low, high = mean_interval(values)
        mean = sum(values) / len(values)
        rouge.append(Figure(name, mean, max(low, 0.0), min(high, 1.0), len(values), True))
    return GeneratedTextScores((bleu, *rouge), signature)


def _score_bleu(
    sacrebleu: Any, texts: Sequence[str], references: Sequence[str]
) -> tuple[Figure, str]:
    """Corpus BLEU with the jackknife's interval (Efron & Tibshirani 1993, chapter 11)."""
    metric = sacrebleu.metrics.BLEU()
    whole = metric.corpus_score(list(texts), [list(references)])
    signature = str(metric.get_signature())
    # BLEU is a function of sums over the texts, so that one text is left out by subtraction.
    parts_metric = sacrebleu.metrics.BLEU(effective_order=True)
    parts = [
        parts_metric.sentence_score(text, [reference])
        for text, reference in zip(texts, references, strict=True)
    ]

    def leave_out(part: Any) -> float:
        found = metric.compute_bleu(
            correct=[a - b for a, b in zip(whole.counts, part.counts, strict=True)],
            total=[a - b for a, b in zip(whole.totals, part.totals, strict=True)],
            sys_len=whole.sys_len - part.sys_len,
            ref_len=whole.ref_len - part.ref_len,
            smooth_method=metric.smooth_method,
            max_ngram_order=metric.max_ngram_order,
        )
        return float(found.score)

    n = len(texts)
    if n == 1:
        return Figure("bleu", float(whole.score), 0.0, 100.0, 1, True), signature
    left = [leave_out(part) for part in parts]
    mean = sum(left) / n
    error = math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left))
    half = find_t_quantile(n - 1) * error
    low, high = max(whole.score - half, 0.0), min(whole.score + half, 100.0)
    return Figure("bleu", float(whole.score), low, high, n, True), signature
