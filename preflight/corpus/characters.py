"""Which script a character belongs to, and which characters are odd in a training text.

Ranges by the blocks of the Unicode standard (Blocks.txt, version 16), cut where a block is shared.
"""

from __future__ import annotations

from functools import cache

import numpy as np

COMMON = "Common"  # what all scripts share: spaces, digits, punctuation, symbols, combining marks
OTHER = "Other"

# First and last code point of each range, in hexadecimal.
_SCRIPTS = {
    "Latin": "41-5A 61-7A AA BA C0-D6 D8-F6 F8-2B8 2E0-2E4 1D00-1D25 1D2C-1D5C 1D62-1D65 "
    "1D6B-1D77 1D79-1DBE 1E00-1EFF 2071 207F 2090-209C 212A-212B 2132 214E 2160-2188 2C60-2C7F "
    "A722-A787 A78B-A7FF AB30-AB64 AB66-AB69 FB00-FB06 FF21-FF3A FF41-FF5A",
    "Greek": "370-3E1 3F0-3FF 1D26-1D2A 1D5D-1D61 1D66-1D6A 1DBF 1F00-1FFF 2126 AB65",
    "Cyrillic": "400-52F 1C80-1C8F 1D2B 1D78 2DE0-2DFF A640-A69F",
    "Armenian": "530-58F FB13-FB17",
    "Hebrew": "590-5FF FB1D-FB4F",
    "Arabic": "600-6FF 750-77F 870-8FF FB50-FDCF FDF0-FDFF FE70-FEFE",
    "Devanagari": "900-97F A8E0-A8FF",
    "Bengali": "980-9FF",
    "Gurmukhi": "A00-A7F",
    "Gujarati": "A80-AFF",
    "Odia": "B00-B7F",
    "Tamil": "B80-BFF",
    "Telugu": "C00-C7F",
    "Kannada": "C80-CFF",
    "Malayalam": "D00-D7F",
    "Sinhala": "D80-DFF",
    "Thai": "E00-E7F",
    "Lao": "E80-EFF",
    "Tibetan": "F00-FFF",
    "Myanmar": "1000-109F A9E0-A9FF AA60-AA7F",
    "Georgian": "10A0-10FF 1C90-1CBF 2D00-2D2F",
    "Ethiopic": "1200-139F 2D80-2DDF AB00-AB2F",
    "Khmer": "1780-17FF 19E0-19FF",
    "Mongolian": "1800-18AF",
    "Hangul": "1100-11FF 3130-318F A960-A97F AC00-D7FF FFA0-FFDF",
    "Hiragana": "3040-309F",
    "Katakana": "30A0-30FF 31F0-31FF FF66-FF9F",
    "Han": "2E80-2FDF 3005 3007 3021-3029 3038-303B 3400-4DBF 4E00-9FFF F900-FAFF 20000-323AF",
    # Last, since it wins over the blocks of single scripts.
    COMMON: "0-40 5B-60 7B-A9 AB-B9 BB-BF D7 F7 2B9-2DF 2E5-36F 374 37E 387 605 60C 61B 61F "
    "640 951-954 964-965 E3F 1AB0-1AFF 1DC0-1DFF 2000-2070 2072-207E 2080-208F "
    "20A0-2125 2127-2129 212C-2131 2133-214D 214F-215F 2189-2BFF 2E00-2E7F 2FF0-3004 "
    "3006 3008-3020 302A-3037 303C-303F 3099-309C 30A0 30FB-30FC 3190-319F 31C0-31EF "
    "3200-33FF 4DC0-4DFF A700-A721 A788-A78A FE00-FE6F FF00-FF20 FF3B-FF40 FF5B-FF65 "
    "FF70 FF9E-FF9F FFE0-FFFC 1CD0-1CFA A9CF 1D000-1D3FF 1D7CE-1D7FF 1F000-1FBFF E0000-E01EF",
}
# These win over the scripts. Tab, line feed and carriage return are not odd.
_ODD = {
    "nul": "0",
    "control": "1-8 B-C E-1F 7F-9F",
    "soft_hyphen": "AD",
    "zero_width": "200B-200D 2060",
    "bidi": "61C 200E-200F 202A-202E 2066-2069",
    "byte_order_mark": "FEFF",
    "replacement_character": "FFFD",
    "private_use": "E000-F8FF F0000-10FFFF",
    "surrogate": "D800-DFFF",  # half a character, which no encoding can write
}
SCRIPTS = (*_SCRIPTS, OTHER)
ODD = tuple(_ODD)
_N_CODE_POINTS = 0x110000


@cache
def _build_table() -> np.ndarray:
    """For each code point the index of its script in `SCRIPTS`, or behind them of its oddness."""
    table = np.full(_N_CODE_POINTS, SCRIPTS.index(OTHER), np.uint8)
    for names, ranges in ((SCRIPTS, _SCRIPTS), ((*SCRIPTS, *ODD), _ODD)):
        for name, text in ranges.items():
            for span in text.split():
                first, _, last = span.partition("-")
                table[int(first, 16) : int(last or first, 16) + 1] = names.index(name)
    return table


def count_characters(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """How many characters each script has, and how many each kind of odd ones; none that are 0."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    counts = np.bincount(_build_table()[points], minlength=len(SCRIPTS) + len(ODD)).tolist()
    n = len(SCRIPTS)
    return (
        {name: count for name, count in zip(SCRIPTS, counts[:n], strict=True) if count},
        {name: count for name, count in zip(ODD, counts[n:], strict=True) if count},
    )
