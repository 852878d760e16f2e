"""Text that grows token by token, in pieces that stay as they are whatever comes after them.

A token may hold half a character, a space that only counts behind another word, or the beginning of a stop string; what
is not yet certain is held back. The pieces of a text joined are what its tokens are decoded to as a whole.

Knows: tokens and how they are decoded. Refuses to know: where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pearl.core.stopping import Decode

_HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character yet are decoded to


class TextStream:
    """The pieces of one text."""

    def __init__(self, decode: Decode, stop: Sequence[str] = (), is_byte: Callable[[int], bool] = lambda token: False):
        """`is_byte`: whether a token is one byte of a character, of a tokenizer that decodes a run of them together:
        what they make may still change until another token ends the run."""
        self._decode, self._stop, self._is_byte = decode, stop, is_byte
        self._tokens: list[int] = []  # from the last piece on that had characters: the next one is decoded behind it
        self._known = 0  # of those: what is decoded for good
        self._held = ""  # decoded, but it may begin a stop string
        self._count = 0  # characters yielded

    def add(self, tokens: Sequence[int]) -> str:
        """What is certain now; may be empty."""
        self._tokens += tokens
        before, text = self._decode(self._tokens[: self._known]), self._decode(self._tokens)
        if len(text) <= len(before) or text.endswith(_HALF) or self._is_byte(self._tokens[-1]):
            return ""
        self._held += text[len(before) :]
        self._tokens, self._known = self._tokens[self._known :], len(self._tokens) - self._known
        return self._give(self._certain())

    def end(self, text: str) -> str:
        """The rest, of a text that is over. `text`: all of it."""
        return text[self._count :]

    def _certain(self) -> int:
        """How many of the characters held are no part of a stop string, whatever follows."""
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        begun = (size for stop in self._stop for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        return min(found) if found else len(self._held) - max(begun, default=0)

    def _give(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self._count += count
        return piece
