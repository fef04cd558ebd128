"""Will it learn? Warnings about a run before it starts, each with its reason and a fix.

A warning does not stop a run. The thresholds come from the papers named beside them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from preflight.corpus.shards import DataFolder, Split
from preflight.models.cost import count_embedding_parameters, count_parameters
from preflight.settings import MODEL_PRESETS, PART_NAMES, ModelConfig, ModelSettings, RunConfig
from preflight.tokenization import Tokenizer
from preflight.training.plan import TrainingPlan

# Hoffmann et al. 2022 (arXiv:2203.15556, table 3): about 20 tokens per parameter are the best use
# of a given compute. A warning comes below a quarter of it.
TOKENS_PER_PARAMETER, FAR_UNDER = 20, 0.25
# Muennighoff et al. 2023 (arXiv:2305.16264, section 5): up to four epochs are as good as new text.
GOOD_EPOCHS = 4
# Brown et al. 2020 (arXiv:2005.14165, table 2.1): 0.5 M tokens per step at the learning rates of
# small to large, 1 M for xl. Smaller models need fewer, here in proportion to the parameters of
# their blocks.
REFERENCE_TOKENS_PER_STEP = 524_288
_REFERENCE_BLOCK_PARAMETERS = 85_000_000
# With Adam the best learning rate grows with the square root of the batch (Malladi et al. 2022,
# arXiv:2205.10287): at a sixteenth of the batch, a learning rate is four times too high.
_TOLERATED_BATCH_SHARE = 1 / 16
# The loss of single tokens has a standard deviation of about 3 nats: the mean of ten thousand is
# known to 0.03.
MEANINGFUL_VAL_TOKENS = 10_000

REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
MAX_SCANNED_TOKENS = 50_000_000
MAX_SCANNED_DOCUMENTS = 500_000
_CHUNK_TOKENS = 2**20
_MIN_DUPLICATE_TOKENS = 16  # shorter ones repeat in every language


@dataclass(frozen=True)
class Advice:
    """One warning: what and why, and the flag that fixes it. `key` names its kind."""

    key: str
    text: str
    fix: str


# ---- what the shards hold -----------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What the ids in the shards look like.

    Attributes:
        scanned_tokens: how many were read: all of them in folders of up to 50 M tokens.
        replacement_characters: U+FFFD, which stands where text was decoded wrongly.
        n_documents: whole documents among them.
        largest_tokens: the largest document.
        median_tokens: their median.
        duplicate_documents: documents of 16 tokens or more that equal an earlier one, in either
            split.
    """

    scanned_tokens: int
    replacement_characters: int
    n_documents: int
    largest_tokens: int
    median_tokens: int
    duplicate_documents: int


class _Scanner:
    """Splits streams of ids at the end-of-text id; keeps a length and eight bytes per document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._end_of_text_id = tokenizer.end_of_text_id
        self._replacements = np.zeros(tokenizer.vocab_size, dtype=np.uint8)
        for token in range(tokenizer.vocab_size):
            self._replacements[token] = (tokenizer.token_bytes(token) or b"").count(REPLACEMENT)
        self._seen: set[bytes] = set()
        self.lengths: list[int] = []
        self.duplicates = self.replacements = self.scanned = 0

    def scan(self, split: Split, max_tokens: int) -> None:
        """Read the first `max_tokens` of a split."""
        digest, length, left = hashlib.blake2b(digest_size=8), 0, max_tokens
        for shard in split.open():
            for start in range(0, min(len(shard), left), _CHUNK_TOKENS):
                ids = np.array(shard[start : min(start + _CHUNK_TOKENS, left)])
                self.scanned += len(ids)
                self.replacements += int(self._replacements[ids].sum(dtype=np.int64))
                begin = 0
                for end in np.flatnonzero(ids == self._end_of_text_id).tolist():
                    digest.update(ids[begin:end].tobytes())
                    self._add(digest.digest(), length + end - begin)
                    digest, length, begin = hashlib.blake2b(digest_size=8), 0, end + 1
                digest.update(ids[begin:].tobytes())
                length += len(ids) - begin
            left -= min(len(shard), left)
        if length and not left:
            self._add(digest.digest(), length)  # the scanned part of a document that goes on

    def _add(self, digest: bytes, length: int) -> None:
        if len(self.lengths) >= MAX_SCANNED_DOCUMENTS:
            return
        self.lengths.append(length)
        if length >= _MIN_DUPLICATE_TOKENS:
            self.duplicates += digest in self._seen
            self._seen.add(digest)


def scan_content(data: DataFolder, tokenizer: Tokenizer) -> Content:
    """Read the shards, in bounded memory and within some seconds."""
    scanner = _Scanner(tokenizer)
    total = data.train.n_tokens + data.val.n_tokens
    for split in (data.train, data.val):
        scanner.scan(split, min(split.n_tokens, MAX_SCANNED_TOKENS * split.n_tokens // total))
    lengths = scanner.lengths
    return Content(
        scanner.scanned,
        scanner.replacements,
        len(lengths),
        max(lengths, default=0),
        int(np.median(lengths)) if lengths else 0,
        scanner.duplicates,
    )


def find_content_warnings(content: Content) -> list[Advice]:
    """Warnings about text that was decoded wrongly, one dominating document, and duplicates."""
    found = []
    if content.replacement_characters * 10_000 > content.scanned_tokens:
        found.append(
            Advice(
                "replacement_characters",
                f"{content.replacement_characters:,} replacement characters (U+FFFD) in "
                f"{content.scanned_tokens:,} tokens: the text was decoded with the wrong encoding",
                "convert the source to UTF-8 again and give it with --text-file",
            )
        )
    largest = content.largest_tokens
    if (
        content.n_documents >= 10
        and largest > 100 * content.median_tokens
        and largest > 0.3 * content.scanned_tokens
    ):
        found.append(
            Advice(
                "large_document",
                f"one document has {largest:,} of {content.scanned_tokens:,} tokens, the median "
                f"{content.median_tokens:,}: the model will mostly learn that one",
                "check that it belongs there, or set --document-separator",
            )
        )
    if content.duplicate_documents * 100 > content.n_documents:
        found.append(
            Advice(
                "duplicates",
                f"{content.duplicate_documents:,} of {content.n_documents:,} documents repeat "
                "another: the model memorises them, and the validation loss looks too good",
                "remove them from the text and give it again with --text-file",
            )
        )
    return found


# ---- the plan -----------------------------------------------------------------------------------


def find_plan_warnings(
    config: RunConfig, model_config: ModelConfig, plan: TrainingPlan, data: DataFolder
) -> list[Advice]:
    """Every reason why this run may learn less than expected."""
    return [
        *find_short_text(model_config, plan, data),
        *_find_size_warnings(config, model_config, plan, data),
        *_find_rate_warnings(config, model_config, plan),
        *find_interval_warnings(config, plan),
    ]


def find_short_text(
    model_config: ModelConfig, plan: TrainingPlan, data: DataFolder
) -> list[Advice]:
    """A warning about a text that does not fill one window, and what it is good for."""
    is_asked = plan.window_tokens < data.train.n_tokens - 1  # by --window
    if is_asked or plan.window_tokens == model_config.context_length:
        return []
    return [
        Advice(
            "short_text",
            f"the training part has {data.train.n_tokens:,} tokens, less than one window of "
            f"{model_config.context_length:,}: the run trains on windows of {plan.window_tokens:,} "
            "tokens; such a text shows that everything works, but a model only memorises it",
            "more text with --text-file",
        )
    ]


def _find_size_warnings(
    config: RunConfig, model_config: ModelConfig, plan: TrainingPlan, data: DataFolder
) -> list[Advice]:
    """Too little text for the model, for the number of epochs, or to validate on."""
    found = []
    parameters = count_parameters(model_config)
    tokens = plan.total_steps * plan.tokens_per_step
    reads = plan.text_reads
    if tokens < FAR_UNDER * TOKENS_PER_PARAMETER * parameters:
        smaller = _suggest_size(model_config, tokens)
        found.append(
            Advice(
                "tokens_per_parameter",
                f"{tokens / parameters:.2g} tokens per parameter: far below the "
                f"{TOKENS_PER_PARAMETER} that make the best use of compute (Hoffmann et al. 2022)",
                f"more text with --text-file, or a longer run{smaller}",
            )
        )
    if reads > GOOD_EPOCHS:
        found.append(
            Advice(
                "epochs",
                f"{reads:,.1f} epochs of {data.train.n_tokens:,} tokens: after {GOOD_EPOCHS} "
                "little is gained, and the model memorises the text (Muennighoff et al. 2023)",
                f"--num-epochs {GOOD_EPOCHS}, or more text with --text-file",
            )
        )
        if model_config.dropout == 0:
            found.append(
                Advice(
                    "dropout",
                    f"no dropout in {reads:,.1f} epochs of the same text",
                    "--dropout 0.1 delays memorisation",
                )
            )
    if data.val.n_tokens < MEANINGFUL_VAL_TOKENS:
        error = 3 / math.sqrt(data.val.n_tokens)
        found.append(
            Advice(
                "validation",
                f"{data.val.n_tokens:,} validation tokens: the validation loss has a standard "
                f"error of about {error:.2f}",
                f"a larger --val-split (now {config.data.val_split:g}), "
                "or more text with --text-file",
            )
        )
    return found


def _suggest_size(model_config: ModelConfig, tokens: int) -> str:
    """The largest preset for which the tokens suffice, if it is smaller than this model.

    With the same parts, except for heads of keys and values, which not every preset has.
    """
    parts = {name: getattr(model_config, name) for name in PART_NAMES} | {"n_kv_heads": None}
    counts = {
        name: count_parameters(ModelSettings(name, **parts).resolve(model_config.vocab_size))
        for name in MODEL_PRESETS
    }
    enough = [n for n, count in counts.items() if count * TOKENS_PER_PARAMETER <= tokens]
    name = max(enough or MODEL_PRESETS, key=lambda n: counts[n] if enough else -counts[n])
    if counts[name] >= count_parameters(model_config):
        return ""
    return f", or --model-size {name}"


def _find_rate_warnings(
    config: RunConfig, model_config: ModelConfig, plan: TrainingPlan
) -> list[Advice]:
    """A learning rate made for larger batches, and a warm-up that never ends."""
    found = []
    blocks = count_parameters(model_config) - count_embedding_parameters(model_config)
    usual = config.model.learning_rate
    rate = config.peak_learning_rate
    size = min(1.0, blocks / _REFERENCE_BLOCK_PARAMETERS)
    wanted = REFERENCE_TOKENS_PER_STEP * size * (rate / usual) ** 2
    least = wanted * _TOLERATED_BATCH_SHARE
    if plan.tokens_per_step < least and config.training.optimizer != "sgd":
        accumulation = math.ceil(
            least / plan.tokens_per_step * config.training.gradient_accumulation_steps
        )
        calmer = rate * math.sqrt(plan.tokens_per_step / least)
        found.append(
            Advice(
                "tokens_per_step",
                f"{plan.tokens_per_step:,} tokens per step are far below the about "
                f"{round(wanted, -3):,.0f} that a learning rate of {rate:.1e} was made for "
                "(Brown et al. 2020): updates are noisy, and the loss may stay high",
                f"--gradient-accumulation-steps {accumulation}, or --learning-rate {calmer:.1e} "
                "(square-root rule, Malladi et al. 2022)",
            )
        )
    if plan.warmup_steps >= plan.total_steps and plan.warmup_steps > 1:
        found.append(
            Advice(
                "warmup",
                f"the warm-up of {plan.warmup_steps:,} steps is as long as the run of "
                f"{plan.total_steps:,}: the peak learning rate is never used",
                f"--warmup-steps {max(1, plan.total_steps // 20)}, or leave it out",
            )
        )
    return found


def find_interval_warnings(config: RunConfig, plan: TrainingPlan) -> list[Advice]:
    """Evaluations or checkpoints that come only at the end."""
    return [
        Advice(
            f"{what}_interval",
            f"the {what} interval of {every:,} steps is longer than the run of "
            f"{plan.total_steps:,} steps: the only {what} comes at the end",
            f"{flag} {max(1, plan.total_steps // 10)}, or leave it out",
        )
        for what, flag, every in (
            ("evaluation", "--eval-every", config.control.eval_every),
            ("checkpoint", "--checkpoint-every", config.control.checkpoint_every),
        )
        if every is not None and every > plan.total_steps
    ]
