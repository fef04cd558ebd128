"""The flags of the optimization."""

from dataclasses import dataclass

from preflight.settings.finetuning import AdapterConfig
from preflight.settings.kinds import OPTIMIZERS, SCHEDULES
from preflight.settings.options import MAX_COUNT, setting


@dataclass(frozen=True)
class TrainingSettings:
    """Batch size, optimizer, learning rate and length of the run."""

    batch_size: int = setting(8, "sequences per micro-step", ge=1, le=1_048_576)
    gradient_accumulation_steps: int = setting(
        1, "micro-steps per optimizer step", ge=1, le=1_048_576
    )
    learning_rate: float | None = setting(
        None, "peak learning rate; unset: what suits the model's size", gt=0, le=1e30
    )
    weight_decay: float = setting(
        0.1, "weight decay of the weight matrices (not biases, norms, embeddings)", ge=0, le=1e3
    )
    beta1: float = setting(0.9, "Adam's beta1; the momentum of sgd; muon's own is 0.95", ge=0, lt=1)
    beta2: float = setting(0.95, "Adam's beta2", ge=0, lt=1)
    eps: float = setting(1e-8, "Adam's epsilon", gt=0, le=1)
    max_grad_norm: float = setting(
        1.0, "clip the gradient norm to this value; 0: no clipping", ge=0, le=1e30
    )
    warmup_steps: int | None = setting(
        None,
        "steps of learning rate warm-up; unset: 5 % of the run, at most 2,000",
        ge=0,
        le=MAX_COUNT,
    )
    max_steps: int | None = setting(
        None,
        "optimizer steps to train; with --num-epochs, the shorter of both",
        ge=1,
        le=MAX_COUNT,
    )
    num_epochs: float | None = setting(
        None, "epochs to train; unset, and no --max-steps: 3", gt=0, le=1e6
    )
    optimizer: str = setting(
        "adamw",
        "optimizer; muon: for the weight matrices, with adamw for the rest",
        choices=OPTIMIZERS,
    )
    scheduler: str = setting("cosine", "learning rate schedule after warm-up", choices=SCHEDULES)
    window: int | None = setting(
        None, "tokens of a training window; unset: the context length", ge=2, le=MAX_COUNT
    )
    overlap: float = setting(
        0.0,
        "share of each training window that the next one repeats: at 0.5 an epoch reads the text "
        "twice",
        ge=0,
        lt=1,
    )
    seed: int = setting(
        42, "random seed of initialization, data order, dropout and sampling", ge=0, le=2**63 - 1
    )
    adapter: AdapterConfig | None = None  # of the flags of --finetune, no flag of this group

    def choose_window(self, context_length: int) -> int:
        """Tokens of a window at most: `--window`, or the context length."""
        return min(self.window or context_length, context_length)
