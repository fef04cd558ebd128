"""Chats as token ids, with the mask of what is learned. T: tokens of a chat.

The template writes the whole chat as one text. It is cut at the special tokens that the template
wrote, and each stretch between them is encoded in one piece, as a published model reads it. An
answer is what lies between the template's ``{% generation %}`` marks. Without marks it is what
rendering the chat up to the answer adds to rendering the prompt before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Generator, Sequence

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.log import log_once
from preflight.tokenization.chat_drafts import Draft, cut_batches, drop_behind, start_draft
from preflight.tokenization.chat_rows import RowBuilder
from preflight.tokenization.chat_template import ChatTemplate
from preflight.tokenization.chats import Chat, EncodedChat, Message, PromptTooLongError
from preflight.tokenization.protocol import Tokenizer
from preflight.tokenization.special_spellings import SpecialSpellings, Table
from preflight.tokenization.template_process import TEMPLATE_PROCESS, Rendering, RenderJob

_VERSION = b"1"  # of the ids and masks that this file makes


class ChatEncoder:
    """Chats to rows of ids and masks.

    Attributes:
        tokenizer, template: of the model.
        context_length: T + 1 tokens give T targets, so that a row has at most one more than this.
        learn_from: ``answers``, or ``all`` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        context_length: int,
        *,
        learn_from: str = "answers",
    ) -> None:
        """Nothing is rendered yet.

        Raises:
            PreflightError: code CHECKPOINT, where the tokenizer has no token that ends an answer.
        """
        self.tokenizer, self.template = tokenizer, template
        self.context_length, self.learn_from = context_length, learn_from
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        if tokenizer.end_of_text_id not in names:
            raise PreflightError(
                ExitCode.CHECKPOINT,
                f"the tokenizer {tokenizer.name} has no token that ends an answer",
                "choose a model whose tokenizer names an eos_token",
            )
        if tokenizer.adds_end:
            log_once(
                f"the tokenizer {tokenizer.name} has no token that ends a text: "
                f"{names[tokenizer.end_of_text_id]} was added as id {tokenizer.end_of_text_id:,}, "
                "which a model trained elsewhere has never seen"
            )
        bos_token = "" if tokenizer.bos_id is None else names.get(tokenizer.bos_id, "")
        self._variables = {"bos_token": bos_token, "eos_token": names[tokenizer.end_of_text_id]}
        self._spellings = SpecialSpellings(tokenizer)
        self._limit = context_length + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of everything that ids and masks depend on: equal only if they are equal."""
        digest = hashlib.sha256(_VERSION)
        for part in (self.tokenizer.fingerprint, self.template.fingerprint, self.learn_from):
            digest.update(part.encode() + b" ")
        digest.update(b"%d" % self.context_length)
        return digest.hexdigest()

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the end of text, and what this template writes after one."""
        messages = [Message("user", "ping"), Message("assistant", "pong")]
        [(rendering, table)] = self._render([RenderJob(messages)])
        _, answer, behind = rendering.text.rpartition("pong")
        stops = {self.tokenizer.end_of_text_id}
        for _, _, special, stretch in self._spellings.cut(behind if answer else "", table):
            if special is not None:
                return frozenset(stops | {special})
            if stretch.strip():
                break
        log_once(
            f"{self.template.name} writes no special token after an answer: a model that is "
            "fine-tuned with it does not learn to end its answers"
        )
        return frozenset(stops)

    # ---- training ---------------------------------------------------------------------------

    def encode(self, chats: Sequence[Chat]) -> list[list[EncodedChat]]:
        """The rows of each chat.

        One row has all answers of a chat as targets, each after its whole history. Where the
        template writes an answer's history otherwise than the chat's (it leaves out earlier
        thoughts, for example), each answer has a row of its own. A chat without an answer that
        fits has none.

        Raises:
            PreflightError: code TEXT, for a chat that the template refuses or the tokenizer cannot
                encode; the template's code, where the template does not work.
        """
        rows: list[list[EncodedChat]] = []
        for batch in cut_batches(chats):
            rows += self._encode_batch(batch)
        return rows

    def _encode_batch(self, chats: Sequence[Chat]) -> list[list[EncodedChat]]:
        rows: list[list[EncodedChat]] = [[] for _ in chats]
        drafts: list[tuple[int, Draft]] = []  # with the place in `chats`
        for i, chat in enumerate(chats):
            messages = chat.messages if self.learn_from == "all" else drop_behind(chat.messages)
            if messages:
                drafts.append((i, start_draft(messages, chat.place, self._limit)))
        self._fit([draft for _, draft in drafts], self._limit)
        self._find_answers([draft for _, draft in drafts if not draft.spans], "all")
        for i, draft in drafts:
            parts = [draft]
            if draft.rewrites and self.learn_from == "answers":
                parts = self._split(draft)
            rows[i] = [row for part in parts for row in self._rows.build(part)]
        return rows

    def _split(self, draft: Draft) -> list[Draft]:
        """A draft for each answer, with what comes before it."""
        parts = [
            start_draft(draft.messages[: end + 1], draft.place, self._limit)
            for end, message in enumerate(draft.messages)
            if message.role == "assistant"
        ]
        self._fit(parts, self._limit)
        self._find_answers(parts, "last")
        return parts

    def _fit(self, drafts: Sequence[Draft], limit: int, *, prompt: bool = False) -> None:
        """Drop the earliest turns of each draft until its ids fit, or the last exchange is left."""
        pending = list(drafts)
        while pending:
            jobs = [RenderJob(draft.kept, draft.place, prompt) for draft in pending]
            with contextlib.closing(self._render(jobs, today=prompt)) as renderings:
                for draft, (rendering, table) in zip(pending, renderings, strict=True):
                    draft.ids, draft.offsets = self._spellings.encode(rendering.text, table)
                    draft.spans, draft.is_marked = rendering.spans, bool(rendering.spans)
            pending = [draft for draft in pending if draft.narrow(fits=len(draft.ids) <= limit)]

    def _find_answers(self, drafts: Sequence[Draft], which: str) -> None:
        """Find the answers by rendering what comes before them."""
        jobs = [RenderJob(draft.kept, draft.place, answers=which) for draft in drafts]
        with contextlib.closing(self._render(jobs)) as renderings:
            for draft, (rendering, _) in zip(drafts, renderings, strict=True):
                draft.spans, draft.rewrites = rendering.spans, rendering.rewrites
                draft.is_marked = False

    @functools.cached_property
    def _rows(self) -> RowBuilder:
        return RowBuilder(
            self.tokenizer, self.template.name, self._limit, self.learn_from, self.stop_ids
        )

    # ---- generation -------------------------------------------------------------------------

    def encode_prompt(self, messages: Sequence[Message], *, max_tokens: int) -> list[int]:
        """The ids after which the model answers `messages`, see `fit_prompt`."""
        return self.fit_prompt(messages, max_tokens=max_tokens)[0]

    def find_room(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have. A long answer must not take all of the context away from
        what it answers.
        """
        return max(self.context_length - max_new_tokens, self.context_length // 2)

    def fit_prompt(self, messages: Sequence[Message], *, max_tokens: int) -> tuple[list[int], int]:
        """The ids after which the model answers, and how many messages they leave out.

        The earliest turns are dropped until the rest fits; a system message is kept.

        Raises:
            PromptTooLongError: code TEXT, where the last turn alone is too long.
            PreflightError: see `encode`.
        """
        draft = start_draft(messages, "", max_tokens)
        self._fit([draft], max_tokens, prompt=True)
        if len(draft.ids) > max_tokens:
            raise PromptTooLongError(
                ExitCode.TEXT,
                f"the message has {len(draft.ids):,} tokens with what belongs to it, and "
                f"{max(max_tokens, 0):,} fit into the context",
                "shorten it, or lower --max-new-tokens",
            )
        return draft.ids.tolist(), draft.n_dropped

    # ---- both -------------------------------------------------------------------------------

    def _render(
        self, jobs: Sequence[RenderJob], *, today: bool = False
    ) -> Generator[tuple[Rendering, Table], None, None]:
        """The renderings in order, and what undoes the hiding of special tokens."""
        hidden, tables = [], []
        for job in jobs:
            messages, table = self._spellings.hide(job.messages)
            hidden.append(dataclasses.replace(job, messages=messages))
            tables.append(table)
        if hidden:
            with TEMPLATE_PROCESS.rendering(
                self.template, self._variables, hidden, today=today
            ) as renderings:
                yield from zip(renderings, tables, strict=True)
