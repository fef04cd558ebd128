"""Why a fine-tuning may teach less than expected, known before a step is paid."""

from __future__ import annotations

from preflight.corpus.chats.data import ChatData
from preflight.foresight.learnability import Advice, find_interval_warnings
from preflight.settings import RunConfig
from preflight.training.plan import TrainingPlan

FEW_CHATS, MANY_EPOCHS = 50, 5
_CUT_SHARE = 0.1  # of the chats that lose turns or their end, above which it is said


def find_chat_warnings(config: RunConfig, plan: TrainingPlan, chats: ChatData) -> list[Advice]:
    """Too few chats, too many epochs, answers without an end, chats that are cut."""
    counts = chats.facts.counts
    found = []
    if counts.n_chats < FEW_CHATS:
        found.append(
            Advice(
                "few_chats",
                f"{counts.n_chats:,} chats are few: the model may repeat them word by word",
                "more chats; a thousand good ones change how a model answers",
            )
        )
    if plan.epochs > MANY_EPOCHS:
        found.append(
            Advice(
                "epochs",
                f"{plan.epochs:.0f} epochs: chats that are read so often are memorised",
                "--num-epochs 2, or --early-stopping-patience 2",
            )
        )
    missing = counts.n_answers - counts.n_ended
    if missing:
        found.append(
            Advice(
                "ends",
                f"{missing:,} of {counts.n_answers:,} answers do not end with their end token: "
                "of these the model does not learn to stop",
                "a longer context, or shorter chats",
            )
        )
    n_cut = counts.n_cut + counts.n_cut_at_end
    if n_cut > _CUT_SHARE * counts.n_chats:
        found.append(
            Advice(
                "cut_chats",
                f"{n_cut:,} of {counts.n_chats:,} chats are longer than the context: they lose "
                "their first turns or the end of their last answer",
                "a model with a longer context",
            )
        )
    return [*found, *find_interval_warnings(config, plan)]
