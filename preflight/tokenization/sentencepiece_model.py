"""A SentencePiece ``.model``, run by the library `sentencepiece`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from preflight.tokenization.protocol import count_characters
from preflight.tokenization.tokenizer_files import FileTokenizer

_SPACE = "\u2581"  # stands for a space in a piece


class SentencePieceTokenizer(FileTokenizer):
    """The library's ids, without those that begin and end a text.

    No place is known where a text may be cut: the model also puts a space before its beginning.
    The file does not say whether a beginning-of-text id belongs before a text, so there is none.
    """

    kind = "sentencepiece"
    saved_name = "tokenizer.model"
    library = "sentencepiece"
    max_unit_bytes = 8 * 2**20  # the library needs about 40 bytes for each byte of a text

    def _open(self, content: bytes) -> dict[str, int]:
        library = self._import_library()
        try:
            self._library = library.SentencePieceProcessor(model_proto=content)
            size = self._library.get_piece_size()
        except (RuntimeError, TypeError):  # the library names a line of its own source
            raise ValueError("it is not a SentencePiece model, or cut short") from None
        pieces = {self._library.id_to_piece(i): i for i in range(size)}
        if len(pieces) != size or not size:
            raise ValueError("it has no pieces, or one of them twice")
        self._ids = pieces
        return pieces

    def _is_text(self, piece: str) -> bool:
        token, library = self._ids[piece], self._library
        return not (
            library.is_control(token) or library.is_unknown(token) or library.is_unused(token)
        )

    def _list_specials(self) -> Iterable[str]:
        return [piece for piece, token in self._ids.items() if self._library.is_control(token)]

    def encode_with_offsets(
        self, text: str, *, begins: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the library says that each piece came from: its normalisation changes the text.

        A piece without a place, as the first bytes of a character are, has that of the next byte.
        """
        with self._telling_failure(text):
            pieces = self._library.encode(text, return_type="proto").pieces
        places = [(piece.begin, max(piece.end, piece.begin + 1)) for piece in pieces]
        offsets = count_characters(text.encode(), np.array(places, np.int64).reshape(-1, 2))
        return np.array([piece.id for piece in pieces], np.int64), offsets

    def _spell(self, piece: str) -> bytes:
        if self._library.is_byte(self._ids[piece]):  # <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def _encode(self, text: str) -> list[int]:
        return self._library.encode(text)
