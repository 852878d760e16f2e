"""Tokens as text while they come: what is certain, and what may still change. Each token costs the same, however long
the text is.

Some tokens are half a character (byte-level tokenizers), or one byte of a run that is decoded as a whole or not at all
(tokenizers after SentencePiece). What they make is certain only once the next tokens are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Decode = Callable[[list[int]], str]
_HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character yet are decoded to
_LONG, _ENOUGH = 16, 8  # a character has 4 bytes at most: behind so many tokens it is what it is


def _never(token: int) -> bool:
    return False


@dataclass(frozen=True)
class TextDecoder:
    """A tokenizer, as far as a text needs it.

    `whole`: with special tokens; None: there are none. `is_byte`: whether a token is one byte, of a tokenizer that
    decodes a run of them together. `word`: a word's tokens, of a tokenizer that drops the space a text begins with
    (those after SentencePiece do), but not a space behind a word; empty: nothing is dropped."""

    plain: Decode
    whole: Decode | None = None
    is_byte: Callable[[int], bool] = _never
    word: tuple[int, ...] = ()

    @staticmethod
    def of(decode: Decode | TextDecoder) -> TextDecoder:
        return decode if isinstance(decode, TextDecoder) else TextDecoder(decode)

    def shown(self, skip_special_tokens: bool, leading_space: bool = False) -> Decode:
        """`leading_space`: of a text that goes on behind another one, whose first space is the text's."""
        decode = self.plain if skip_special_tokens or not self.whole else self.whole
        if not (leading_space and self.word):
            return decode
        word = list(self.word)
        size = len(decode(word))
        return lambda tokens: decode(word + tokens)[size:]


class Detokenizer:
    """The text of a growing row of tokens. At any time all that it has settled and `tail` joined are what the tokens
    are decoded to; what is settled stays."""

    def __init__(self, decode: Decode, is_byte: Callable[[int], bool] = _never):
        self._decode, self._is_byte = decode, is_byte
        self._context: list[int] = []  # settled, and next to the others: a decoder looks at what comes before
        self._before = ""  # what they are decoded to by themselves
        self._waiting: list[int] = []
        self._run = False  # the last of these are bytes
        self.settled = 0  # characters

    @property
    def tail(self) -> str:
        """Characters of the tokens that wait."""
        return self._text()[len(self._before) :] if self._waiting else ""

    def add(self, token: int) -> str:
        """The characters that are settled now."""
        self._waiting.append(token)
        if self._is_byte(token):
            self._run = True
            return ""
        text, count = self._text(), len(self._waiting)
        if self._run and text == self._decode(self._context + self._waiting[:-1]):
            # a special token that is not shown: the bytes around it are one run
            return ""
        self._run = False
        if text.endswith(_HALF):
            if count < _LONG:
                return ""
            count -= _ENOUGH
            text = text[: len(self._decode(self._context + self._waiting[:count]))]
        if len(text) <= len(self._before):
            if count >= _LONG and self._decode(self._context + self._waiting[-_ENOUGH:]) == text:
                del self._waiting[:-_ENOUGH]  # they show nothing, such as special tokens that are not shown
            return ""
        piece = text[len(self._before) :]
        self._context, self._waiting = self._waiting[:count], self._waiting[count:]
        self._before = self._decode(self._context)
        self.settled += len(piece)
        return piece

    def _text(self) -> str:
        return self._decode(self._context + self._waiting)
