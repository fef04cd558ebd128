"""Signatures against sets of shingles, the binomial law and datasketch."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from datasketch import MinHash

from preflight.corpus.filtering import characters, minhash
from preflight.corpus.filtering.minhash import (
    BAND_ROWS,
    N_BANDS,
    N_PERMUTATIONS,
    SIGNATURE_BYTES,
    compute_bands,
    compute_minima,
    estimate_band_recall,
    estimate_recall,
    hash_shingles,
    sign,
)


def read(signature: bytes) -> np.ndarray:
    return np.frombuffer(signature, "<u4")


def build_pair(rng: np.random.Generator, n_common: int, n_own: int) -> tuple[np.ndarray, ...]:
    """Two sets of shingles whose Jaccard similarity is n_common / (n_common + 2 n_own)."""
    values = rng.integers(0, 2**32, n_common + 2 * n_own, dtype=np.uint32)
    return values[: n_common + n_own], np.concatenate(
        (values[:n_common], values[n_common + n_own :])
    )


def test_an_exact_signature_is_that_of_the_text_without_space_around_it() -> None:
    text = "Ünïcode \ud800 text"
    plain = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    assert sign(f"\n {text}\t\n", "exact") == sign(text, "exact") == plain
    assert sign("a b", "exact") != sign("a  b", "exact")


@pytest.mark.parametrize(
    ("text", "shingles"),
    [
        ("One, two; three four FIVE six!", ["one two three four five", "two three four five six"]),
        ("one two", ["one two"]),
        ("one", ["one"]),
        ("one two one two one two one", ["one two one two one", "two one two one two"]),
        ("नमस्ते दुनिया a b c", ["नमस्ते दुनिया a b c"]),
        ("我们在这里 ok", ["我 们 在 这 里", "们 在 这 里 ok"]),
        ("日本go語です x", ["日 本 go 語 で", "本 go 語 で す", "go 語 で す x"]),
    ],
)
def test_shingles_are_five_words_in_lower_case(text: str, shingles: list[str]) -> None:
    expected = {int(hash_shingles(shingle)[0]) for shingle in shingles}
    assert len(expected) == len(shingles)
    assert set(hash_shingles(text).tolist()) == expected


def test_shingles_of_other_words_differ() -> None:
    assert hash_shingles("ab c").tolist() != hash_shingles("a bc").tolist()
    assert hash_shingles("a b").tolist() != hash_shingles("b a").tolist()


def test_texts_without_words_are_alike_only_if_equal() -> None:
    assert sign("!!! ???", "near") == sign(" !!! ???", "near")
    assert np.count_nonzero(read(sign("!!! ???", "near")) == read(sign("...", "near"))) == 0
    assert sign("", "near") == sign(" \n", "near")


def test_windows_change_no_shingle(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{i % 37} {chr(0x4E00 + i)}," for i in range(200))
    whole = hash_shingles(text)
    monkeypatch.setattr(characters, "WINDOW", 16)
    assert hash_shingles(text).tolist() == whole.tolist()


def test_minima_are_those_of_each_permutation() -> None:
    shingles = np.random.default_rng(0).integers(0, 2**32, 1500, dtype=np.uint32)
    factors, summands = minhash._load_permutations()
    expected = [
        min((int(a) * int(x) + int(b)) % 2**32 for x in shingles)
        for a, b in zip(factors[:5, 0], summands[:5, 0], strict=True)
    ]
    assert compute_minima(shingles)[:5].tolist() == expected
    assert (factors % 2 == 1).all()
    assert len(set(factors[:, 0].tolist())) == N_PERMUTATIONS


def test_a_signature_is_the_same_on_every_machine_and_in_every_version() -> None:
    text = "The quick brown fox jumps over the lazy dog, and nobody minds it at all."
    signature = sign(text, "near")
    assert len(signature) == SIGNATURE_BYTES["near"] == 512
    assert hashlib.sha256(signature).hexdigest()[:16] == "0b18fd395177cd61"


@pytest.mark.parametrize(("n_common", "n_own"), [(100, 100), (200, 25), (400, 10), (20, 180)])
def test_the_estimate_has_the_error_of_independent_places(n_common: int, n_own: int) -> None:
    """Mean and variance against the binomial law, and against datasketch on the same sets."""
    rng, n_pairs = np.random.default_rng(n_common), 60
    similarity = n_common / (n_common + 2 * n_own)
    ours, theirs = [], []
    for _ in range(n_pairs):
        pair = build_pair(rng, n_common, n_own)
        ours.append(np.mean(compute_minima(pair[0]) == compute_minima(pair[1])))
        made = [MinHash(N_PERMUTATIONS, hashfunc=lambda value: int(value)) for _ in pair]
        for sketch, values in zip(made, pair, strict=True):
            sketch.update_batch(values.tolist())
        theirs.append(made[0].jaccard(made[1]))
    deviation = math.sqrt(similarity * (1 - similarity) / N_PERMUTATIONS)
    assert abs(np.mean(ours) - similarity) < 4 * deviation / math.sqrt(n_pairs)
    assert abs(np.mean(ours) - np.mean(theirs)) < 6 * deviation / math.sqrt(n_pairs)
    assert 0.6 * deviation < np.std(ours) < 1.4 * deviation


def test_bands_are_equal_where_their_rows_are() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(0, 2**32, N_PERMUTATIONS, dtype=np.uint32)
    for _ in range(50):
        second = np.where(rng.random(N_PERMUTATIONS) < 0.9, first, first + 1).astype(np.uint32)
        keys = compute_bands(np.stack((first, second)))
        alike = (first == second).reshape(N_BANDS, BAND_ROWS).all(axis=1)
        assert (keys[0] == keys[1]).tolist() == alike.tolist()
    same = compute_bands(np.zeros((1, N_PERMUTATIONS), np.uint32))[0]
    assert len(set(same.tolist())) == N_BANDS


@pytest.mark.parametrize("similarity", [0.6, 0.75, 0.8, 0.85, 0.95])
def test_recall_by_formula_is_that_of_random_places(similarity: float) -> None:
    rng, n = np.random.default_rng(5), 20_000
    equal = rng.random((n, N_PERMUTATIONS)) < similarity
    has_band = equal.reshape(n, N_BANDS, BAND_ROWS).all(axis=2).any(axis=1)
    found = has_band & (equal.sum(axis=1) >= 0.8 * N_PERMUTATIONS)
    for value, formula in (
        (has_band.mean(), estimate_band_recall(similarity)),
        (found.mean(), estimate_recall(similarity)),
    ):
        assert abs(value - formula) < 5 * math.sqrt(0.25 / n)
