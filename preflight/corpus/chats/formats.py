"""The forms in which chats are written, and each row of them as messages.

A form is found by the keys of a file's first row. All further rows must have the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from preflight.tokenization.chats import ROLES, Message

MAX_SHOWN = 40  # characters of a stranger's word in a message
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
_TOOL_KEYS = ("tool_calls", "function_call")


class ChatFault(ValueError):
    """Why a row is no chat: what was found, and what was expected."""


@dataclass(frozen=True)
class ChatFormat:
    """One form of a row.

    Attributes:
        name: how messages and the metadata call it.
        keys: those that a row must have.
        optional: those that are read where a row has them.
        example: a row, for messages.
        read: (row) -> its messages as they stand there, with roles of `ROLES`; it raises
            `ChatFault`.
        lists: what the first key's list holds, where two forms share the key.
    """

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...]
    example: str
    read: Callable[[dict[str, Any]], Iterator[Message]]
    lists: type | None = None

    def fits(self, row: Any) -> bool:
        """Whether a row has this form, by its keys alone."""
        if not isinstance(row, dict) or not all(key in row for key in self.keys):
            return False
        value = row[self.keys[0]]
        if self.lists is None or not isinstance(value, list) or not value:
            return True
        return isinstance(value[0], self.lists)


def find_format(row: Any) -> ChatFormat | None:
    """The form of a row, or None where it has none of them."""
    return next((form for form in FORMATS if form.fits(row)), None)


def read_messages(row: Any, form: ChatFormat) -> tuple[tuple[Message, ...], bool]:
    """The messages of a row up to its last answer, and whether a question behind it was left out.

    Raises:
        ChatFault: it has another form, or is no chat that can be learned from.
    """
    if not form.fits(row):
        raise ChatFault(f"{describe_row(row)} where {form.name} was expected: {form.example}")
    messages = tuple(form.read(row))
    if not messages:
        raise ChatFault("an empty chat; a user's message and an answer were expected")
    first = 1 if messages[0].role == "system" else 0
    expected = "user"
    for number, message in enumerate(messages[first:], first + 1):
        if message.role != expected:
            raise ChatFault(_explain_order(message.role, number, number == first + 1))
        if message.role == "assistant" and not message.content.strip():
            raise ChatFault(f"message {number} is an empty answer; a text was expected")
        expected = "assistant" if expected == "user" else "user"
    is_open = messages[-1].role == "user"
    messages = messages[:-1] if is_open else messages
    if not messages or messages[-1].role != "assistant":
        raise ChatFault("no message of the assistant; a user's message and an answer were expected")
    return messages, is_open


def _explain_order(role: str, number: int, is_first: bool) -> str:
    if role == "system":
        return f"message {number} is of the system, which may only be the first"
    if is_first:
        return f"message {number} is of the {role}; a chat begins with the user"
    return f"message {number} is of the {role} again; user and assistant were expected in turns"


def describe_row(row: Any) -> str:
    """A row in words: its form, or else its keys, or what it is."""
    other = find_format(row)
    if other is not None:
        return other.name
    if isinstance(row, dict):
        keys = ", ".join(f'"{shorten(key)}"' for key in list(row)[:8])
        return f"a row with the keys {keys}" if keys else "an empty object"
    return f"{_name_kind(row)} instead of an object"


def shorten(word: Any) -> str:
    """A stranger's word, short enough for a message."""
    text = str(word)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _name_kind(value: Any) -> str:
    names: dict[type, str] = {
        **{bool: "true or false", int: "a number", float: "a number", str: "a text"},
        **{list: "a list", dict: "an object", type(None): "null"},
    }
    return names.get(type(value), type(value).__name__)


# ---- the forms ----------------------------------------------------------------------------------


def _read_text(value: Any, where: str) -> str:
    """`value`, which must be a text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ChatFault(f"{where} is {_name_kind(value)}; a text was expected")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])[1:-1]
            raise ChatFault(f"{where} holds half a surrogate pair ({half}): no UTF-8") from None
    return value


def _read_content(value: Any, where: str) -> str:
    """A text, or a list of parts that are texts."""
    if not isinstance(value, list):
        return _read_text(value, where)
    parts = []
    for part in value:
        if not isinstance(part, dict):
            raise ChatFault(f"{where} holds {_name_kind(part)}; parts of text were expected")
        if part.get("type") != "text":
            kind = shorten(part.get("type"))
            raise ChatFault(f'{where} holds a part of type "{kind}"; only "text" is learned from')
        parts.append(_read_text(part.get("text"), f"a part of {where}"))
    return "".join(parts)


def _read_list(row: dict[str, Any], key: str) -> list[Any]:
    value = row[key]
    if not isinstance(value, list):
        raise ChatFault(f'"{key}" is {_name_kind(value)}; a list was expected')
    return value


def _read_turn(
    turn: Any, number: int, role_key: str, content_key: str, roles: dict[str, str]
) -> Message:
    """One message that is an object with its role and its text."""
    where = f"message {number}"
    if not isinstance(turn, dict):
        raise ChatFault(f"{where} is {_name_kind(turn)}; an object was expected")
    role = turn.get(role_key)
    if not isinstance(role, str):
        raise ChatFault(f'{where} has no "{role_key}"; one of {", ".join(roles)} was expected')
    if role not in roles:
        known = ", ".join(roles)
        raise ChatFault(f'{where} has the role "{shorten(role)}"; one of {known} was expected')
    for key in _TOOL_KEYS:
        if turn.get(key):
            raise ChatFault(f'{where} has "{key}"; calls of tools cannot be learned from')
    return Message(roles[role], _read_content(turn.get(content_key), f"the text of {where}"))


def _read_openai(row: dict[str, Any], key: str = "messages", before: int = 0) -> Iterator[Message]:
    roles = {role: role for role in ROLES}
    for number, turn in enumerate(_read_list(row, key), before + 1):
        yield _read_turn(turn, number, "role", "content", roles)


def _read_sharegpt(row: dict[str, Any]) -> Iterator[Message]:
    for number, turn in enumerate(_read_list(row, "conversations"), 1):
        yield _read_turn(turn, number, "from", "value", _SHAREGPT_ROLES)


def _read_lima(row: dict[str, Any]) -> Iterator[Message]:
    for number, text in enumerate(_read_list(row, "conversations")):
        role = "assistant" if number % 2 else "user"
        yield Message(role, _read_text(text, f"message {number + 1}"))


def _read_alpaca(row: dict[str, Any]) -> Iterator[Message]:
    texts = {
        key: _read_text(row[key], f'"{key}"')
        for key in ("system", "instruction", "input", "output")
        if row.get(key) is not None or key in ("instruction", "output")
    }
    if texts.get("system"):
        yield Message("system", texts["system"])
    question = [texts["instruction"], texts.get("input", "")]
    yield Message("user", "\n\n".join(part for part in question if part))
    yield Message("assistant", texts["output"])


def _read_completion(row: dict[str, Any]) -> Iterator[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        yield from _read_openai(row, "prompt")
        yield from _read_openai(row, "completion", len(prompt))
    else:
        yield Message("user", _read_text(prompt, '"prompt"'))
        yield Message("assistant", _read_text(completion, '"completion"'))


FORMATS = (
    ChatFormat(
        "OpenAI messages",
        ("messages",),
        (),
        '{"messages": [{"role": "user", "content": "Hi"}, ...]}',
        _read_openai,
    ),
    ChatFormat(
        "ShareGPT conversations",
        ("conversations",),
        (),
        '{"conversations": [{"from": "human", "value": "Hi"}, ...]}',
        _read_sharegpt,
        dict,
    ),
    ChatFormat(
        "LIMA conversations",
        ("conversations",),
        (),
        '{"conversations": ["a question", "an answer", ...]}',
        _read_lima,
        str,
    ),
    ChatFormat(
        "Alpaca",
        ("instruction", "output"),
        ("input", "system"),
        '{"instruction": "...", "input": "", "output": "..."}',
        _read_alpaca,
    ),
    ChatFormat(
        "prompt and completion",
        ("prompt", "completion"),
        (),
        '{"prompt": "...", "completion": "..."}',
        _read_completion,
    ),
)
COLUMNS = tuple(dict.fromkeys(key for form in FORMATS for key in (*form.keys, *form.optional)))
