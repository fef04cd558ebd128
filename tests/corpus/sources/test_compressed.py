"""Compressed files as streams. The oracles: the standard library's own readers, and the plain text
that was packed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.sources import compressed
from preflight.corpus.sources.compressed import open_stream, strip_suffix
from preflight.corpus.sources.stored import hash_stored_file

PACK = {
    "": lambda data: data,
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}
PACKED = [kind for kind in PACK if kind]


def make_text(n_bytes: int, seed: int = 0) -> bytes:
    words = [bytes(random.Random(i).choices(b"abcdefgh", k=6)) for i in range(500)]
    text = b" ".join(random.Random(seed).choices(words, k=n_bytes // 6))
    return text[:n_bytes]


def write(folder: Path, kind: str, *members: bytes) -> Path:
    path = folder / ("text.txt" + (f".{kind}" if kind else ""))
    path.write_bytes(b"".join(PACK[kind](member) for member in members))
    return path


def read_all(path: Path, position: list[int] | None = None, n_bytes: int = 10**6) -> bytes:
    with open_stream(path, position) as reader:
        return b"".join(iter(lambda: reader.read(n_bytes), b""))


def catch(path: Path, n_bytes: int = 1000) -> tuple[bytes, PreflightError]:
    """What was read before the error, and the error."""
    got = bytearray()

    def read() -> None:
        with open_stream(path) as reader:
            while data := reader.read(n_bytes):
                got.extend(data)

    with pytest.raises(PreflightError) as caught:
        read()
    assert caught.value.code == ExitCode.TEXT
    assert str(path) in caught.value.lines[0]
    return bytes(got), caught.value


def test_strip_suffix():
    assert strip_suffix(Path("a/b.jsonl.gz")) == (Path("a/b.jsonl"), "gz")
    assert strip_suffix(Path("b.XML.BZ2")) == (Path("b.XML"), "bz2")
    assert strip_suffix(Path("b.txt")) == (Path("b.txt"), "")
    assert strip_suffix(Path("gz")) == (Path("gz"), "")


@pytest.mark.parametrize("kind", PACK)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 300_000), min_size=1, max_size=5),
    n_bytes=st.sampled_from([997, 65_536, 10**7]),
    place=st.floats(0, 1),
)
def test_all_members_are_read_and_continued(tmp_path, kind, sizes, n_bytes, place):
    members = [make_text(size, i) for i, size in enumerate(sizes)]
    path, plain = write(tmp_path, kind, *members), b"".join(members)
    wanted = int(place * len(plain))
    if not path.stat().st_size:
        return
    with open_stream(path) as reader:
        got = b""
        positions = []
        while data := reader.read(n_bytes):
            assert len(data) <= n_bytes
            got += data
            assert reader.plain_offset == len(got)
            if reader.plain_offset >= wanted:
                positions.append(reader.position_at(wanted))
        assert reader.stored_offset == path.stat().st_size
        assert got == plain
        positions.append(reader.position_at(wanted))
    for position in (positions[0], positions[-1]):
        assert read_all(path, json.loads(json.dumps(position)), n_bytes) == plain[wanted:]


@pytest.mark.parametrize("kind", PACKED)
def test_a_position_is_at_the_last_member_start(tmp_path, kind):
    members = [make_text(100_000, i) for i in range(8)]
    path = write(tmp_path, kind, *members)
    stored = sum(len(PACK[kind](member)) for member in members[:6])
    with open_stream(path) as reader:
        while reader.plain_offset < 650_000:
            reader.read(10_000)
        assert reader.position_at(650_000) == [stored, 600_000, 650_000]
        assert reader.position_at(99_999) == [0, 0, 99_999]
        position = reader.position_at(610_000)
    with open_stream(path, position) as reader:
        assert reader.plain_offset == 610_000
        while reader.read(10_000):
            pass
        assert reader.position_at(650_000) == [stored, 600_000, 650_000]
        assert reader.position_at(750_000)[1:] == [700_000, 750_000]


@pytest.mark.parametrize("kind", PACKED)
def test_few_starts_are_kept_and_old_places_are_still_found(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(compressed, "_N_STARTS", 2)
    members = [make_text(70_000, i) for i in range(6)]
    path, plain = write(tmp_path, kind, *members), b"".join(members)
    with open_stream(path) as reader:
        while reader.read(10_000):
            pass
        position = reader.position_at(150_000)
        assert position[:2] == [0, 0]
    assert read_all(path, position) == plain[150_000:]


@pytest.mark.parametrize("kind", PACKED)
def test_every_truncation_is_told(tmp_path, kind):
    members = [make_text(3000, 1), make_text(2000, 2)]
    path, plain = write(tmp_path, kind, *members), b"".join(members)
    whole = path.read_bytes()
    boundary = len(PACK[kind](members[0]))
    step = max(len(whole) // 150, 1)
    for size in sorted({*range(0, len(whole), step), boundary - 1, boundary + 1, len(whole) - 1}):
        if size == boundary:
            continue
        path.write_bytes(whole[:size])
        got, error = catch(path)
        assert plain.startswith(got)
        if size > 0:
            assert f"byte {size:,}" in error.lines[0]
            assert f"{len(got):,} bytes" in error.lines[1]
    path.write_bytes(whole[:boundary])  # nobody can tell this
    assert read_all(path) == members[0]


@pytest.mark.parametrize("kind", PACKED)
def test_a_flipped_bit_never_gives_another_text(tmp_path, kind):
    members = [make_text(3000, 1), make_text(3000, 2)]
    path, plain = write(tmp_path, kind, *members), b"".join(members)
    whole = bytearray(path.read_bytes())
    n_found = 0
    for at in range(0, len(whole), 17):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            assert read_all(path) == plain  # an unused bit of a header, such as gzip's time
        except PreflightError as error:
            assert error.code == ExitCode.TEXT
            n_found += 1
    assert n_found > len(whole) / 17 * 0.9


@pytest.mark.parametrize("kind", PACKED)
def test_a_damage_names_the_members_before_it(tmp_path, kind):
    members = [make_text(100_000, 1), make_text(100_000, 2)]
    path = write(tmp_path, kind, *members)
    data = bytearray(path.read_bytes())
    at = len(PACK[kind](members[0])) + 20_000
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    got, error = catch(path)
    assert got[:100_000] == members[0]
    assert "the first 100,000 bytes" in error.lines[1]
    assert f"{len(got):,} were unpacked" in error.lines[1]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("garbage", [b"garbage!", b"\0\0\0garbage", b"B", b"\x1f"])
def test_trailing_garbage_is_damage(tmp_path, kind, garbage):
    path = write(tmp_path, kind, make_text(5000))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + garbage)
    got, error = catch(path)
    assert got == make_text(5000)
    assert "5,000 bytes" in error.lines[1]
    assert any(f"byte {size + n:,}" in error.lines[0] for n in (0, 1, 3))


def test_padding_of_gzip_and_xz(tmp_path):
    for kind, n_nuls, is_sound in (
        ("gz", 700, True),
        ("gz", 200_000, True),
        ("xz", 8, True),
        ("xz", 100_000, True),
        ("xz", 6, False),
        ("bz2", 4, False),
        ("zst", 4, False),
    ):
        path = write(tmp_path, kind, b"one ")
        path.write_bytes(path.read_bytes() + bytes(n_nuls) + PACK[kind](b"two"))
        if is_sound:
            assert read_all(path) == b"one two"
        else:
            assert "damaged" in catch(path)[1].lines[0]
        path.write_bytes(PACK[kind](b"one ") + bytes(n_nuls))
        if is_sound:
            assert read_all(path) == b"one "


def test_skippable_frames_of_zstd(tmp_path):
    path = tmp_path / "a.txt.zst"
    skippable = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    path.write_bytes(skippable + PACK["zst"](b"one ") + skippable + PACK["zst"](b"two") + skippable)
    assert read_all(path) == b"one two"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut off" in catch(path)[1].lines[0]


def test_a_wrong_name_and_an_empty_file(tmp_path):
    for kind in PACKED:
        path = tmp_path / f"a.txt.{kind}"
        path.write_bytes(b"plain text")
        assert "although its name says so" in catch(path)[1].lines[0]
        path.write_bytes(b"")
        assert "empty" in catch(path)[1].lines[0]
    assert "no such file" in catch(tmp_path / "nothing.gz")[1].lines[0]
    (tmp_path / "folder.gz").mkdir()
    assert "not a regular file" in catch(tmp_path / "folder.gz")[1].lines[0]


@pytest.mark.parametrize("kind", ["bz2", "xz", "zst", "gz"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(compressed, "BOMB_AFTER_BYTES", 2**22)
    if kind == "gz":
        monkeypatch.setattr(compressed, "MAX_RATIO", 500)  # deflate ends at 1,032
    path = write(tmp_path, kind, bytes(3 * 10**7))
    stored = path.stat().st_size
    tracemalloc.start()
    got, error = catch(path, 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"its first {stored:,} bytes" in error.lines[0]
    assert "refused" in error.lines[0]
    if kind != "gz":
        assert len(got) <= max(2**22, 1000 * stored)
    assert peak < 40 * 2**20


def test_a_large_ratio_of_a_small_file_is_taken(tmp_path):
    path = write(tmp_path, "zst", bytes(10**7))
    assert 10**7 / path.stat().st_size > 1000
    assert read_all(path) == bytes(10**7)


def test_a_window_of_128_mib_is_taken_and_a_larger_one_refused(tmp_path):
    for log, is_taken in ((27, True), (28, True), (29, False), (31, False)):
        path = tmp_path / "a.txt.zst"
        window = ((log - 10) << 3).to_bytes(1, "little")
        last_raw_block = (3 << 3 | 1).to_bytes(3, "little") + b"abc"
        path.write_bytes(b"\x28\xb5\x2f\xfd\0" + window + last_raw_block)
        if is_taken:
            assert read_all(path) == b"abc"
        else:
            assert "needs more than 256.0 MiB" in catch(path)[1].lines[0]


def test_a_large_dictionary_of_xz_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**26}]
    path.write_bytes(lzma.compress(b"abc", filters=filters))
    assert read_all(path) == b"abc"
    monkeypatch.setattr(compressed, "MAX_WINDOW_BYTES", 2**25)
    assert "needs more than 32.0 MiB" in catch(path)[1].lines[0]


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, "zst", b"abc")
    monkeypatch.setitem(compressed.sys.modules, "backports.zstd", None)
    with pytest.raises(PreflightError) as caught:
        open_stream(path)
    assert caught.value.code == ExitCode.FLAGS
    assert "pip install backports.zstd" in caught.value.lines


def test_hash_of_the_stored_bytes(tmp_path):
    import hashlib

    path = write(tmp_path, "gz", make_text(600_000))
    stored = hash_stored_file(path, None)
    assert stored.size == path.stat().st_size
    assert stored.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with open_stream(path) as reader:
        stored.check_unchanged(reader)
        with open(path, "ab") as file:
            file.write(b"x")
        with pytest.raises(PreflightError, match="changed"):
            stored.check_unchanged(reader)
