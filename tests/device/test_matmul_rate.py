"""Which precision a CPU multiplies faster in: measured once, remembered, and what a run takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device.test_ranks import run_ranks

from preflight.device import matmul_rate, runtime
from preflight.device.matmul_rate import is_bf16_faster, measure_matmul_flops
from preflight.device.ranks import Ranks
from preflight.device.remembered import FOLDER_VARIABLE
from preflight.device.runtime import build_runtime
from preflight.device.ways import ChosenWay, Way
from preflight.settings import SystemSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))


def test_a_rate() -> None:
    assert measure_matmul_flops(torch.device("cpu"), torch.float32) > 1e8


@pytest.mark.parametrize(
    ("bf16", "faster"), [(0.5e12, False), (1.0e12, False), (1.1e12, False), (2e12, True)]
)
def test_the_faster_precision_is_measured_once(
    bf16: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []

    def measure(_: torch.device, dtype: torch.dtype, *, least_seconds: float) -> float:
        asked.append(dtype)
        return 1e12 if dtype == torch.float32 else bf16

    monkeypatch.setattr(matmul_rate, "measure_matmul_flops", measure)
    for _ in range(2):  # as in another process
        assert is_bf16_faster.__wrapped__() is faster
    assert asked == [torch.float32, torch.bfloat16]


def test_measuring_draws_no_random_number_of_the_run() -> None:
    before = torch.get_rng_state()
    is_bf16_faster.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("faster", [True, False])
def test_what_a_run_takes(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(runtime, "is_bf16_faster", lambda: faster)
    taken = build_runtime(SystemSettings(device="cpu"))
    assert taken.dtype == (torch.bfloat16 if faster else torch.float32)
    assert any("slower here" in note for note in taken.notes) is not faster
    asked = build_runtime(SystemSettings(device="cpu", mixed_precision=True))
    assert asked.dtype == torch.bfloat16
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: False)
    monkeypatch.setattr(runtime, "is_bf16_faster", None)  # not asked
    assert build_runtime(SystemSettings(device="cpu")).dtype == torch.float32


@pytest.mark.parametrize("fast", [0, 1])
def test_ranks_take_what_the_first_of_them_chose(
    fast: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On hosts of which one is `fast` in bf16, and one kept a compiled step."""
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: True)
    system, bf16 = SystemSettings(device="cpu"), torch.bfloat16

    def choose(ranks: Ranks) -> list[tuple[torch.dtype, bool]]:
        def measure(_: torch.device, dtype: torch.dtype, *, least_seconds: float) -> float:
            return 2e12 if dtype == bf16 and ranks.rank == fast else 1e12

        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / str(ranks.rank)))
        monkeypatch.setattr(matmul_rate, "measure_matmul_flops", measure)
        is_bf16_faster.cache_clear()
        kept = ChosenWay(Way(precision="float32", compiled=ranks.rank == fast), "")
        taken = [
            build_runtime(system),
            build_runtime(system, ranks=ranks),
            build_runtime(system, 1, kept, ranks),
        ]
        return [(each.dtype, each.compile_model) for each in taken]

    found = run_ranks(2, choose)
    assert [own for (own, _), *_ in found] == [bf16 if n == fast else torch.float32 for n in (0, 1)]
    first = [found[0][0], (torch.float32, fast == 0)]
    assert [taken for _, *taken in found] == [first, first]
