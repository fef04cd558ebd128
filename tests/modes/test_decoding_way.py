"""How a loaded model decodes: chosen from figures, tried where that pays, remembered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generate import generate_ids
from preflight.decoding import trial
from preflight.decoding.stepping import Decoder
from preflight.decoding.trial import (
    BFLOAT16,
    FLOAT32,
    LEAST_BYTES,
    LEAST_GAIN,
    NUMPY,
    PACKED,
    PACKED_BFLOAT16,
    DecodingFigures,
    choose_decoding_way,
    is_trial_affordable,
    list_decoding_ways,
    measure_decoding,
)
from preflight.device.remembered import FOLDER_VARIABLE
from preflight.models.base import TokenModel
from preflight.models.building import build_model
from preflight.models.packing import PackedLinear, can_pack
from preflight.modes import decoding_way
from preflight.modes.decoding_way import choose_decoding
from preflight.settings import ModelConfig, SamplingConfig

SECONDS = st.floats(1e-4, 10)
MANY = 10**6


def build() -> TokenModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97, context_length=16, n_embeddings=32, n_heads=2, n_layers=2, ffn_hid_dim=64
    )
    model = build_model(config).eval().requires_grad_(False)
    assert isinstance(model, TokenModel)
    return model


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16, without packed weights and with an empty cache; every model is tried."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(decoding_way, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(trial, "LEAST_BYTES", 0)
    monkeypatch.setattr(trial, "can_pack", lambda dtype: False)


def fake_figures(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[Sequence[str]]:
    """Trials find these seconds; the list gets the ways that they were asked for."""
    asked: list[Sequence[str]] = []
    found = {NUMPY: seconds["numpy"], FLOAT32: seconds["fp32"], BFLOAT16: seconds["bf16"]}

    def measure(model: TokenModel, ways: Sequence[str], rows: Sequence[int]) -> DecodingFigures:
        asked.append(ways)
        return DecodingFigures(seconds={way: found[way] for way in ways})

    monkeypatch.setattr(decoding_way, "measure_decoding", measure)
    return asked


def name_way(model: TokenModel, n_rows: int) -> str:
    dtype = next(model.parameters()).dtype
    decoder = Decoder(model, model.build_cache(n_rows, torch.device("cpu"), dtype))
    return NUMPY if decoder.is_in_numpy else str(dtype).removeprefix("torch.")


@given(SECONDS, SECONDS, SECONDS)
def test_the_fastest_is_taken_unless_it_gains_little(a: float, b: float, c: float) -> None:
    ways = [NUMPY, FLOAT32, BFLOAT16]
    figures = DecodingFigures(seconds=dict(zip(ways, (a, b, c), strict=True)))
    taken = figures.seconds[choose_decoding_way(figures, ways)]
    assert taken in (min(a, b, c), a)
    assert taken * (1 - LEAST_GAIN) <= min(a, b, c)


@given(st.integers(1, 10**11), st.integers(2, 3), st.integers(1, 10**7))
def test_a_trial_costs_at_most_its_share(n_bytes: int, n_ways: int, n_steps: int) -> None:
    if is_trial_affordable(n_bytes, n_ways, n_steps):
        # The steps of the trial alone, whatever the machine's rate.
        assert n_ways * 16 <= trial.TRIAL_SHARE * n_steps
        assert is_trial_affordable(n_bytes, n_ways, 2 * n_steps)
    assert not is_trial_affordable(n_bytes, n_ways, 100)


def test_a_small_model_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LEAST_BYTES", LEAST_BYTES)
    asked = fake_figures(monkeypatch, numpy=3.0, fp32=2.0, bf16=1.0)
    model = choose_decoding(build(), None, [1], MANY)
    assert (name_way(model, 1), asked) == (NUMPY, [])


@pytest.mark.parametrize(
    ("mixed", "n_rows", "seconds", "tried", "taken"),
    [
        (None, 1, (1.0, 2.0, 3.0), [NUMPY, FLOAT32, BFLOAT16], NUMPY),
        (None, 1, (2.0, 1.0, 3.0), [NUMPY, FLOAT32, BFLOAT16], FLOAT32),
        (None, 1, (2.0, 3.0, 1.0), [NUMPY, FLOAT32, BFLOAT16], BFLOAT16),
        (None, 1, (1.0, 0.95, 0.95), [NUMPY, FLOAT32, BFLOAT16], NUMPY),
        (None, 8, (9.0, 2.0, 1.0), [FLOAT32, BFLOAT16], BFLOAT16),
        (None, 8, (9.0, 1.0, 2.0), [FLOAT32, BFLOAT16], FLOAT32),
        (False, 1, (2.0, 1.0, 0.1), [NUMPY, FLOAT32], FLOAT32),
        (False, 8, (2.0, 1.0, 0.1), None, FLOAT32),
    ],
)
def test_what_is_tried_and_taken(
    monkeypatch: pytest.MonkeyPatch,
    mixed: bool | None,
    n_rows: int,
    seconds: tuple[float, float, float],
    tried: list[str] | None,
    taken: str,
) -> None:
    asked = fake_figures(monkeypatch, **dict(zip(("numpy", "fp32", "bf16"), seconds, strict=True)))
    assert name_way(choose_decoding(build(), mixed, [n_rows], MANY), n_rows) == taken
    assert asked == ([] if tried is None else [tried])
    # A second call takes the same without a trial, however short it is.
    assert name_way(choose_decoding(build(), mixed, [n_rows], 1), n_rows) == taken
    assert len(asked) == (tried is not None)


def test_a_short_generation_keeps_the_immediate_path(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_figures(monkeypatch, numpy=3.0, fp32=2.0, bf16=1.0)
    model = choose_decoding(build(), None, [1], 200)
    assert (name_way(model, 1), asked) == (NUMPY, [])


@pytest.mark.parametrize("packs", [False, True])
def test_a_trial_leaves_the_model_and_the_random_state(
    monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    model, untouched = build(), build()
    random = torch.get_rng_state()
    monkeypatch.setattr(trial, "can_pack", lambda dtype: packs and can_pack(dtype))
    ways = list_decoding_ways(model, [1, 3], has_bf16=True)
    figures = measure_decoding(model, ways, [1, 3])
    narrow = PACKED_BFLOAT16 if packs and can_pack(torch.bfloat16) else BFLOAT16
    assert list(figures.seconds) == ways == [NUMPY, FLOAT32, *([PACKED] * packs), narrow]
    assert torch.equal(torch.get_rng_state(), random)
    assert name_way(model, 1) == NUMPY
    for (name, weight), other in zip(
        model.state_dict().items(), untouched.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize(("seconds", "n_rounds"), [(0.1, 4), (0.2, 4), (0.4, 2), (50.0, 2)])
def test_slow_steps_are_timed_in_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch, seconds: float, n_rounds: int
) -> None:
    timed: list[Decoder] = []
    monkeypatch.setattr(trial, "_time_steps", lambda decoder: timed.append(decoder) or seconds)
    figures = measure_decoding(build(), [NUMPY, FLOAT32], [1])
    assert figures.seconds == {NUMPY: seconds, FLOAT32: seconds}
    assert len(timed) == 2 * n_rounds


def test_a_server_chooses_for_few_rows_and_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights, although one row alone would be faster in numpy."""
    monkeypatch.setattr(trial, "can_pack", lambda dtype: True)
    seconds = {(NUMPY, 1): 1.0, (FLOAT32, 1): 2.0, (PACKED, 1): 1.2}
    seconds |= {(NUMPY, 8): 8.0, (FLOAT32, 8): 8.0, (PACKED, 8): 3.0}
    monkeypatch.setattr(
        trial, "_time_steps", lambda decoder: seconds[way_of(decoder), len(decoder.cache.lengths)]
    )
    built: dict[int, str] = {}
    build_decoders = trial._build_decoders

    def build_and_note(way: str, model: TokenModel, rows: Sequence[int]) -> list[Decoder]:
        decoders = build_decoders(way, model, rows)
        built.update({id(decoder): way for decoder in decoders})
        return decoders

    def way_of(decoder: Decoder) -> str:
        return built[id(decoder)]

    monkeypatch.setattr(trial, "_build_decoders", build_and_note)
    figures = measure_decoding(build(), [NUMPY, FLOAT32, PACKED], [1, 8])
    assert figures.seconds == {NUMPY: 9.0, FLOAT32: 10.0, PACKED: pytest.approx(4.2)}
    model = choose_decoding(build(), False, [1, 8], MANY)
    assert isinstance(model.lm_head, PackedLinear)


def test_the_ways_write_the_same_text() -> None:
    """Greedy, with random weights whose logits lie apart."""
    sampling = SamplingConfig(max_new_tokens=8, do_sample=False)
    texts = []
    for way in (NUMPY, FLOAT32, *([PACKED] if can_pack(torch.float32) else [])):
        model = trial.prepare_for(way, build())
        assert name_way(model, 1) == (NUMPY if way == NUMPY else FLOAT32)
        texts.append(generate_ids(model, [[5, 6, 7]], sampling, batch_size=1))
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("packs", [False, True])
def test_a_model_in_bf16_stays_in_bf16(monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    packs = packs and can_pack(torch.bfloat16)
    monkeypatch.setattr(trial, "can_pack", lambda dtype: packs)
    model = build().to(torch.bfloat16)
    ways = list_decoding_ways(model, [1, 8], has_bf16=False)
    assert ways == [BFLOAT16, *([PACKED_BFLOAT16] if packs else [])]
    figures = DecodingFigures(seconds={way: 1 / (1 + i) for i, way in enumerate(ways)})
    monkeypatch.setattr(decoding_way, "measure_decoding", lambda *_: figures)
    served = decoding_way.choose_serving(model, 30)
    assert next(served.parameters()).dtype == torch.bfloat16
    assert isinstance(served.lm_head, PackedLinear) if packs else served is model
