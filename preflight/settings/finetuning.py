"""The flags of `--finetune`, which is a mode too."""

from dataclasses import dataclass

from preflight.settings.options import setting

# Modes that foresee or try a run: beside `--finetune` they do so for a fine-tuning.
FINETUNING_MODES = ("check", "get-optimal-bs")
ADAPTER_TARGETS = ("qkv_proj", "o_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter (LoRA, Hu et al. 2021, arXiv:2106.09685): y = W x + alpha / rank * B A x.

    Attributes:
        rank: rows of A and columns of B.
        alpha: divided by the rank, the factor of B A.
        targets: names of the linear layers that get one, in every block.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class FinetuningSettings:
    """What `--finetune` learns from, and which weights learn."""

    finetune: tuple[str, ...] = setting(
        (),
        "chats to learn from: .jsonl, .json or .parquet, as OpenAI messages, LIMA or ShareGPT "
        "conversations, Alpaca, or prompt and completion",
        metavar="CHATS",
    )
    from_checkpoint: str | None = setting(
        None,
        "the checkpoint to fine-tune (its folder, or a run's); unset: the best in training_output",
        metavar="CHECKPOINT",
        flag="--from",
    )
    chat_template: str | None = setting(
        None,
        "a chat template of your own, in Jinja; unset: the checkpoint's, else User: and Assistant:",
        metavar="FILE",
    )
    learn_from: str = setting(
        "answers",
        "the tokens that are learned: the assistant's answers, or all, as in pre-training",
        choices=("answers", "all"),
    )
    lora_rank: int = setting(
        0, "train low-rank adapters of this rank, not the weights; 0: the weights", ge=0, le=4096
    )
    lora_alpha: float | None = setting(
        None, "the adapters' factor is this over the rank; unset: twice the rank", gt=0, le=1e6
    )
    lora_targets: tuple[str, ...] = setting(
        (),
        "linear layers that get an adapter, of qkv_proj o_proj up_proj gate_up_proj down_proj; "
        "unset: all in the blocks",
        choices=ADAPTER_TARGETS,
        metavar="LAYER",
    )

    @property
    def adapter(self) -> AdapterConfig | None:
        """The adapters to train; ``None``: all weights learn."""
        if not self.lora_rank:
            return None
        alpha = self.lora_alpha or 2.0 * self.lora_rank
        return AdapterConfig(self.lora_rank, alpha, self.lora_targets or ADAPTER_TARGETS)
