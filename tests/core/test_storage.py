"""Durable files: whole or not at all, one writer at a time, and JSON that may be hostile."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflight.core import locks, storage, strict_json, units
from preflight.core.errors import ExitCode, PreflightError

ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Stopped(BaseException):
    """Stands for a kill: no handler of ours expects it."""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def raise_always(error: BaseException) -> Callable[..., Any]:
    def raising(*unused: Any, **options: Any) -> Any:
        raise error

    return raising


# ------------------------------------------------------------------------------------ publishing


@pytest.mark.parametrize("size_bytes", [0, 3])
def test_published_file_replaces_the_old_one(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "a"
    for content in (b"old", b"new"):
        with storage.publish_file(path, size_bytes) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"old"
        assert path.read_bytes() == content
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace", "posix_fallocate"])
@pytest.mark.parametrize("error", [FULL, OSError(errno.EIO, "I/O error"), Stopped()])
def test_failed_file_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, call, raise_always(error))
    with pytest.raises((PreflightError, Stopped)) as caught:  # noqa: SIM117
        with storage.publish_file(tmp_path / "a", 10) as file:
            file.write(b"new")
    if isinstance(error, OSError):
        assert caught.value.code == ExitCode.STORAGE
        assert str(tmp_path / "a") in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_full_disk_names_the_bytes_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", raise_always(FULL))
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1_000_000)
    for publish in (storage.publish_file, storage.publish_folder):
        with pytest.raises(PreflightError, match="1,000,000 bytes missing"):  # noqa: SIM117
            with publish(tmp_path / "a", 2_000_000):
                raise FULL
    assert names(tmp_path) == []


def test_file_system_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EOPNOTSUPP, "not supported")
    monkeypatch.setattr(os, "posix_fallocate", raise_always(error))
    with storage.publish_file(tmp_path / "a", 3) as file:
        file.write(b"abc")
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_published_folder_appears_whole(tmp_path: Path) -> None:
    with storage.publish_folder(tmp_path / "a") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "x").write_bytes(b"x")
        assert names(tmp_path) == [".tmp-a"]
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "inner" / "x").read_bytes() == b"x"


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("error", [FULL, Stopped()])
def test_failed_folder_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    monkeypatch.setattr(os, call, raise_always(error))
    with pytest.raises((PreflightError, Stopped)):  # noqa: SIM117
        with storage.publish_folder(tmp_path / "a") as temporary:
            (temporary / "x").write_bytes(b"x")
    assert names(tmp_path) == []


def test_everything_is_fsynced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with storage.publish_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_bytes(b"x")
    root = str(tmp_path)
    assert synced == [f"{root}/.tmp-a/x", f"{root}/.tmp-a", root]
    synced.clear()
    with storage.publish_file(tmp_path / "b") as file:
        file.write(b"x")
    assert synced == [f"{root}/.tmp-b", root]


def test_folder_with_content_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_bytes(b"x")
    with pytest.raises(PreflightError), storage.publish_folder(tmp_path / "a"):
        pass
    assert names(tmp_path / "a") == ["mine"]


def test_errors_of_the_caller_pass_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), storage.publish_folder(tmp_path / "a"):
        raise KeyError
    with pytest.raises(KeyError), storage.publish_file(tmp_path / "a"):
        raise KeyError
    assert names(tmp_path) == []


@pytest.mark.parametrize("size_kib", [40, 200, 500])
def test_disk_that_is_really_full(tmp_path: Path, size_kib: int) -> None:
    """A tmpfs of that size in a mount namespace of its own."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from preflight.core import errors, storage
place = Path({str(tmp_path)!r})
(place / "old").write_bytes(b"old")
try:
    with storage.publish_folder(place / "a", 600_000) as temporary:
        for number in range(6):
            with storage.publish_file(temporary / str(number), 100_000) as file:
                file.write(b"x" * 100_000)
except errors.PreflightError as error:
    assert error.code == 6 and "No space left" in str(error), error
    assert "bytes missing" in str(error), error
    assert [p.name for p in place.iterdir()] == ["old"], list(place.iterdir())
    sys.exit(42)
"""
    script = f'mount -t tmpfs -o size={size_kib}k tmpfs "$1" && exec "$2" -c "$3"'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 42, done.stderr


# -------------------------------------------------------------------------------------- removing


def test_retired_folder_is_gone_at_once_and_never_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"x")
    storage.retire_folder(tmp_path / "a")
    assert names(tmp_path) == ["b"]
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "rmtree", raise_always(Stopped()))
        with pytest.raises(Stopped):
            storage.retire_folder(tmp_path / "b")
    assert names(tmp_path) == [".tmp-retired-b"]
    storage.remove_leftovers(tmp_path, "retired-.")
    assert names(tmp_path) == []


def test_only_leftovers_of_ours_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_bytes(b"x")
    (tmp_path / ".tmp-ours").write_bytes(b"cut")
    (tmp_path / ".tmp-ours-too").symlink_to(tmp_path / "kept")
    (tmp_path / ".tmp-thesis").write_bytes(b"somebody's")
    storage.remove_leftovers(tmp_path, "ours(?:-too)?")
    assert names(tmp_path) == [".tmp-ours-too", ".tmp-thesis", "kept"]
    assert names(tmp_path / "kept") == ["x"]


def _publish_file(path: Path) -> None:
    with storage.publish_file(path) as file:
        file.write(b"ours")


def _publish_folder(path: Path) -> None:
    with storage.publish_folder(path) as folder:
        (folder / "x").write_bytes(b"ours")


def _publish_and_retire(path: Path) -> None:
    path.mkdir()
    storage.retire_folder(path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (_publish_file, ".tmp-a"),
        (_publish_file, "a"),
        (_publish_folder, ".tmp-a"),
        (_publish_and_retire, ".tmp-retired-a"),
        (storage.make_own_folder, "a"),
        (lambda path: storage.check_writable(path.parent), ".tmp-probe"),
        (lambda path: storage.check_writable(path.parent), ".tmp-probe-renamed"),
        (lambda path: locks.FolderLock(path.parent), ".lock"),
        (lambda path: locks.FolderLock(path.parent, shared=True), ".lock"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder", "missing", "hard link"])
def test_nothing_is_written_or_deleted_through_a_link(
    tmp_path: Path, write: Callable[[Path], object], name: str, kind: str
) -> None:
    mine, place = tmp_path / "mine", tmp_path / "place"
    place.mkdir()
    if kind == "folder":
        mine.mkdir()
        (mine / "thesis").write_bytes(b"a text")
    elif kind != "missing":
        mine.write_bytes(b"a text")
    if kind == "hard link":
        os.link(mine, place / name)
    else:
        (place / name).symlink_to(mine)
    try:
        write(place / "a")
    except PreflightError as error:
        assert error.code == ExitCode.STORAGE
        assert str(place / name) in str(error)
        assert names(place)[0] == name
    else:
        assert kind == "hard link"
        assert write is _publish_file
    if kind == "missing":
        assert not mine.exists()
    else:
        text = mine / "thesis" if kind == "folder" else mine
        assert text.read_bytes() == b"a text"


def test_json_of_another_program_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "check_report.json"
    for content in ('{"format": "x"}', '{\n  "format": "pref"}', "", "a diary"):
        path.write_text(content)
        with pytest.raises(PreflightError, match="another program's file") as caught:
            storage.write_json(path, {"format": "preflight"})
        assert caught.value.code == ExitCode.STORAGE
        assert path.read_text() == content
    path.unlink()
    for n in (1, 2):
        storage.write_json(path, {"format": "preflight", "n": n})
        assert json.loads(path.read_text()) == {"format": "preflight", "n": n}


@pytest.mark.parametrize("name", [".tmp-probe", ".tmp-probe-renamed"])
def test_probing_takes_no_name_that_is_somebody_elses(tmp_path: Path, name: str) -> None:
    for content in (b"", b"probe"):  # of a probe that was killed
        (tmp_path / name).write_bytes(content)
        storage.check_writable(tmp_path)
        assert names(tmp_path) == []
    (tmp_path / name).write_bytes(b"probe of mine")
    with pytest.raises(PreflightError, match="another program's file"):
        storage.check_writable(tmp_path)
    assert (tmp_path / name).read_bytes() == b"probe of mine"


def test_lock_file_of_another_program_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("held by yarn")
    for shared in (True, False):
        with pytest.raises(PreflightError, match=r"\.lock is another program's file") as caught:
            locks.FolderLock(tmp_path, shared=shared)
        assert caught.value.code == ExitCode.STORAGE
    assert (tmp_path / ".lock").read_text() == "held by yarn"


@pytest.mark.parametrize("was_locked_before", [True, False])
def test_readers_share_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_locked_before: bool
) -> None:
    if was_locked_before:
        locks.FolderLock(tmp_path).release()
    real = os.open

    def open_read_only(path: Any, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_read_only)
    with locks.FolderLock(tmp_path, shared=True), locks.FolderLock(tmp_path, shared=True):
        monkeypatch.setattr(os, "open", real)
        if was_locked_before:
            with pytest.raises(PreflightError) as caught:
                locks.FolderLock(tmp_path)
            assert caught.value.code == ExitCode.LOCKED


def test_what_cannot_be_deleted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / ".tmp-b").mkdir()
    monkeypatch.setattr(storage.shutil, "rmtree", raise_always(PermissionError(13, "denied")))
    acts: list[Callable[[], Any]] = [
        lambda: storage.retire_folder(tmp_path / "a"),
        lambda: storage.remove_leftovers(tmp_path, "b"),
    ]
    for act in acts:
        with pytest.raises(PreflightError, match=r"cannot delete .*: denied") as caught:
            act()
        assert caught.value.code == ExitCode.STORAGE


def test_writable_folder_is_left_empty(tmp_path: Path) -> None:
    storage.check_access(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    storage.check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(PreflightError) as caught:
        storage.check_writable(tmp_path / "file" / "b")
    assert caught.value.code == ExitCode.STORAGE


def test_folder_without_permission_is_refused_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(PreflightError, match="Permission denied") as caught:
        storage.check_access(tmp_path / "a" / "b")
    assert caught.value.code == ExitCode.STORAGE
    assert names(tmp_path) == []


# --------------------------------------------------------------------------------------- reading


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with storage.open_regular(tmp_path / "a") as file:
        assert file.read() == b"abc"
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("link", "fifo", "nothing", "."):
        with pytest.raises(OSError):
            storage.open_regular(tmp_path / name)
    with pytest.raises(OSError, match="not a plain file"):
        storage.open_regular(Path("/dev/zero"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1,]",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"a":1}}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"[-1e999]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
        b'"\x01"',
        b"{} {}",
        b'"' + b"x" * strict_json.MAX_JSON_BYTES + b'"',
    ],
)
def test_bad_json_is_a_value_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(ValueError):
        strict_json.read_json(tmp_path / "a")


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=60) | st.text('[]{}":,.0123456789eE+-aNftru\\ \n').map(str.encode))
def test_any_bytes_are_json_or_a_value_error(raw: bytes) -> None:
    try:
        value = strict_json.parse_json(raw)
    except ValueError:
        return
    json.dumps(value, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**60), 2**60)
        | st.text()
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_json_round_trip(value: Any) -> None:
    assert strict_json.parse_json(json.dumps(value).encode()) == value


def test_written_json_is_read_back(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a", {"format": "x", "x": [1, 2.5, None, "\u20ac"]})
    assert strict_json.read_json(tmp_path / "a")["x"] == [1, 2.5, None, "\u20ac"]
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a", {"format": "x", "x": float("nan")})
    assert names(tmp_path) == ["a"]


def test_hash_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert storage.hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
    assert units.format_bytes(0) == "0 B"
    assert units.format_bytes(1536) == "1.5 KiB"
    assert units.format_bytes(3 * 2**40) == "3.0 TiB"
    assert storage.free_bytes(tmp_path / "not" / "there") > 0


def test_all_are_verified_and_the_first_fault_is_told() -> None:
    """Later items end sooner: neither the results nor the fault may follow who was quickest."""

    def verify(number: int) -> int:
        time.sleep((7 - number) / 100)
        if number in faulty:
            raise PreflightError(ExitCode.DATA, f"item {number}")
        return number

    faulty: set[int] = set()
    assert storage.verify_all(verify, range(8)) == list(range(8))
    faulty = {2, 5}
    with pytest.raises(PreflightError, match="item 2"):
        storage.verify_all(verify, range(8))


# ----------------------------------------------------------------------------------------- locks

HOLDER = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
import time
from preflight.core import errors, locks
try:
    lock = locks.FolderLock(Path({folder!r}), shared={shared})
except errors.PreflightError as error:
    print(error, flush=True); sys.exit(int(error.code))
print("held", flush=True)
sys.stdin.readline()
"""


def start_holder(folder: Path, shared: bool) -> subprocess.Popen[str]:
    code = HOLDER.format(root=str(ROOT), folder=str(folder), shared=shared)
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_who_may_hold_a_lock_together(
    tmp_path: Path, first: bool, second: bool, both: bool
) -> None:
    holder = start_holder(tmp_path, first)
    assert read_line(holder) == "held"
    try:
        if both:
            locks.FolderLock(tmp_path, shared=second).release()
        else:
            begun = time.monotonic()
            with pytest.raises(PreflightError) as caught:
                locks.FolderLock(tmp_path, shared=second)
            assert time.monotonic() - begun < 1
            assert caught.value.code == ExitCode.LOCKED
            assert first or f"pid {holder.pid}" in str(caught.value)
    finally:
        holder.communicate("\n")
    locks.FolderLock(tmp_path, shared=second).release()


def test_lock_dies_with_its_holder(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, shared=False)
    assert read_line(holder) == "held"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locks.FolderLock(tmp_path), pytest.raises(PreflightError):
        locks.FolderLock(tmp_path)


def test_one_of_many_wins(tmp_path: Path) -> None:
    holders = [start_holder(tmp_path, shared=False) for _ in range(6)]
    answers = [read_line(holder) for holder in holders]
    codes = []
    for holder in holders:
        holder.communicate("\n")
        codes.append(holder.returncode)
    assert answers.count("held") == 1
    assert sorted(codes) == [0] + [ExitCode.LOCKED] * 5
