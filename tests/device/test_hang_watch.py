"""Ranks that hang, told from those that take long, by what they tell and by what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch.distributed as dist

from preflight.device import hang_watch, heartbeat
from preflight.device.hang_watch import IdleWatch, RankWatch, StepWatch
from preflight.device.heartbeat import Heartbeat, Sign, read_signs

_SPIN = "while True: pass"
_WAIT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_SPIN!r}])"


def count_looks(
    watch: RankWatch | IdleWatch | StepWatch,
    signs: list[Sign],
    most: int = 2_000,
    pids: tuple[int, ...] = (),
) -> int:
    """The looks at these signs until something is taken to hang; `most` where nothing is."""
    return next((n for n in range(most) if watch.look(list(pids), signs)), most)


def within(*steps: int, calls: tuple[int, ...] = (7, 7), may_compile: bool = False) -> list[Sign]:
    """Signs of two ranks."""
    return [Sign(1, n, c, may_compile) for n, c in zip(steps, calls, strict=True)]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Those that a test starts; they end with it, and so do theirs."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


# ---- what a rank tells ---------------------------------------------------------------------------


def test_a_rank_tells_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert read_signs(store, 2) == [Sign(), Sign()]

    def wait_for(sign: Sign) -> None:
        deadline = time.monotonic() + 20
        while read_signs(store, 2) != [Sign(), sign]:
            assert time.monotonic() < deadline, read_signs(store, 2)
            time.sleep(0.01)

    with Heartbeat(store, 1, is_prepared=False) as beat:
        told = Sign(os.getpid(), 0, -1)
        wait_for(told)
        beat.begin()
        wait_for(told := replace(told, calls=0))
        with beat.step(may_compile=True):
            wait_for(told := replace(told, steps=1, may_compile=True))
        wait_for(told := replace(told, steps=2))
        with pytest.raises(ValueError, match="any"), beat.step(may_compile=True):
            raise ValueError("any")
        wait_for(replace(told, steps=4))
    assert not beat._thread.is_alive()


def test_where_collectives_cannot_be_counted_nobody_hangs(threads: THREADS) -> None:
    """With another version of torch, or another backend."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    beat = Heartbeat(store, 0, is_prepared=True)
    assert beat.read().calls == 0
    beat.count_calls([object()])  # type: ignore[list-item]
    assert beat.read().calls == -1
    assert count_looks(RankWatch(), [beat.read(), Sign(1)], pids=(10, 11)) == 2_000


def test_a_rank_goes_on_telling_after_a_silence_of_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launcher may be stopped for longer than a connection lasts."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    answers: list[BaseException | None] = [dist.DistNetworkError("silence"), None]
    done: list[str] = []

    class Store:
        def clone(self) -> Store:
            return self

        def set(self, name: str, value: str) -> None:
            answer = answers.pop(0) if answers else None
            if answer is not None:
                raise answer
            done.append(value)

    with Heartbeat(Store(), 0, is_prepared=True):  # type: ignore[arg-type]
        deadline = time.monotonic() + 20
        while not done:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# ---- steps ---------------------------------------------------------------------------------------


def test_a_step_hangs_when_all_ranks_stay_within_it() -> None:
    assert count_looks(StepWatch(), within(5, 5)) == 60


@pytest.mark.parametrize(
    "signs",
    [
        within(5, 6, calls=(7, 8)),
        within(6, 6, calls=(7, 8)),
        within(0, 5, calls=(7, 8)),
        within(1, 1),
        within(1, 1, calls=(7, 8), may_compile=True),
    ],
    ids=["save", "loader", "start", "same work", "compilation"],
)
def test_whoever_may_be_busy_is_waited_for(signs: list[Sign]) -> None:
    assert count_looks(StepWatch(), signs) == 2_000


def test_a_step_may_take_many_times_the_longest_before_it() -> None:
    """The first one too, which compiles."""
    watch = StepWatch()
    assert count_looks(watch, within(1, 1), most=11) == 11  # ten seconds, after the look that began
    assert count_looks(watch, within(3, 3)) == 200
    watch = StepWatch()
    count_looks(watch, within(1, 1), most=11)
    assert count_looks(watch, within(3, 3), most=150) == 150  # slow, not hanging
    assert count_looks(watch, within(5, 5), most=2_900) == 2_900


def test_a_rank_that_is_behind_in_the_first_step_may_take_many_times_what_the_others_took() -> None:
    watch = StepWatch()
    assert count_looks(watch, within(1, 1), most=11) == 11
    assert count_looks(watch, within(1, 1, calls=(7, 8))) == 11 * 20
    watch = StepWatch()
    for calls in range(8, 40):  # the other one goes on
        assert count_looks(watch, within(1, 1, calls=(7, calls)), most=50) == 50
    assert count_looks(StepWatch(), within(1, 1, calls=(7, 8))) == 60


# ---- ranks that do nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "expected"),
    [("import time; time.sleep(600)", True), (_SPIN, False), (_WAIT, False)],
)
def test_a_rank_hangs_where_neither_it_nor_a_process_of_its_own_does_anything(
    program: str,
    expected: bool,
    processes: list[subprocess.Popen[bytes]],
) -> None:
    process = subprocess.Popen([sys.executable, "-c", program])
    processes.append(process)
    watch, signs = IdleWatch(), within(6, 6, calls=(7, 8))
    deadline = time.monotonic() + 60
    while len(hang_watch._list_threads(process.pid)) < 1 + (program == _WAIT):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    told = ""
    deadline = time.monotonic() + (60 if expected else 2)  # a process that starts uses a CPU
    while not told and time.monotonic() < deadline:
        told = watch.look([process.pid, os.getpid()], signs)
        time.sleep(0.01)
    assert told == ("rank 0, for which the others wait, did nothing for 60 s" if expected else "")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[str, float]]]:
    """What the system tells of processes 10 and 11: they do nothing."""
    told = {10: [("S", 3.0), ("S", 4.0)], 11: [("S", 5.0)]}
    monkeypatch.setattr(hang_watch, "_list_threads", lambda pid: told[pid])
    monkeypatch.setattr(hang_watch, "is_stopped", lambda pid: False)
    return told


THREADS = dict[int, list[tuple[str, float]]]


@pytest.mark.parametrize("state", ["R", "D"])
def test_who_waits_for_a_cpu_or_a_disk_does_something(threads: THREADS, state: str) -> None:
    threads[10][1] = (state, 4.0)
    assert count_looks(IdleWatch(), within(6, 6, calls=(7, 8)), pids=(10, 11)) == 2_000
    threads[10][1] = ("S", 4.0)
    assert count_looks(IdleWatch(), within(6, 6, calls=(7, 8)), pids=(10, 11)) == 61


def test_who_uses_a_cpu_does_something_and_who_only_polls_does_not(threads: THREADS) -> None:
    for used, expected in ((0.004, True), (0.05, False)):
        watch, hangs = IdleWatch(), False
        for _ in range(200):
            state, seconds = threads[10][0]
            threads[10][0] = (state, seconds + used)
            hangs = hangs or bool(watch.look([10, 11], within(6, 6, calls=(7, 8))))
        assert hangs == expected


def test_the_ranks_that_the_others_wait_for_decide(threads: THREADS) -> None:
    """Where all have begun the same collective, all must do nothing."""
    threads[11][0] = ("R", 5.0)
    assert count_looks(IdleWatch(), within(1, 1, calls=(7, 7)), pids=(10, 11)) == 2_000
    assert count_looks(IdleWatch(), within(1, 1, calls=(8, 7)), pids=(10, 11)) == 2_000
    assert count_looks(IdleWatch(), within(1, 1, calls=(7, 8)), pids=(10, 11)) == 61
    threads[11][0] = ("S", 5.0)
    watch = IdleWatch()
    assert count_looks(watch, within(1, 1, calls=(7, 7)), pids=(10, 11)) == 61
    told = watch.look([10, 11], within(1, 1, calls=(7, 7)))
    assert told == "no rank did anything for 60 s"


def test_a_collective_that_is_begun_ends_the_silence(threads: THREADS) -> None:
    watch = IdleWatch()
    for calls in range(1, 10):
        assert count_looks(watch, within(1, 1, calls=(0, calls)), most=50, pids=(10, 11)) == 50


def test_a_host_tells_of_its_own_ranks_alone(threads: THREADS) -> None:
    """Ranks 2 and 3 of four are here."""
    signs = [Sign(1, 1, calls) for calls in (8, 8, 7, 8)]
    assert count_looks(IdleWatch(first=2), signs, pids=(10, 11)) == 61
    signs = [Sign(1, 1, calls) for calls in (7, 8, 7, 8)]
    assert count_looks(IdleWatch(first=2), signs, pids=(10, 11)) == 2_000


# ---- all of it -----------------------------------------------------------------------------------


def test_a_preparation_may_take_any_time_and_a_stopped_rank_may_not(
    threads: THREADS, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs = within(0, 0, calls=(0, -1))
    assert count_looks(RankWatch(), signs, pids=(10, 11)) == 2_000
    monkeypatch.setattr(hang_watch, "is_stopped", lambda pid: pid == 11)
    watch = RankWatch(first=4)
    assert count_looks(watch, signs, pids=(10, 11)) == 29
    assert count_looks(watch, signs, pids=(10, 11), most=29) == 29  # told once
    hang = watch.look([10, 11], signs)
    assert hang is not None
    assert hang.text == "rank 5 (process 11) has been stopped: it is ended"
    assert hang.pids == [11]


def test_where_one_rank_hangs_all_are_ended(threads: THREADS) -> None:
    watch = RankWatch()
    count_looks(watch, within(1, 1, calls=(7, 8)), pids=(10, 11), most=61)
    hang = watch.look([10, 11], within(1, 1, calls=(7, 8)))
    assert hang is not None
    assert hang.pids == [10, 11]
    assert hang.text.endswith("did nothing for 60 s: all ranks are ended")
