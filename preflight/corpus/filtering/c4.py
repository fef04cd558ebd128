"""The rules of C4: Raffel et al. 2020, arXiv:1910.10683, section 2.2, and its published code.

The list of obscene words of the paper is not included.
"""

from __future__ import annotations

import re

from preflight.corpus.filtering.protocol import Verdict

_LINE_ENDS = (".", "?", "!", '"', "'")  # the paper has no single quote, its code has
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
# A run of marks and closing quotes, then whitespace or the end; neither after an initial ("J. S.
# Bach", "U.S. law") nor after a usual abbreviation. The mark comes first: the search is fast so.
_SENTENCE_END = re.compile(
    r"[.!?…]+(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs|No)\.)(?<!\b(?:Mrs|etc)\.)"
    r"[\"'”’)\]]*(?=\s|$)"  # noqa: RUF001
)


def judge_lines(
    text: str,
    *,
    min_sentences: int = 5,  # "discarded any page with fewer than 5 sentences"
    min_words_per_line: int = 3,  # "only retained lines that contained at least 3 words"
    max_word_characters: int = 1000,  # of the code; a line with a longer word is left out
    remove_citations: bool = True,  # "[1]", "[edit]", "[citation needed]"
) -> Verdict:
    """Leave out lines that are no sentences; drop pages with few of them, or with code.

    A line stays if it ends with ``. ? ! " '`` but not with an ellipsis, has three words, and names
    neither JavaScript nor a policy. A line that stays and has a curly bracket or "lorem ipsum"
    drops the page. Words are what whitespace separates: in scripts without spaces most lines count
    as one word and are left out.
    """
    low = text.lower()
    has_code = "{" in text or "lorem ipsum" in low
    has_notice = "javascript" in low or any(policy in low for policy in _POLICIES)
    has_citation = remove_citations and "[" in text
    kept: list[str] = []
    n_sentences = 0
    for line in text.splitlines():
        line = line.strip()
        if len(line.split(None, min_words_per_line)) < min_words_per_line:
            continue
        if len(line) > max_word_characters and max(map(len, line.split())) > max_word_characters:
            continue
        if has_citation:
            line = _CITATION.sub("", line)
        if not line.endswith(_LINE_ENDS) or line.endswith("..."):
            continue
        if has_code or has_notice:
            fault = _find_fault(line)
            if fault == "notice":
                continue
            if fault:
                return Verdict(text, fault)
        kept.append(line)
        if n_sentences < min_sentences:
            n_sentences += count_sentences(line)
    if n_sentences < min_sentences:
        return Verdict(text, "too few sentences")
    return Verdict("\n".join(kept).strip())


def _find_fault(line: str) -> str:
    """What drops the page; "notice" where it drops the line alone; or nothing."""
    low = line.lower()
    if "lorem ipsum" in low:
        return "lorem ipsum"
    if "javascript" in low:
        return "notice"
    if "{" in line:
        return "curly bracket"
    return "notice" if any(policy in low for policy in _POLICIES) else ""


def count_sentences(line: str) -> int:
    """The sentences of a line that is not empty: its ends within, and what is behind the last."""
    ends = [match.end() for match in _SENTENCE_END.finditer(line)]
    return len(ends) + (not ends or ends[-1] < len(line.rstrip()))
