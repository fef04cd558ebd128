"""`--generate --chat`: a conversation with the model, on a terminal or from a pipe.

The conversation is rendered with the chat template that the model was fine-tuned with, as a whole
for each answer. Only answers go to stdout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence

from generate import OnStep, stream_ids
from preflight.checkpoints.format import Checkpoint
from preflight.core.log import log, log_once
from preflight.models.base import TokenModel
from preflight.modes.session import Session
from preflight.settings import RunConfig
from preflight.tokenization import Tokenizer
from preflight.tokenization.chat_encoding import ChatEncoder
from preflight.tokenization.chat_template import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    load_chat_template,
)
from preflight.tokenization.chats import Message
from preflight.training.chat_templates import read_checkpoint_template

HELP = """\
Type a message and press Enter: the model answers. Ctrl-C stops an answer. Commands:
  /system TEXT  set the system message        /retry      another answer to the last message
  /new          begin again                   /save FILE  write the conversation as JSON lines
  /temp X       sampling temperature          /topk N     top-k, 0: all tokens
  /topp X       top-p, 0 to 1                 /len N      tokens of an answer at most
  /seed N       seed of the next answers      /help       this text        /quit   leave"""


def choose_template(config: RunConfig, checkpoint: Checkpoint) -> ChatTemplate:
    """The template of the flag, else the checkpoint's own, else the default one.

    Raises:
        PreflightError: code FLAGS or CHECKPOINT, when it cannot be read.
    """
    if config.finetuning.chat_template is not None:
        return load_chat_template(config.finetuning.chat_template)
    own = read_checkpoint_template(checkpoint)
    if own is None:
        log.info(
            f"{checkpoint.path} has no chat template: its model was not fine-tuned on chats; "
            "the default one (User:, Assistant:) is used"
        )
    return own or DEFAULT_TEMPLATE


class ChatSession(Session):
    """The conversation. Its history is kept as messages, not as ids.

    Attributes:
        messages: perhaps a system message, then turns of user and assistant.
    """

    help_text = HELP

    def __init__(
        self, model: TokenModel, tokenizer: Tokenizer, config: RunConfig, template: ChatTemplate
    ) -> None:
        super().__init__(model, tokenizer, config.sampling)
        self.encoder = ChatEncoder(tokenizer, template, model.config.context_length)
        self.messages: list[Message] = []
        if config.generation.system_prompt:
            self.messages.append(Message("system", config.generation.system_prompt))
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/retry": self._retry,
            "/new": self._begin_again,
            "/save": self._save,
        }

    def complete(self, prompt: str, *, echo: bool = True) -> None:
        """Answer a message; the answer joins the conversation, also where Ctrl-C stopped it."""
        self._answer([*self.messages, Message("user", prompt)])

    def command(self, line: str) -> None:
        """Execute a line that starts with a slash; a wrong one changes nothing."""
        name, _, value = line.strip().partition(" ")
        if name in self._commands:
            self._commands[name](value.strip())
        else:
            super().command(line)

    def _answer(self, messages: Sequence[Message]) -> None:
        text = self.stream(lambda note_step, index: self._generate(messages, note_step, index))
        if text.strip():  # an answer that was stopped at once leaves nothing behind
            self.messages = [*messages, Message("assistant", text.strip())]

    def _generate(
        self, messages: Sequence[Message], note_step: OnStep, index: int
    ) -> Iterator[str]:
        """The pieces of an answer, without the white space that a template has before it."""
        context = self.model.config.context_length
        room = self.encoder.find_room(self.sampling.max_new_tokens)
        ids, n_dropped = self.encoder.fit_prompt(messages, max_tokens=room)
        if n_dropped:
            log_once(
                f"the conversation is longer than the context of {context:,} tokens: its earliest "
                "turns are left out"
            )
        pieces = stream_ids(
            self.model,
            self.tokenizer,
            ids,
            self.sampling,
            note_step,
            index,
            self.encoder.stop_ids,
        )
        has_begun = False
        for piece in pieces:
            shown = piece if has_begun else piece.lstrip()
            has_begun = has_begun or bool(shown)
            if shown:
                yield shown

    # ---- commands ---------------------------------------------------------------------------

    @property
    def _system(self) -> list[Message]:
        return [message for message in self.messages[:1] if message.role == "system"]

    def _set_system(self, text: str) -> None:
        if text:
            turns = self.messages[len(self._system) :]
            self.messages = [Message("system", text), *turns]
        told = self._system[0].content if self._system else "not set"
        log.info(f"the system message is {'now ' if text else ''}{told}")

    def _begin_again(self, _: str) -> None:
        self.messages = self._system
        log.info("a new conversation" + (" with the same system message" if self.messages else ""))

    def _retry(self, _: str) -> None:
        if not self.messages or self.messages[-1].role != "assistant":
            log.info("/retry: there is no answer yet")
            return
        if not self.sampling.temperature or not self.sampling.do_sample:
            log.info("/temp is 0: the answer will be the same")
        self._answer(self.messages[:-1])

    def _save(self, name: str) -> None:
        """Write the conversation in the form that `--finetune` reads; never over a file."""
        if not name or len(self.messages) == len(self._system):
            log.info("/save FILE writes the conversation, once there is one")
            return
        path = os.path.expanduser(name)
        messages = [{"role": each.role, "content": each.content} for each in self.messages]
        line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        try:
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line)
        except FileExistsError:
            log.info(f"/save: {path} exists already, and was not changed")
        except (OSError, ValueError) as error:
            what = (error.strerror if isinstance(error, OSError) else None) or str(error)
            log.info(f"/save: {path} cannot be written: {what}")
        else:
            log.info(f"{len(messages):,} messages in {path}")
