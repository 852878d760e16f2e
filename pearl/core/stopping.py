"""Tokens as text: where it ends (an end-of-sequence id, a stop string, the most tokens asked for), and its pieces.

The end is judged token by token in the order of the text, never pass by pass, so a block that runs over the end is cut
where the target alone would have stopped. Refuses to know how the tokens came about.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pearl.core.params import SamplingParams

Decode = Callable[[list[int]], str]
_HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character yet are decoded to
_WINDOW = 16  # tokens of context that a byte-level decoder needs to render the next one


class Stopper:
    """Watches one sequence. `finish` is None while it goes on, then "eos", "stop" or "length"."""

    def __init__(self, params: SamplingParams, eos_ids: Collection[int], decode: Decode):
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._params, self._decode = params, decode
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_ids)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """The tokens up to the end of the text; `finish` says whether that was reached."""
        kept: list[int] = []
        for token in tokens:
            assert self.finish is None, "tokens after the end"
            self.tokens.append(token)
            kept.append(token)
            if token in self._eos:
                self.finish = "eos"
            elif self._params.stop and self._at_stop_string():
                self.finish = "stop"
            elif len(self.tokens) >= self._params.max_new_tokens:
                self.finish = "length"
            if self.finish:
                break
        return kept

    @property
    def text(self) -> str:
        """The text so far, without the stop string that ended it."""
        text = self._decode(self.tokens)
        ends = [text.find(s) for s in self._params.stop if s in text]
        return text[: min(ends)] if ends and self.finish == "stop" else text

    def _at_stop_string(self) -> bool:
        # A stop string of n characters lies in the last n tokens that have characters of their own; special tokens have
        # none, and a multi-byte character may need several tokens, hence the window around it.
        window = _WINDOW + 4 * max(map(len, self._params.stop))
        tail = self._decode(self.tokens[-window:])
        return any(stop in tail for stop in self._params.stop)


class TextStream:
    """A text that grows token by token, in pieces that stay as they are whatever comes after them.

    A token may hold half a character, or the beginning of a stop string: what is not yet certain is held back. The
    pieces joined are what the tokens are decoded to as a whole.
    """

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
        return "".join(map(self._add, tokens))

    def end(self, text: str) -> str:
        """The rest, of a text that is over. `text`: all of it."""
        return text[self._count :]

    def _add(self, token: int) -> str:
        self._tokens.append(token)
        before, text = self._decode(self._tokens[: self._known]), self._decode(self._tokens)
        if len(text) <= len(before) or text.endswith(_HALF) or self._is_byte(token):
            return ""
        self._held += text[len(before) :]
        self._tokens, self._known = self._tokens[self._known :], len(self._tokens) - self._known
        count = self._certain()
        piece, self._held = self._held[:count], self._held[count:]
        self._count += count
        return piece

    def _certain(self) -> int:
        """How many of the characters held are no part of a stop string, whatever follows."""
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        begun = (size for stop in self._stop for size in range(1, len(stop)) if self._held.endswith(stop[:size]))
        return min(found) if found else len(self._held) - max(begun, default=0)
