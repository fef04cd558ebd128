"""Steps are timed as a run waits for them: at once on the CPU, one step later on CUDA."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from preflight.foresight import timing
from preflight.foresight.timing import choose_lag, iterate_step_seconds, time_steps


class Clock:
    """A trainer and its device, which take simulated time."""

    def __init__(self, device: str, launch: float, step: float, first: float = 0.0) -> None:
        self.now = self.ready = 0.0  # Python's time, and when the device has done its work
        self.launch, self.step, self.first = launch, step, first
        self.launched = self.read = self.under_way = 0
        self.runtime = SimpleNamespace(
            device=SimpleNamespace(type=device), synchronize=self.synchronize
        )

    def synchronize(self) -> None:
        self.now = max(self.now, self.ready)

    def train_step(self, step: int, batches: Any) -> Any:
        assert step == self.launched, "steps are numbered from 0"
        list(batches)
        self.launched += 1
        self.now += self.launch
        self.ready = max(self.ready, self.now) + self.step + (self.first if step == 0 else 0)
        self.under_way = max(self.under_way, self.launched - self.read)
        return SimpleNamespace(loss=Loss(self, self.ready))


class Loss:
    def __init__(self, clock: Clock, ready: float) -> None:
        self.clock, self.ready = clock, ready

    def __float__(self) -> float:
        self.clock.read += 1
        self.clock.now = max(self.clock.now, self.ready)
        return 0.0


@pytest.fixture
def make_clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*args: Any, **options: Any) -> Any:
        clock = Clock(*args, **options)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
        return clock

    return make


def test_on_the_cpu_each_step_is_timed_alone(make_clock: Any) -> None:
    clock = make_clock("cpu", 0.0, 2.0, first=5.0)
    assert time_steps(clock, lambda: [], 4) == [7.0, 2.0, 2.0, 2.0]
    assert (clock.launched, clock.read, clock.under_way) == (4, 4, 1)


def test_on_cuda_launches_hide_behind_the_step_before(make_clock: Any) -> None:
    clock = make_clock("cuda", 0.5, 2.0, first=5.0)
    # Each step alone would take 2.5; in a run it takes 2. The first one is left out.
    assert time_steps(clock, lambda: [], 3) == [2.0, 2.0, 2.0]
    assert clock.under_way == 2
    assert clock.now == clock.ready, "a step under way is waited for"
    # Where Python is the slower one, its time counts.
    assert time_steps(make_clock("cuda", 3.0, 2.0), lambda: [], 2) == [3.0, 3.0]


def test_a_single_step_is_timed_to_its_end(make_clock: Any) -> None:
    clock = make_clock("cuda", 0.5, 2.0, first=5.0)
    assert time_steps(clock, lambda: [], 1) == [7.5]
    assert clock.launched == 1


def test_work_before_the_first_step_is_not_charged(make_clock: Any) -> None:
    clock = make_clock("cuda", 0.0, 2.0)
    clock.ready = 100.0
    assert time_steps(clock, lambda: [], 1) == [2.0]


def test_who_iterates_may_stop_at_any_time(make_clock: Any) -> None:
    clock = make_clock("cuda", 0.5, 2.0)
    assert choose_lag(clock) == 1
    with contextlib.closing(iterate_step_seconds(clock, lambda: [], 1)) as seconds:
        assert list(itertools.islice(seconds, 2)) == [2.5, 2.0]
    assert clock.launched == 3
    assert clock.now == clock.ready
