"""BLEU and ROUGE against their formulas written out, and the jackknife against leaving out."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter

import pytest
import sacrebleu

from preflight.core.errors import ExitCode, PreflightError
from preflight.evaluation.generated_text import cut_text, import_scorers, score_generated
from preflight.evaluation.intervals import find_t_quantile
from preflight.tokenization import load_tokenizer

WORDS = "the a small old dog house river walks sees under over and with green cold stone".split()


def make_pairs(n: int, seed: int) -> tuple[list[str], list[str]]:
    """References, and texts with about a third of the words changed."""
    rng = random.Random(seed)
    references = [[rng.choice(WORDS) for _ in range(rng.randrange(6, 20))] for _ in range(n)]
    texts = [
        [w if rng.random() < 0.7 else rng.choice(WORDS) for w in row] + row[:2]
        for row in references
    ]
    return [" ".join(row) for row in texts], [" ".join(row) for row in references]


def count_grams(text: str, n: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def compute_bleu(texts: list[str], references: list[str]) -> float:
    """Papineni et al. 2002, of words that spaces separate."""
    log_precision = 0.0
    for n in range(1, 5):
        both = zip(texts, references, strict=True)
        pairs = [(count_grams(t, n), count_grams(r, n)) for t, r in both]
        right = sum((a & b).total() for a, b in pairs)
        log_precision += math.log(right / sum(a.total() for a, _ in pairs)) / 4
    sizes = [sum(len(text.split()) for text in row) for row in (texts, references)]
    return 100 * math.exp(log_precision + min(0.0, 1 - sizes[1] / sizes[0]))


def compute_f(right: int, n_text: int, n_reference: int) -> float:
    return 2 * right / (n_text + n_reference)  # 2PR / (P + R)


def find_longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b, 1):
            row[j] = before[j - 1] + 1 if word == other else max(before[j], row[j - 1])
    return row[-1]


def test_figures_are_those_of_the_formulas() -> None:
    texts, references = make_pairs(25, 1)
    scores = score_generated(texts, references)
    bleu, *rouge = scores.figures
    assert bleu.value == pytest.approx(compute_bleu(texts, references))
    for n, figure in enumerate(rouge[:2], 1):
        values = []
        for text, reference in zip(texts, references, strict=True):
            a, b = count_grams(text, n), count_grams(reference, n)
            values.append(compute_f((a & b).total(), a.total(), b.total()))
        assert (figure.name, figure.value) == (f"rouge{n}", pytest.approx(sum(values) / 25))
    pairs = [(t.split(), r.split()) for t, r in zip(texts, references, strict=True)]
    values = [compute_f(find_longest_common(a, b), len(a), len(b)) for a, b in pairs]
    assert (rouge[2].name, rouge[2].value) == ("rougeL", pytest.approx(sum(values) / 25))
    for figure in scores.figures:
        assert figure.low < figure.value < figure.high
        assert (figure.n_items, figure.higher_is_better) == (25, True)
    assert "nrefs:1" in scores.signature
    assert sacrebleu.__version__ in scores.signature


def test_the_interval_of_bleu_is_that_of_leaving_each_text_out() -> None:
    texts, references = make_pairs(12, 2)
    bleu = score_generated(texts, references).figures[0]
    left = [
        compute_bleu(texts[:i] + texts[i + 1 :], references[:i] + references[i + 1 :])
        for i in range(12)
    ]
    mean = sum(left) / 12
    error = math.sqrt(11 / 12 * sum((value - mean) ** 2 for value in left))
    assert bleu.high - bleu.value == pytest.approx(find_t_quantile(11) * error)
    assert bleu.value - bleu.low == pytest.approx(find_t_quantile(11) * error)


def test_equal_texts_have_full_marks_and_empty_ones_none() -> None:
    references = ["one two three four five", "six seven eight nine ten eleven"]
    full = [f.value for f in score_generated(references, references).figures]
    assert full == pytest.approx([100, 1, 1, 1])
    none = score_generated(["", ""], references).figures
    assert [f.value for f in none] == [0, 0, 0, 0]
    single = score_generated(references[:1], references[:1]).figures[0]
    assert (single.low, single.high) == (0, 100)
    with pytest.raises(ValueError, match="1 texts against 2"):
        score_generated(["a"], references)


@pytest.mark.parametrize("package", ["sacrebleu", "rouge-score"])
def test_a_library_that_is_missing_is_told_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"sacrebleu": "sacrebleu", "rouge-score": "rouge_score.rouge_scorer"}[package]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PreflightError) as caught:
        import_scorers()
    assert caught.value.code == ExitCode.FLAGS
    assert caught.value.lines[-1] == f"pip install {package}"


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_a_text_is_cut_between_words(name: str) -> None:
    tokenizer = load_tokenizer(name)
    text = (
        5 * "The river was wide and grün, and nobody had crossed it before the bridge was built. "
    )
    n_all = len(tokenizer.encode(text))
    for n_prompt in range(24, n_all // 2, 3):
        cut = cut_text(tokenizer, text, n_prompt, n_all // 4)
        assert cut is not None
        prompt, reference = cut
        assert text.startswith(prompt + reference)
        assert reference[0] == " "
        assert len(tokenizer.encode(prompt)) <= n_prompt
        assert len(tokenizer.encode(prompt + reference)) <= n_prompt + n_all // 4
    assert cut_text(tokenizer, text, n_all, 1) is None
