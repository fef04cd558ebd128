"""Losses to compare the run's own with: a uniform guess, the checkpoint to continue, a forecast."""

from __future__ import annotations

import math

from preflight.modes.check_sections import Findings
from preflight.modes.forecast import read_forecast
from preflight.training.state import convert_to_bits_per_byte

_DECIMALS = 4


def describe_losses(found: Findings) -> None:
    """Add them to the rows of the dataset, in bits per byte of its validation part, as runs log."""
    model, data, setup = found.model, found.data, found.setup
    if model is None or data is None:
        return
    rows, tokens_per_byte = found.report.sections["dataset"], data.val.n_tokens / data.val.n_bytes

    def convert(loss: float) -> float:
        return round(convert_to_bits_per_byte(loss, tokens_per_byte), _DECIMALS)

    # Every id as probable as any other: about what a new model gives.
    uniform_loss = math.log(model.vocab_size)
    rows["uniform_guess_nats_per_token"] = round(uniform_loss, _DECIMALS)
    rows["uniform_guess_bits_per_byte"] = convert(uniform_loss)
    origin = setup.known_origin
    if origin is not None and origin.val_loss is not None:
        trained_on = (origin.config.get("data") or {}).get("fingerprint")
        if trained_on == data.fingerprint:  # its loss is of the same validation part
            rows["checkpoint_bits_per_byte"] = convert(origin.val_loss)
    if found.plan is None:
        return
    forecast = read_forecast(setup)
    if forecast is not None:
        bits = forecast["bits_per_byte"]
        named = {"expected": bits["loss"], "low": bits["low"], "high": bits["high"]}
        rows["forecast_bits_per_byte"] = {
            name: round(value, _DECIMALS) for name, value in named.items()
        }
