"""A chat template: the program, in Jinja, that writes a chat as one text.

`template_process` renders chats with it. Templates come from strangers: here they are only read.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from preflight.core.errors import ExitCode, PreflightError
from preflight.core.storage import open_regular

TEMPLATE_NAME = "chat_template.jinja"  # in a checkpoint, as in Hugging Face's folders
MAX_TEMPLATE_BYTES = 64 * 2**10
# After an answer comes the end of text, as after a document: what follows begins anew. The prompt
# ends with ":" and the answer begins with a space, since GPT-2's vocabulary has " word" as a token.
DEFAULT_SOURCE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant:' }}
{%- generation -%}
{{ ' ' + (message['content'] | trim) + eos_token }}
{%- endgeneration -%}
{%- elif message['role'] == 'system' -%}
{{ 'System: ' + (message['content'] | trim) + '\\n' }}
{%- else -%}
{{ 'User: ' + (message['content'] | trim) + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what messages call it.

    Attributes:
        source: the program.
        name: for messages: ``--chat-template my.jinja``.
        code: the exit code where it does not work: FLAGS, or CHECKPOINT for a checkpoint's own.
    """

    source: str
    name: str
    code: ExitCode = ExitCode.FLAGS

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the program."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()


DEFAULT_TEMPLATE = ChatTemplate(DEFAULT_SOURCE, "the default chat template")


def load_chat_template(path: str) -> ChatTemplate:
    """The template in the file of ``--chat-template``.

    Raises:
        PreflightError: code FLAGS, when it cannot be read or is no text of at most 64 KiB.
    """
    name = f"--chat-template {path}"
    try:
        with open_regular(Path(os.path.realpath(path))) as file:  # a user's own link is followed
            content = file.read(MAX_TEMPLATE_BYTES + 1)
    except (OSError, ValueError) as error:
        what = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise PreflightError(
            ExitCode.FLAGS, f"{name}: {what}", "name a file with a chat template in Jinja"
        ) from None
    return parse_chat_template(content, name, ExitCode.FLAGS)


def parse_chat_template(content: bytes, name: str, code: ExitCode) -> ChatTemplate:
    """The template in a file's content. Whether it works shows when it renders.

    Raises:
        PreflightError: `code`, when it is empty, too large or no UTF-8.
    """
    fault = ""
    if len(content) > MAX_TEMPLATE_BYTES:
        fault = f"larger than {MAX_TEMPLATE_BYTES // 2**10} KiB"
    elif not content.strip():
        fault = "empty"
    try:
        source = content.decode("utf-8-sig") if not fault else ""
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 at byte {error.start}"
    if fault:
        raise PreflightError(code, f"{name}: {fault}", "name another with --chat-template")
    return ChatTemplate(source, name, code)
