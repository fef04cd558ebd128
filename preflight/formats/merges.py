"""The merges of a byte-level BPE, recovered from its ranks; bytes spelled as characters.

tiktoken keeps the rank of each token, other programs keep the pair that it was merged from. The
pair is what is left of the token when all pairs of lower rank are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preflight.tokenization.huggingface import BYTE_OF

_CHARACTERS = {byte: character for character, byte in BYTE_OF.items()}


def spell_bytes(data: bytes) -> str:
    """`data` as printable characters, one a byte, as in GPT-2's vocabulary."""
    return "".join(_CHARACTERS[byte] for byte in data)


@dataclass(frozen=True)
class BytePairs:
    """A byte-level BPE as other programs keep it.

    Attributes:
        vocabulary: ids of the tokens, as `spell_bytes` spells them.
        merges: pairs of tokens, in the order in which they are merged.
        is_whole_only: some token is found only where it is a whole piece of the text, since no
            merges lead to it; a piece that is a token must then not be merged.
    """

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    is_whole_only: bool


def recover_pairs(ranks: Mapping[bytes, int]) -> BytePairs:
    """The pairs of a tiktoken encoding; they give the same ids.

    A rank is enough: whatever surrounds a token, what lies within it is merged in the same order
    as in the token alone, so that the last merge is the same.
    """
    merges, is_whole_only = [], False
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge_below(token, rank, ranks)
            if len(parts) == 2:
                merges.append((spell_bytes(parts[0]), spell_bytes(parts[1])))
            else:
                is_whole_only = True
    vocabulary = {spell_bytes(token): rank for token, rank in ranks.items()}
    return BytePairs(vocabulary, merges, is_whole_only)


def _merge_below(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The parts of `token` when all pairs of a rank below `limit` are merged."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        best = min(pairs, default=limit)
        if best >= limit:
            return parts
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
