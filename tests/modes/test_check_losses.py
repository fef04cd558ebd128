"""`--check`: the losses that a run starts at and is forecast to reach."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeConfig
from preflight.core.signals import StopFlag
from preflight.modes import check, forecast
from preflight.modes.check import build_report
from preflight.modes.setup import RunSetup
from preflight.settings import RunConfig


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of this machine plays no part."""
    monkeypatch.setattr(check, "measure_matmul_flops", lambda *args: 1e10)


def read_rows(config: RunConfig) -> dict[str, Any]:
    """Rows of the dataset, of a report without problems."""
    report = build_report(config)
    assert report.problems == []
    return report.sections["dataset"]


def test_a_new_model_starts_at_a_uniform_guess(make_config: MakeConfig) -> None:
    report = build_report(make_config(tokenizer="byte"))
    rows, n_ids = report.sections["dataset"], report.sections["model"]["vocabulary"]
    assert n_ids == 257  # the bytes and the end of a text
    assert rows["uniform_guess_nats_per_token"] == pytest.approx(math.log(257), abs=1e-4)
    # A token of the validation part is a byte, but for the end of each text.
    val = RunSetup(make_config(tokenizer="byte"), StopFlag()).data.val
    bits = math.log2(257) * val.n_tokens / val.n_bytes
    assert rows["uniform_guess_bits_per_byte"] == pytest.approx(bits, abs=1e-4)
    assert 8 < bits < 8.1
    assert f"  uniform guess bits per byte  {bits:.3f}\n" in report.to_text()
    assert "checkpoint_bits_per_byte" not in rows
    assert "forecast_bits_per_byte" not in rows
    larger = read_rows(make_config(tokenizer="byte", vocab_size=514))
    assert larger["uniform_guess_nats_per_token"] == pytest.approx(math.log(514), abs=1e-4)


def test_the_forecast_of_this_run_is_told(make_config: MakeConfig) -> None:
    config = make_config(tokenizer="byte", max_steps=100)
    output = Path("training_output")
    output.mkdir()
    content = {
        "format": forecast.FORMAT,
        "run": forecast._describe_run(RunSetup(config, StopFlag())),
        "bits_per_byte": {"loss": 1.7, "low": 1.65, "high": 1.8},
    }
    (output / forecast.REPORT_NAME).write_text(json.dumps(content))
    report = build_report(config)
    told = {"expected": 1.7, "low": 1.65, "high": 1.8}
    assert report.sections["dataset"]["forecast_bits_per_byte"] == told
    assert "bits per byte       expected 1.700, low 1.650, high 1.800\n" in report.to_text()
    assert "forecast_bits_per_byte" not in read_rows(make_config(tokenizer="byte", max_steps=101))
