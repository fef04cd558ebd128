"""Copies against sets and all pairs; an index that was cut against the one that was not."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.filtering import duplicates, slots
from preflight.corpus.filtering.duplicates import (
    DuplicateIndex,
    estimate_bytes,
    estimate_capacity,
)
from preflight.corpus.filtering.minhash import estimate_recall, hash_shingles, sign
from preflight.corpus.filtering.slots import SlotTable


def find_all(folder: Path, kind: str, signatures: list[bytes], size: int = 7) -> list[int]:
    """What an index finds that takes `size` documents a call."""
    index = DuplicateIndex.open(folder, kind)
    found = []
    for start in range(0, len(signatures), size):
        found += index.find(signatures[start : start + size])
    index.close()
    return found


def find_plainly(texts: list[str]) -> list[int]:
    """Exact copies, by a dictionary."""
    first: dict[str, int] = {}
    found = []
    for number, text in enumerate(texts):
        found.append(first.setdefault(text.strip(), number))
    return [copied if copied < number else -1 for number, copied in enumerate(found)]


def write_words(rng: np.random.Generator, n: int) -> list[str]:
    return [f"w{number}" for number in rng.integers(0, 10**6, n)]


def build_near_copies(n_groups: int = 40, n_words: int = 200) -> list[str]:
    """Texts, each followed by copies with more and more words exchanged."""
    rng, texts = np.random.default_rng(11), []
    for _ in range(n_groups):
        words = write_words(rng, n_words)
        texts.append(" ".join(words))
        for n_changed in (1, 2, 4, 6, 9, 15):
            copy = list(words)
            for place in rng.choice(n_words, n_changed, replace=False):
                copy[place] = "x" + copy[place]
            texts.append(" ".join(copy))
    return texts


def measure_similarity(first: str, second: str) -> float:
    """The Jaccard similarity of the shingles."""
    one, two = set(hash_shingles(first).tolist()), set(hash_shingles(second).tolist())
    return len(one & two) / len(one | two)


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_exact_copies_are_those_of_a_dictionary(numbers: list[int], size: int) -> None:
    texts = [f"text {number}" + " " * (number % 2) for number in numbers]
    with tempfile.TemporaryDirectory() as folder:
        found = find_all(Path(folder), "exact", [sign(text, "exact") for text in texts], size)
    assert found == find_plainly(texts)


def test_many_exact_copies(tmp_path: Path) -> None:
    """The table grows several times, and nothing is lost or made up."""
    rng = np.random.default_rng(1)
    texts = [str(number) for number in rng.integers(0, 15_000, 20_000)]
    found = find_all(tmp_path, "exact", [sign(text, "exact") for text in texts], 1000)
    assert found == find_plainly(texts)


def test_near_copies_have_the_recall_of_the_formula(tmp_path: Path) -> None:
    texts = build_near_copies()
    found = find_all(tmp_path, "near", [sign(text, "near") for text in texts])
    expected = n_found = variance = 0.0
    for number, text in enumerate(texts):
        original = number - number % 7
        if number == original:
            assert found[number] == -1
            continue
        similarity = measure_similarity(texts[original], text)
        recall = estimate_recall(similarity)
        expected, variance = expected + recall, variance + recall * (1 - recall)
        n_found += found[number] == original
        if found[number] >= 0:
            assert original <= found[number] < number
            assert measure_similarity(texts[found[number]], text) > 0.65  # 4 deviations below 0.8
    assert abs(n_found - expected) < 4 * variance**0.5 + 1
    assert 80 < expected < 200  # both found and missed ones are in the set


def test_what_is_no_copy_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    texts = [" ".join(write_words(rng, 100)) for _ in range(300)]
    assert find_all(tmp_path, "near", [sign(text, "near") for text in texts]) == [-1] * 300


def test_a_dropped_document_is_compared_with_no_longer(tmp_path: Path) -> None:
    """B copies A and C copies B, but not A: B goes, C stays."""
    a = np.arange(128, dtype="<u4")
    b, c = a.copy(), a.copy()
    b[110:] += 1000  # 110 of 128 places are those of A
    c[92:] += 1000  # 92 of A, 110 of B
    rows = [row.tobytes() for row in (a, b, c)]
    assert find_all(tmp_path, "near", rows) == [-1, 0, -1]


@pytest.mark.parametrize(("n_equal", "copied"), [(102, -1), (103, 0)])
def test_a_copy_has_four_fifths_of_the_places(tmp_path: Path, n_equal: int, copied: int) -> None:
    first = np.arange(128, dtype="<u4")
    second = np.where(np.arange(128) < n_equal, first, first + 1000).astype("<u4")
    assert find_all(tmp_path, "near", [first.tobytes(), second.tobytes()]) == [-1, copied]


def test_a_chance_hit_of_the_table_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """112 of 128 places are equal, but no band: only chance could propose it."""
    first = np.arange(128, dtype="<u4")
    second = np.where(np.arange(128) % 8 > 0, first, first + 1000).astype("<u4")
    index = DuplicateIndex.open(tmp_path, "near")
    index.find([first.tobytes()])
    monkeypatch.setattr(DuplicateIndex, "propose", lambda index, keys: [{0} for _ in keys])
    assert index.find([second.tobytes(), first.tobytes()]) == [-1, 0]
    index.close()


def test_the_first_of_several_is_named(tmp_path: Path) -> None:
    a = np.arange(128, dtype="<u4")
    b = np.where(np.arange(128) < 98, a, a + 1000).astype("<u4")  # no copy of A
    c = np.where(np.arange(128) < 113, a, a + 1000).astype("<u4")  # a copy of both
    rows = [row.tobytes() for row in (b, a, c)]
    assert find_all(tmp_path, "near", rows, 1) == [-1, -1, 0]


def build_template(n: int) -> list[bytes]:
    """Documents with one equal band, and no copies of each other, but for every tenth."""
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 2**32, (n, 128), dtype=np.uint32)
    rows[:, :8] = 7
    rows[9::10] = rows[4:-5:10]
    return [row.astype("<u4").tobytes() for row in rows]


@pytest.mark.parametrize("kind", ["near", "template", "exact"])
@pytest.mark.parametrize("size", [1, 13, 500])
def test_calls_of_any_size_find_the_same(tmp_path: Path, kind: str, size: int) -> None:
    if kind == "template":
        signatures, kind = build_template(200), "near"
    else:
        signatures = [sign(text, kind) for text in build_near_copies(20, 60)]
        signatures += signatures[::3]
    (tmp_path / "whole").mkdir()
    whole = find_all(tmp_path / "whole", kind, signatures, len(signatures))
    assert sum(number >= 0 for number in whole) > 15
    assert find_all(tmp_path, kind, signatures, size) == whole


def test_a_band_that_many_share_is_bounded(tmp_path: Path) -> None:
    signatures = build_template(100)
    index = DuplicateIndex.open(tmp_path, "near")
    index.find(signatures)
    filed = [int(index.read_record(number)["filed"]) & 1 for number in range(100)]
    kept = [int(index.read_record(number)["copy_of"]) < 0 for number in range(100)]
    assert sum(filed) == duplicates.MAX_ALIKE
    assert [mark for mark, is_kept in zip(filed, kept, strict=True) if is_kept][:32] == [1] * 32
    index.close()


@pytest.mark.parametrize("kind", ["near", "template", "exact"])
@pytest.mark.parametrize("n_kept", [0, 1, 50, 149])
def test_a_killed_index_continues_as_if_it_was_not(tmp_path: Path, kind: str, n_kept: int) -> None:
    if kind == "template":
        signatures, kind = build_template(150), "near"
    else:
        signatures = [sign(text, kind) for text in build_near_copies(20, 60)] * 2
    whole_folder, cut_folder = tmp_path / "whole", tmp_path / "cut"
    whole_folder.mkdir()
    cut_folder.mkdir()
    whole = find_all(whole_folder, kind, signatures)
    index = DuplicateIndex.open(cut_folder, kind)
    index.find(signatures[: n_kept + 1])  # one more than was recorded
    index.sync()
    index.close()
    path = cut_folder / f"signatures-{kind}.bin"
    with open(path, "ab") as file:
        file.write(b"part of a record")
    index = DuplicateIndex.open(cut_folder, kind, n_kept)
    assert index.n_documents == n_kept
    assert index.find(signatures[n_kept:]) == whole[n_kept:]
    index.close()
    assert path.read_bytes() == (whole_folder / path.name).read_bytes()


def test_a_file_that_lacks_documents_is_refused(tmp_path: Path) -> None:
    find_all(tmp_path, "exact", [sign(str(i), "exact") for i in range(5)])
    with pytest.raises(PreflightError, match="5 documents, 6 expected") as caught:
        DuplicateIndex.open(tmp_path, "exact", 6)
    assert caught.value.code == ExitCode.DATA


def test_a_link_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"somebody's")
    (tmp_path / "signatures-near.bin").symlink_to(tmp_path / "other")
    with pytest.raises(PreflightError) as caught:
        DuplicateIndex.open(tmp_path, "near")
    assert caught.value.code == ExitCode.STORAGE
    assert (tmp_path / "other").read_bytes() == b"somebody's"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[DuplicateIndex]:
    index = DuplicateIndex.open(tmp_path, "exact", 0, max_bytes=80_000)
    yield index
    index.close()


def test_memory_is_bounded_and_the_way_on_is_told(small: DuplicateIndex) -> None:
    capacity = estimate_capacity("exact", 80_000)
    assert capacity == 6666
    signatures = [sign(str(i), "exact") for i in range(capacity + 1)]
    for start in range(0, capacity, 606):
        assert small.find(signatures[start : start + 606]) == [-1] * 606
        assert small.n_bytes <= max(estimate_bytes(small.n_documents, "exact"), 4096 * 8)
    assert small.n_bytes <= 80_000
    with pytest.raises(PreflightError, match="--limit-documents") as caught:
        small.find(signatures[-1:])
    assert caught.value.code == ExitCode.OUT_OF_MEMORY
    assert small.n_documents == capacity


def test_the_memory_of_a_million_documents() -> None:
    assert estimate_bytes(10**6, "exact") < 25 * 10**6
    assert estimate_bytes(10**6, "near") < 200 * 10**6
    assert estimate_capacity("exact") > 22 * 10**6
    assert estimate_capacity("near") > 2.7 * 10**6


@pytest.mark.parametrize(("slot", "bits"), [(np.uint32, 24), (np.uint64, 32), (np.uint32, 31)])
def test_a_table_proposes_all_that_was_filed(
    slot: type[np.unsignedinteger], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_FIRST_SLOTS", 1500)
    rng = np.random.default_rng(6)
    keys = rng.integers(0, 2**64, 900, dtype=np.uint64)
    keys[100:140] = keys[0]  # several under one key
    keys[140:200] |= np.uint64(0xFFFFFFFF << 32)  # the last slot, so that places wrap around
    table = SlotTable(slot, bits, 10**6)
    assert table.has_room(900)
    for start in range(0, 900, 45):
        table.insert(keys[start : start + 45], np.arange(start, start + 45))
    places, numbers = table.find(keys)
    found = set(zip(places.tolist(), numbers.tolist(), strict=True))
    expected = {
        (place, number)
        for place in range(900)
        for number in np.flatnonzero(keys == keys[place]).tolist()
    }
    assert expected <= found
    if slot is np.uint64:
        assert found == expected  # 32 bits of the key leave no chance hits
