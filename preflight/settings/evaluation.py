"""The flags of `--evaluate`, which is a mode too."""

from dataclasses import dataclass

from preflight.settings.options import setting

# Items of each kind that a level scores: LAMBADA's and other continuations, HellaSwag's and other
# choices, pages, windows of the validation text, and texts to continue. None: all.
EVALUATION_LEVELS: dict[str, dict[str, int | None]] = {
    "quick": {"last-word": 50, "choices": 20, "pages": 10, "text": 50, "generated": 10},
    "standard": {"last-word": 100, "choices": 50, "pages": 20, "text": 200, "generated": 20},
    "comprehensive": {
        "last-word": 200,
        "choices": 100,
        "pages": 50,
        "text": 1000,
        "generated": 50,
    },
    "all": {"last-word": None, "choices": None, "pages": None, "text": None, "generated": 200},
}


@dataclass(frozen=True)
class EvaluationSettings:
    """What `--evaluate` scores."""

    evaluate: str | None = setting(
        None,
        "how many items are scored (standard if nothing is said)",
        choices=tuple(EVALUATION_LEVELS),
        alone="standard",
    )
    tasks: tuple[str, ...] = setting(
        (),
        "files of tasks, or hf:OWNER/NAME[:CONFIG] on the hub: JSON lines of HellaSwag, LAMBADA, "
        "WikiText pages, multiple choice or continuations; a .txt is WikiText; unset: small sets "
        "of our own writing",
        metavar="FILE",
    )
    tasks_dir: str | None = setting(
        None, "folder of such files: all .jsonl and wiki*.txt in it", metavar="DIR"
    )
    checkpoints: tuple[str, ...] = setting(
        (),
        "checkpoints or output folders to evaluate; unset: --checkpoint-path, else the best in "
        "--output-dir",
        metavar="PATH",
    )
    contamination: str = setting(
        "auto",
        "look for the items in the run's own training text; auto: where it is short",
        choices=("auto", "yes", "no"),
    )
    evaluation_batch_tokens: int | None = setting(
        None, "tokens scored at once; unset: what fits into the free memory", ge=1, le=2**24
    )

    @property
    def limits(self) -> dict[str, int | None]:
        """Items to score of each kind of task."""
        return EVALUATION_LEVELS[self.evaluate or "standard"]
