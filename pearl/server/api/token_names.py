"""Tokens as texts and bytes, one by one, as log-probabilities and /tokenize show them.

A token that is no whole character has no text: OpenAI writes `bytes:\\xe2\\x80`. All others joined are the text, spaces
included, which a tokenizer's `decode` of a single token may drop.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from pearl.engine.prompts import byte_alphabet

_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TokenNames:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        self._specials = {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
        inside = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes = byte_alphabet() if inside is not None and "ByteLevel" in str(inside.decoder) else None
        self.bytes_of = functools.lru_cache(1 << 16)(self._bytes_of)
        self.text_of = functools.lru_cache(1 << 16)(self._text_of)
        self.drops_space = functools.lru_cache(1 << 10)(self._drops_space)

    def is_special(self, token: int) -> bool:
        """Not shown where special tokens are skipped."""
        return token in self._specials

    def _drops_space(self, token: int) -> bool:
        """Whether its space is not shown where a text begins with it, as in tokenizers after SentencePiece."""
        return self.bytes_of(token).startswith(b" ") and not self._tokenizer.decode([token]).startswith(" ")

    def _bytes_of(self, token: int) -> bytes:
        """Empty for a row of the vocabulary that the tokenizer knows nothing of."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._added:
            return piece.encode()
        if self._bytes and all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece)
        if found := _BYTE.fullmatch(piece):
            return bytes.fromhex(found[1])
        return piece.replace("\u2581", " ").encode()

    def _text_of(self, token: int) -> str:
        spelt: bytes = self.bytes_of(token)
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{one:02x}" for one in spelt)

    def key(self, token: int, as_id: bool) -> str:
        return f"token_id:{token}" if as_id else self.text_of(token)
