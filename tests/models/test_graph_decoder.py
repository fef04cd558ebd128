"""A step whose positions lie on the device, and its recordings on CUDA, against plain decoding."""

from __future__ import annotations

import pytest
import torch

from generate import generate_batch
from preflight.models.building import build_model
from preflight.models.graph_decoder import EAGER_STEPS, FIRST_SLOTS, GraphDecoder, GraphStep
from preflight.settings import ModelSettings, SamplingConfig
from preflight.tokenization import load_tokenizer
from transformer_model import DecoderOnlyTransformer

FAMILIES = ["gpt2", "llama"]


def build(family: str, device: str, context_length: int = 512) -> DecoderOnlyTransformer:
    torch.manual_seed(3)
    config = ModelSettings(
        model_size="custom",
        model_family=family,
        n_layers=2,
        n_heads=4,
        n_embeddings=32,
        context_length=context_length,
    ).resolve(257)
    model = build_model(config)
    assert isinstance(model, DecoderOnlyTransformer)
    for parameter in model.parameters():  # far from zero, so that greedy choices are no ties
        parameter.data.mul_(3)
    return model.to(device).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_step_computes_what_a_decode_step_does(family: str, device: str) -> None:
    model = build(family, device)
    lengths, n_slots = [5, 1, 9], 16
    tokens = torch.randint(0, 257, (3, 9), generator=torch.Generator().manual_seed(1)).to(device)
    caches = [model.build_cache(3, torch.device(device), torch.float32) for _ in range(2)]
    for cache in caches:
        model.prefill(tokens, cache, [0, 1, 2], lengths)
    positions = torch.tensor(lengths, device=device)
    for step in range(3):
        new = tokens[:, step]
        expected = model.decode(new, caches[0])
        found = model.decode_step(new, GraphStep(caches[1], positions, n_slots))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        positions += 1
    for a, b in zip(caches[1].layers, caches[0].layers, strict=True):
        for row, length in enumerate(caches[0].lengths):
            torch.testing.assert_close(a[:, row, :, :length], b[:, row, :, :length])


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_recorded_steps_generate_what_plain_ones_do(
    family: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several lengths end at different times, a waiting prompt takes a row over, the
    attended slots double, and the window slides.
    """
    model = build(family, "cuda", context_length=2 * FIRST_SLOTS)
    tokenizer = load_tokenizer("byte")
    prompts = ["a", "some longer prompt", "x" * 100, "another", "y" * 37]
    config = SamplingConfig(max_new_tokens=FIRST_SLOTS + 90, temperature=temperature, stop=("ab",))
    replays: list[int] = []
    decode = GraphDecoder.decode

    def spy(self: GraphDecoder, tokens: torch.Tensor) -> torch.Tensor:
        replays.append(len(self._graphs))
        return decode(self, tokens)

    monkeypatch.setattr(GraphDecoder, "decode", spy)
    found = generate_batch(model, tokenizer, prompts, config, batch_size=3)
    assert len(replays) > EAGER_STEPS
    assert max(replays) == 2
    monkeypatch.setattr(DecoderOnlyTransformer, "fast_decoder", lambda self, cache: None)
    assert generate_batch(model, tokenizer, prompts, config, batch_size=3) == found
