"""How many tokens per step learning can use: the critical batch size, and the number of updates.

With B tokens per step, a loss takes S steps and E = S B tokens, where (S / S_min - 1) times
(E / E_min - 1) is 1 (McCandlish et al. 2018, arXiv:1812.06162, section 2.3). So E = E_min times
(1 + B / B_crit), with B_crit = E_min / S_min. Far below the critical batch size B_crit nothing is
wasted; far above it, twice the tokens per step are twice the tokens for the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from preflight.corpus.chats.data import ChatData
from preflight.corpus.shards import DataFolder
from preflight.foresight.learnability import TOKENS_PER_PARAMETER, Advice
from preflight.models.cost import count_embedding_parameters, count_parameters
from preflight.settings import ModelConfig, RunConfig
from preflight.training.plan import TrainingPlan

# Kaplan et al. 2020, arXiv:2001.08361: B_crit(L) = B* / L^(1 / alpha_B) in tokens (equation 1.4),
# and L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D in nats per token (equation 1.5,
# fitted in table 2), for N parameters without embeddings and a text of D tokens.
_CRITICAL_TOKENS, _CRITICAL_EXPONENT = 2e8, 0.21
_PARAMETERS, _PARAMETER_EXPONENT = 6.4e13, 0.076
_TEXT_TOKENS, _TEXT_EXPONENT = 1.8e13, 0.103
_BYTES_PER_TOKEN = 4.2  # of their text, 96 GB in 22.9 G tokens
# Adam moves a weight by at most about the learning rate in an update (Kingma & Ba 2015, section
# 2.1), so that a new model needs some 1 / learning rate updates. Trained weights move little; there
# its second moments, averages over 1 / (1 - beta2) updates (section 3), are to be renewed.
_LEAST_SPANS = 5
_WASTEFUL, _SMALLER = 2.0, 4  # times the tokens of a batch so many times smaller: a warning


@dataclass(frozen=True)
class LearningNeeds:
    """What the number of tokens per step means for what is learned.

    Attributes:
        text_tokens: of one epoch.
        plan_tokens: of the whole run.
        critical_tokens: B_crit at the end of the run, in tokens per step.
        least_updates: with fewer in a run, each counts.
        is_assumed: whether the text is not known, and one of a usual length is assumed.
    """

    text_tokens: float
    plan_tokens: float
    critical_tokens: float
    least_updates: int
    is_assumed: bool = False

    def count_updates(self, tokens_per_step: int) -> tuple[int, int]:
        """Updates of an epoch and of the run."""
        return tuple(  # type: ignore[return-value]
            max(1, round(tokens / tokens_per_step))
            for tokens in (self.text_tokens, self.plan_tokens)
        )

    def count_times_tokens(self, tokens_per_step: int) -> float:
        """Tokens for a loss, as a multiple of those that very small batches would need."""
        missing = self.least_updates * tokens_per_step / self.plan_tokens
        return (1 + tokens_per_step / self.critical_tokens) * max(1.0, missing)

    def explain(self, tokens_per_step: int) -> str:
        """In words, what so many tokens per step cost."""
        in_epoch, in_run = self.count_updates(tokens_per_step)
        return (
            f"{tokens_per_step:,} tokens per step are {in_epoch:,} updates an epoch, {in_run:,} in "
            f"the run, and need {self.count_times_tokens(tokens_per_step):.1f} x the tokens of a "
            "very small batch for the same loss"
        )

    @property
    def basis(self) -> str:
        """Where the multiple comes from."""
        assumed = (
            f"a text of {TOKENS_PER_PARAMETER} tokens per parameter is assumed, --prepare first to "
            "weigh yours; "
        )
        return (assumed if self.is_assumed else "") + (
            f"the learning rate wants about {self.least_updates:,} updates; the critical batch "
            f"size is {self.critical_tokens:,.0f} tokens, Kaplan et al. 2020"
        )


def estimate_critical_tokens(n_parameters: float, text_tokens: float) -> float:
    """B_crit, in tokens of GPT-2, at the loss that a text of `text_tokens` allows such a model.

    Args:
        n_parameters: of the blocks, without embeddings.
        text_tokens: tokens of GPT-2 that are different text; a second epoch adds none.
    """
    size = (_PARAMETERS / n_parameters) ** (_PARAMETER_EXPONENT / _TEXT_EXPONENT)
    loss = (size + _TEXT_TOKENS / text_tokens) ** _TEXT_EXPONENT
    return _CRITICAL_TOKENS / loss ** (1 / _CRITICAL_EXPONENT)


def estimate_learning_needs(
    config: RunConfig, model_config: ModelConfig, plan: TrainingPlan, data: DataFolder | None
) -> LearningNeeds:
    """What learning wants of a run.

    Args:
        config: optimizer, learning rate, and whether the model begins with trained weights.
        model_config: the architecture.
        plan: the length of the run.
        data: the text; unset: 20 tokens per parameter are assumed, read once.
    """
    has_learned = config.finetuning.finetune or config.control.init_from is not None
    parameters = count_parameters(model_config)
    blocks = max(1, parameters - count_embedding_parameters(model_config))
    learned = TOKENS_PER_PARAMETER * parameters
    scale, text, run = 1.0, float(learned), float(learned)
    if data is not None:
        run = plan.total_steps * plan.tokens_per_step
        text = plan.steps_per_epoch * plan.tokens_per_step
        if not isinstance(data, ChatData):
            scale = data.train.n_bytes / data.train.n_tokens / _BYTES_PER_TOKEN
    read, least_updates = text * scale, 1 / config.peak_learning_rate
    if has_learned:
        read = max(read, learned)
    if has_learned or config.training.optimizer == "sgd":
        least_updates = _LEAST_SPANS / (1 - config.training.beta2)
    return LearningNeeds(
        text,
        run,
        estimate_critical_tokens(blocks, read) / scale,
        max(1, round(least_updates)),
        is_assumed=data is None,
    )


def find_batch_warnings(
    config: RunConfig, needs: LearningNeeds, plan: TrainingPlan
) -> list[Advice]:
    """A warning about updates so large that much of the text is read in vain.

    None where `--max-steps` sets the length: there a larger batch means more text.
    """
    sequences = plan.samples_per_step
    times = needs.count_times_tokens(plan.tokens_per_step)
    smaller = needs.count_times_tokens(plan.tokens_per_step // _SMALLER)
    if config.training.max_steps or sequences < _SMALLER or times < _WASTEFUL * smaller:
        return []
    return [
        Advice(
            "critical_batch",
            f"{needs.explain(plan.tokens_per_step)}: {needs.basis}",
            f"--batch-size {max(1, sequences // _SMALLER)} --gradient-accumulation-steps 1 needs "
            f"{smaller:.1f} x; --get-optimal-bs weighs it against the speed",
        )
    ]
