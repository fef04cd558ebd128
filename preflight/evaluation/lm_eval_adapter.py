"""A Preflight checkpoint as a model of lm-evaluation-harness, so that its tasks can be run on it.

    model, tokenizer = load_model(open_checkpoint("training_output"), device, torch.float32)
    lm_eval.simple_evaluate(model=build_adapter(model, tokenizer), tasks=["lambada_openai"])

The harness (https://github.com/EleutherAI/lm-evaluation-harness) is no requirement: it is imported
when an adapter is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from generate import generate_batch
from preflight.core.libraries import import_library
from preflight.evaluation.encoding import encode_task
from preflight.evaluation.items import Item, ItemScore, Task, TaskKind
from preflight.evaluation.scoring import (
    RowScorer,
    choose_batch_tokens,
    collect_items,
    score_rows,
)
from preflight.models.protocol import LanguageModel
from preflight.settings import SamplingConfig
from preflight.tokenization import Tokenizer

_MOST_NEW_TOKENS = 256  # where a task does not say, as in the harness


def build_adapter(
    model: LanguageModel, tokenizer: Tokenizer, batch_tokens: int | None = None
) -> Any:
    """An object of the harness's class ``LM``.

    Args:
        model: ready to generate, on its device.
        tokenizer: the model's.
        batch_tokens: tokens scored at once; unset: what fits into the free memory.

    Raises:
        PreflightError: code FLAGS, when lm-eval is not installed.
    """
    base: Any = import_library("lm_eval.api.model", "lm-eval", "the lm-eval adapter").LM
    answers = _Answers(model, tokenizer, batch_tokens)

    class PreflightLM(base):
        """Requests of the harness, answered by `_Answers`; each holds its arguments in ``args``."""

        tokenizer_name = tokenizer.name

        def loglikelihood(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
            """Of each (context, continuation): log-likelihood, whether it is greedy."""
            return answers.score_pairs([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], **unused: Any) -> list[float]:
            """Of each text its log-likelihood."""
            return answers.score_pages([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], **unused: Any) -> list[str]:
            """Of each (context, settings) what the model generates."""
            return [answers.generate(*request.args) for request in requests]

    return PreflightLM()


class _Answers:
    """The three kinds of requests."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, batch_tokens: int | None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        weight = next(iter(model.parameters()))
        self.batch_tokens = batch_tokens or choose_batch_tokens(
            model.config, weight.device, weight.dtype
        )

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; those of the same context are scored together."""
        by_context: dict[str, dict[str, int]] = {}
        for context, continuation in pairs:
            known = by_context.setdefault(context, {})
            known.setdefault(continuation, len(known))
        items = [Item(context, tuple(known)) for context, known in by_context.items()]
        scores = dict(zip(by_context, self._score("choices", items), strict=True))
        found = []
        for context, continuation in pairs:
            score, index = scores[context], by_context[context][continuation]
            found.append((score.log_likelihoods[index], score.is_greedy[index]))
        return found

    def score_pages(self, pages: Sequence[str]) -> list[float]:
        """Log-likelihoods of whole texts."""
        scores = self._score("pages", [Item("", (page,)) for page in pages])
        return [score.log_likelihoods[0] for score in scores]

    def _score(self, kind: TaskKind, items: list[Item]) -> list[ItemScore]:
        task = Task("lm-eval", kind, "lm-eval", tuple(items))
        rows = encode_task(task, items, self.tokenizer, self.model.config.context_length).rows
        scorer = RowScorer(self.model, rows, self.batch_tokens)
        return collect_items(scorer.rows, score_rows(scorer), len(items))

    def generate(self, context: str, settings: dict[str, Any]) -> str:
        """What follows `context`, whose beginning is cut where both would not fit."""
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        most = self.model.config.context_length
        n_new = int(settings.get("max_gen_toks", settings.get("max_tokens", _MOST_NEW_TOKENS)))
        n_new = max(1, min(n_new, most - 1))
        ids = self.tokenizer.encode(context)
        if len(ids) > most - n_new:
            context = self.tokenizer.decode(ids[-(most - n_new) :])
        samples = bool(settings.get("do_sample", settings.get("temperature", 0) > 0))
        config = SamplingConfig(
            max_new_tokens=n_new,
            temperature=float(settings.get("temperature", 0) or 1) if samples else 0.0,
            top_k=0,
            top_p=float(settings.get("top_p", 1)),
            stop=tuple(text for text in stop if text),
            do_sample=samples,
        )
        return generate_batch(self.model, self.tokenizer, [context], config)[0].text
