"""Beam search against Hugging Face's, on the same weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import build_hugging_face
from preflight.decoding.beam import BeamSearcher
from preflight.decoding.completions import Generation
from preflight.decoding.vocabulary import AnyIds
from preflight.settings import ModelConfig, SamplingConfig
from transformer_model import DecoderOnlyTransformer

torch.set_num_threads(1)


@pytest.mark.parametrize("n_beams", [2, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("repetition", [1.0, 1.3])
def test_beams_equal_those_of_hugging_face(n_beams: int, penalty: float, repetition: float) -> None:
    end, n_tokens, ended = 7, 14, 0
    for seed in range(2):
        torch.manual_seed(seed)
        model = DecoderOnlyTransformer(ModelConfig(60, 32, 32, 4, 2, 64)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # what follows depends on all that came before
                parameter.mul_(8 if parameter.dim() > 1 else 1)
            # The end comes often.
            model.get_parameter("norm.bias").add_(3 * model.embed_tokens.weight[end])
        peer, _ = build_hugging_face(model, bos_token_id=0, eos_token_id=end)
        draw = torch.Generator().manual_seed(seed)
        prompts = torch.randint(8, 60, (6, 5), generator=draw)
        config = SamplingConfig(
            n_tokens, beams=n_beams, length_penalty=penalty, repetition_penalty=repetition
        )
        searcher = BeamSearcher(model, AnyIds(60, end), prompts.tolist(), config, batch_size=4)
        found: dict[int, Generation] = {}
        while searcher.rows:
            found.update(searcher.step())
        theirs = peer.eval().generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_beams=n_beams,
            do_sample=False,
            early_stopping=True,
            length_penalty=penalty,
            repetition_penalty=repetition,
            max_new_tokens=n_tokens,
            eos_token_id=end,
            pad_token_id=1,  # it takes 0 for none
        )
        for index, row in enumerate(theirs[:, 5:].tolist()):
            completion, n = found[index], found[index].n_tokens
            assert list(completion.tokens) == row[:n]
            assert set(row[n:]) <= {1}
            ended += completion.finish_reason == "end"
    assert 2 < ended < 12  # and others reach the last token
