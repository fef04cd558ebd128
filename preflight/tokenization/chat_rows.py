"""From the ids of a chat, and the places of its answers, to a row with its mask."""

from __future__ import annotations

import numpy as np

from preflight.core.log import log_once
from preflight.tokenization.chat_drafts import Draft
from preflight.tokenization.chats import EncodedChat
from preflight.tokenization.protocol import Tokenizer


class RowBuilder:
    """Cuts chats to the context, and masks what is not learned."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template_name: str,
        max_tokens: int,
        learn_from: str,
        stop_ids: frozenset[int],
    ) -> None:
        """`max_tokens`: of a row; `stop_ids`: those that end an answer."""
        self._template_name, self._max_tokens = template_name, max_tokens
        self._learns_all, self._stop_ids = learn_from == "all", stop_ids
        self._special_ids = frozenset(tokenizer.special_tokens.values())
        spelled = ((i, tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        # Ids of white space, which may follow the end token.
        self._blanks = {i for i, data in spelled if data is not None and not data.strip()}

    def build(self, draft: Draft) -> list[EncodedChat]:
        """The row of a draft, or none where it has nothing to learn."""
        ids = draft.ids
        n_kept = min(len(ids), self._max_tokens)
        begins, ends = draft.offsets[:, 0], draft.offsets[:, 1]
        mask = np.zeros(len(ids), bool)
        answers, n_ended = [], 0
        for begin, end in draft.spans:
            # As transformers counts: a token of which a part lies within.
            low = int(ends.searchsorted(begin, "right"))
            high = int(begins.searchsorted(end, "left"))
            high, ended = self._include_end(draft, low, high)
            mask[low:high] = True
            answers.append((low, high))
            n_ended += ended is not None and ended < n_kept
        mask[:1] = False
        n_answers = sum(bool(mask[low : min(high, n_kept)].any()) for low, high in answers)
        if self._learns_all:
            mask[1:] = True
            if draft.rewrites:  # where the answers are is not known, nor does it matter
                n_answers = sum(message.role == "assistant" for message in draft.kept)
                n_ended = sum(token in self._stop_ids for token in ids[1:n_kept].tolist())
        if not mask[:n_kept].any():
            return []
        n_cut = len(ids) - n_kept
        kept = (ids[:n_kept], mask[:n_kept])
        return [EncodedChat(*kept, n_answers, min(n_ended, n_answers), draft.n_dropped, n_cut)]

    def _include_end(self, draft: Draft, low: int, high: int) -> tuple[int, int | None]:
        """Where the answer ends with its end token, and the place of that token, if it has one."""
        ids = draft.ids
        for i in range(high - 1, low - 1, -1):
            if int(ids[i]) in self._stop_ids:
                return high, i
            if int(ids[i]) not in self._blanks:
                break
        if draft.is_marked and high < len(ids) and int(ids[high]) in self._special_ids:
            log_once(
                f"{self._template_name} leaves the token that ends an answer out of "
                "{% generation %}; it is learned too"
            )
            return high + 1, high
        return high, None
