"""Names that mean something in MediaWiki's markup: namespaces, languages, tags, templates."""

# ruff: noqa: RUF001
from __future__ import annotations

import json
from pathlib import Path

_NAMES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# A link into one of these namespaces is a picture, a sound or a category, never a word of the
# sentence. Names as MediaWiki localises them, in lower case. A dump names its own in <siteinfo>;
# these serve markup that comes without.
DROPPED_NAMESPACES = frozenset(_NAMES["dropped_namespaces"])
# Wikipedia's language codes: [[fr:Titre]] links the same article elsewhere and shows nothing.
LANGUAGES = frozenset(_NAMES["languages"])

# Tags whose content is no text of the article, or no text at all.
OPAQUE_TAGS = (
    *("ref", "references", "gallery", "math", "chem", "ce", "timeline", "syntaxhighlight"),
    *("source", "pre", "score", "graph", "hiero", "templatedata", "imagemap", "mapframe"),
    *("maplink", "inputbox", "categorytree", "indicator", "templatestyles", "includeonly"),
    *("section", "charinsert", "dynamicpagelist", "quiz", "rss", "phonos", "style", "script"),
)
# Tags that begin a new line; all others leave no trace.
BLOCK_TAGS = (
    *("p", "br", "hr", "div", "center", "blockquote", "poem", "ul", "ol", "li", "dl", "dt", "dd"),
    *("tr", "td", "th", "caption", "h1", "h2", "h3", "h4", "h5", "h6"),
)

# Templates that are part of a sentence, by what they show: a value counted from 1 is one of their
# unnamed arguments, -1 the last one.
SHOWN_ARGUMENT = {
    **dict.fromkeys(
        (
            *("nowrap", "nobr", "nobreak", "small", "smaller", "big", "larger", "em", "strong"),
            *("sc", "smallcaps", "sub", "sup", "mvar", "var", "code", "mono", "kbd", "samp"),
            *("abbr", "abbrlink", "tooltip", "ill", "interlanguage link", "quote", "blockquote"),
            *("cquote", "quotation", "quote box", "visible anchor", "vanchor", "not a typo"),
            *("as written", "sic", "text", "noitalic", "title", "bquote", "formatnum", "unicode"),
            *("ipa", "angbr", "angle bracket", "keypress", "key press", "flag", "flagcountry"),
            *("ship", "sclass", "isbn", "gaps", "number", "num", "nombre", "unité", "unite"),
        ),
        1,
    ),
    **dict.fromkeys(("lang", "transl", "transliteration", "font color", "color", "colour"), -1),
}
# Templates that show the same characters always.
SHOWN_TEXT = {
    **dict.fromkeys(("spaced ndash", "snd", "spnd", "spaced en dash", "ndash", "en dash"), " – "),
    **dict.fromkeys(("mdash", "em dash", "spaced mdash", "spaced em dash"), " — "),
    **dict.fromkeys(("nbsp", "space", "thinsp", "spaces", "nnbsp"), " "),
    **dict.fromkeys(("·", "•", "dot", "bull", "middot", "bullet"), " · "),
    **dict.fromkeys(("circa", "c.", "ca."), "c. "),
    **{"'": "'", "'s": "'s", "-": " ", "pi": "π", "=": "=", "!": "|", "–": " – "},
}
