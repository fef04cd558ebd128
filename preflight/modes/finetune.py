"""`--finetune`: teach a trained model to answer, from chats; the same run as `--train`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from generate import stream_ids
from preflight.core.commands import format_command
from preflight.core.errors import PreflightError
from preflight.core.log import log
from preflight.corpus.chats.preview import describe_chats
from preflight.corpus.metadata import METADATA_NAME
from preflight.corpus.shards import DataFolder, load_data_folder
from preflight.modes.finetune_setup import FinetuneSetup
from preflight.modes.ranked import RunKind, run_on_ranks
from preflight.modes.train import TrainingRun
from preflight.settings import RunConfig, SamplingConfig
from train_utils import iterate_windows

ANSWER_TOKENS = 64  # of the sample answer at each evaluation
TEXT_WINDOWS = 64  # of the pre-training text, on which forgetting shows


def run(config: RunConfig) -> int:
    """Prepare the chats, train, and return the exit code.

    Raises:
        PreflightError: with the code of whatever stands in the way.
    """
    return run_on_ranks(config, RunKind(FinetuneSetup, lambda setup: FinetuneRun(setup).run()))


class FinetuneRun(TrainingRun):
    """A run on chats: it shows an answer at each evaluation, and what it forgets."""

    setup: FinetuneSetup

    def run(self) -> int:
        """Train to the end of the plan, or until a signal; the exit code."""
        self.setup.kept_base  # noqa: B018
        for line in describe_chats(self.setup.data.facts):
            log.info(f"chats: {line}")
        if self.state.step == 0:
            self.setup.base_facts["text_bits_per_byte"] = self._measure_text()
        return super().run()

    def _sample(self) -> str:
        """What the model answers to the first chat of the validation part."""
        encoder = self.setup.encoder
        with self.setup.data.open_rows("val") as rows:
            [(ids, mask)] = rows.read(np.array([0]))
        prompt = ids[: int(mask.argmax())].tolist()
        sampling = SamplingConfig(
            max_new_tokens=ANSWER_TOKENS, temperature=0.0, seed=self.config.training.seed
        )
        self.trainer.model.eval()
        with self.runtime.autocast(), self.ranks.open_root(self.trainer.model):
            pieces = stream_ids(
                self.trainer.model,
                self.setup.tokenizer,
                prompt,
                sampling,
                stop_ids=encoder.stop_ids,
            )
            answer = "".join(pieces)
        self.trainer.model.train()
        return answer

    def _measure_text(self) -> float | None:
        """Bits per byte on the text that the base learned from; None where it is not here."""
        data = self._open_text()
        if data is None:
            return None
        windows = iterate_windows(
            data,
            "val",
            batch_size=self.config.training.batch_size,
            context_length=self.setup.context_length,
            n_windows=TEXT_WINDOWS,
            device=self.runtime.device,
            ranks=self.ranks,
        )
        found = self.trainer.evaluate(windows, data.val.n_tokens / data.val.n_bytes, self.stop)
        return None if found is None else found.bits_per_byte

    def _open_text(self) -> DataFolder | None:
        """The data folder of `--data-dir`, where the base's tokenizer made it."""
        data_dir = self.config.data.data_dir
        if not os.path.lexists(os.path.join(data_dir, METADATA_NAME)):
            log.info(
                f"forgetting: not measured, for {data_dir} holds no text; --data-dir names the "
                "data folder that the base learned from"
            )
            return None
        try:
            data = load_data_folder(Path(data_dir), self.setup.tokenizer)
        except PreflightError as error:
            log.info(f"forgetting: not measured: {error.lines[0]}")
            return None
        if data.fingerprint != self.setup.base_facts["data_fingerprint"]:
            log.info(f"forgetting: {data_dir} is not the text that the base learned from")
        return data

    def _conclude(self, seconds: float) -> int:
        """As `TrainingRun._conclude`; what was forgotten is measured by all ranks together."""
        is_asked = self.setup.bits_before is not None and not self.stop.stopping
        self.bits_after = self._measure_text() if is_asked else None
        return super()._conclude(seconds)

    def _suggest(self) -> None:
        """What was forgotten, and how to talk to the model."""
        before, after = self.setup.bits_before, self.bits_after
        if before is not None and after is not None:
            log.info(
                f"forgetting: {before:.3f} bits per byte on the text of the base before, "
                f"{after:.3f} now ({after - before:+.3f})"
            )
        command = format_command("--generate", "--chat", "--output-dir", self.output_dir)
        log.info(f"talk to it: {command}")
