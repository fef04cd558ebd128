"""The flags of `--tokenize` and `--detokenize`, which are modes too."""

import re
from dataclasses import dataclass

from preflight.settings.options import check_unicode, setting


def _check_text(text: str) -> str:
    if not text:
        raise ValueError("takes a text, or - for stdin")
    return check_unicode(text)


def _check_ids(text: str) -> str:
    if not re.fullmatch(r"\s*[0-9]{1,9}(\s*,\s*[0-9]{1,9})*\s*", text):
        raise ValueError("takes token ids with commas between them, such as 1,2,3")
    return text


@dataclass(frozen=True)
class TokenSettings:
    """What `--tokenize` and `--detokenize` show."""

    tokenize: str | None = setting(
        None, "the text to cut into tokens; - reads stdin", metavar="TEXT", check=_check_text
    )
    detokenize: str | None = setting(
        None, "the token ids to turn into text", metavar="IDS", check=_check_ids
    )

    @property
    def ids(self) -> list[int]:
        """The ids of `detokenize`."""
        return [int(item) for item in (self.detokenize or "").split(",") if item]
