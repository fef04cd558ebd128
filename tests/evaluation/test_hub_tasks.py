"""Tasks on the hub, by the real client from the stand-in of its HTTP interface."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus.sources.hub_server import Fault, HubServer

from preflight.core.errors import ExitCode, PreflightError
from preflight.corpus.sources.hub_client import Patience
from preflight.evaluation import hub_tasks
from preflight.evaluation.hub_tasks import read_hub_task
from preflight.evaluation.tasks import build_task

QUICK = Patience(reach=1.0, stall=0.5, total=3.0, first_pause=0.02, longest_pause=0.1)
ROWS: list[dict[str, Any]] = [
    {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": f"A cook number {i} stirs.",
        "ctx_b": "she",
        "endings": [f"ends {i} {j}" for j in range(4)],
        "label": str(i % 4),
    }
    for i in range(7)
]
WORDS = [{"text": f"the last word of line {i} is {'red' if i % 2 else 'blue'}"} for i in range(5)]


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=3)
    return out.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Rows in two files of the part that is read, in one of another, in another configuration."""
    files = {
        "data/train-00000.parquet": write_parquet(ROWS[:1]),
        "data/validation-00000.parquet": write_parquet(ROWS[:4]),
        "data/validation-00001.parquet": write_parquet(ROWS[4:]),
        "words/test-00000.parquet": write_parquet(WORDS),
        "words/train-00000.parquet": write_parquet(WORDS[:1]),
    }
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HubServer("someone/endings", files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_the_held_out_part_is_read_as_its_rows_would_be_from_a_file(server: HubServer) -> None:
    task, form = read_hub_task("hf:someone/endings", QUICK)
    expected, _ = build_task("x", "endings", enumerate(ROWS, 1))
    assert (task.name, task.source, form) == ("endings", "hf:someone/endings", "HellaSwag")
    assert task.items == expected.items
    assert not any("train" in path for path in server.paths if "resolve" in path)


def test_a_configuration_is_named_behind_a_colon(server: HubServer) -> None:
    task, form = read_hub_task("hf:someone/endings:words", QUICK)
    assert (task.kind, form) == ("last-word", "LAMBADA")
    assert [item.line for item in task.items] == [1, 2, 3, 4, 5]


def test_faults_that_pass_change_nothing(server: HubServer) -> None:
    server.faults = {0: Fault("status", 503), 1: Fault("cut"), 2: Fault("stall")}
    assert len(read_hub_task("hf:someone/endings", QUICK)[0].items) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("hf:", ExitCode.FLAGS, "not the name"),
        ("hf:a/b c", ExitCode.FLAGS, "not the name"),
        ("hf:someone/endings:nothing", ExitCode.FLAGS, "nothing"),
        ("hf:someone/else", ExitCode.TEXT, "someone/else"),
    ],
)
def test_bad_names(server: HubServer, name: str, code: ExitCode, told: str) -> None:
    with pytest.raises(PreflightError) as caught:
        read_hub_task(name, QUICK)
    assert caught.value.code == code
    assert told in str(caught.value)


def test_rows_that_are_no_items_and_damaged_files_are_refused(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["words/test-00000.parquet"] = write_parquet([{"colour": 1}])
    with pytest.raises(PreflightError, match="no known kind of item has 'colour'") as caught:
        read_hub_task("hf:someone/endings:words", QUICK)
    assert caught.value.code == ExitCode.TEXT
    whole = write_parquet(WORDS)
    server.files["words/test-00000.parquet"] = whole[:8] + bytes(40) + whole[48:]
    with pytest.raises(PreflightError, match=r"words/test-00000\.parquet"):
        read_hub_task("hf:someone/endings:words", QUICK)
    monkeypatch.setattr(hub_tasks, "_MOST_BYTES", 100)
    with pytest.raises(PreflightError, match="at most 100 B"):
        read_hub_task("hf:someone/endings", QUICK)
