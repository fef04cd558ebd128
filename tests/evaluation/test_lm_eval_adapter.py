"""The harness's interface, with a stand-in for its base class; the harness runs in a benchmark."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from generate import generate_text
from preflight.core.errors import ExitCode, PreflightError
from preflight.evaluation.items import Item
from preflight.evaluation.lm_eval_adapter import build_adapter
from preflight.models.building import build_model
from preflight.settings import SamplingConfig
from preflight.tokenization import load_tokenizer

from .slow_scorer import build_config, score_slowly

TOKENIZER = load_tokenizer("byte")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lm_eval.api.model")
    module.LM = type("LM", (), {})  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)


def build() -> Any:
    torch.manual_seed(5)
    model = build_model(build_config("gpt2")).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3)
    return model


def ask(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_pairs_in_any_order_get_their_own_scores(harness: None) -> None:
    model = build()
    pairs = [("ab", " c"), ("x y", " de"), ("ab", " def"), ("", "q"), ("ab", " c")]
    found = build_adapter(model, TOKENIZER, 30).loglikelihood([ask(*pair) for pair in pairs])
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        [slow] = score_slowly(model, TOKENIZER, "choices", [Item(context, (continuation,))])
        assert value == pytest.approx(slow.log_likelihoods[0], abs=2e-4)
        assert is_greedy == slow.is_greedy[0]


def test_pages_are_scored_in_windows(harness: None) -> None:
    model, pages = build(), ["a" * 60, "bc", "defg" * 20]
    found = build_adapter(model, TOKENIZER).loglikelihood_rolling([ask(page) for page in pages])
    slow = score_slowly(model, TOKENIZER, "pages", [Item("", (page,)) for page in pages])
    assert found == pytest.approx([score.log_likelihoods[0] for score in slow], abs=1e-3)


def test_generation_is_greedy_and_ends_before_a_stop_text(harness: None) -> None:
    model = build()
    greedy = SamplingConfig(max_new_tokens=8, do_sample=False)
    whole = generate_text(model, TOKENIZER, "ab", greedy)
    adapter = build_adapter(model, TOKENIZER)
    [found] = adapter.generate_until([ask("ab", {"until": [], "max_gen_toks": 8})])
    assert found == whole
    stop = whole[2:4]
    [found] = adapter.generate_until([ask("ab", {"until": [stop], "max_gen_toks": 8})])
    assert found == whole[: whole.index(stop)]


def test_a_long_context_loses_its_beginning(harness: None) -> None:
    model = build()
    greedy = SamplingConfig(max_new_tokens=8, do_sample=False)
    text = "".join(chr(97 + i % 7) for i in range(40))
    adapter = build_adapter(model, TOKENIZER)
    [found] = adapter.generate_until([ask(text, {"until": "\n\n", "max_gen_toks": 8})])
    assert found == generate_text(model, TOKENIZER, text[-16:], greedy)


def test_without_the_harness_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(PreflightError, match="pip install lm-eval") as caught:
        build_adapter(build(), TOKENIZER)
    assert caught.value.code == ExitCode.FLAGS
