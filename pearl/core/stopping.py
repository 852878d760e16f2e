"""Where a text ends (an end-of-sequence id, a stop token or string, the most tokens asked for), and its pieces.

The end is judged token by token in the order of the text, never pass by pass, so a block that runs over the end is cut
where the target alone would have stopped. Refuses to know how the tokens came about.

A stop string is looked for in two texts: the one that is shown, and the one with special tokens, as a special token may
be what somebody wants to stop at.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence

from pearl.core.detokenizer import Decode, Detokenizer, TextDecoder
from pearl.core.params import SamplingParams


class Stopper:
    """Watches one sequence. `finish` is None while it goes on, then "eos", "stop" or "length" (or "error", see
    `SequenceState.fail`); `reason` is then the stop string or stop token, if it was one."""

    def __init__(self, params: SamplingParams, eos_ids: Collection[int], decode: Decode | TextDecoder):
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.reason: str | int | None = None
        self.eos_ids = frozenset(eos_ids)
        self._params, decoder = params, TextDecoder.of(decode)
        self._decode = decoder.shown(params.skip_special_tokens, bool(params.leading_space))
        self._ends = frozenset() if params.ignore_eos else self.eos_ids
        self._stops = frozenset(params.stop_token_ids)
        self._search = _StopSearch(params, decoder) if params.stop else None
        self._cut: int | None = None  # characters that are shown, if not all are

    def take(self, tokens: Sequence[int]) -> list[int]:
        """The tokens up to the end of the text; `finish` says whether that was reached."""
        kept: list[int] = []
        for token in tokens:
            assert self.finish is None, "tokens after the end"
            self.tokens.append(token)
            kept.append(token)
            self._judge(token)
            if self.finish:
                break
        return kept

    def _judge(self, token: int) -> None:
        if self._search:
            self._search.add(token)
            if len(self.tokens) <= (self._params.min_tokens or 0):
                self._search.ignore()
        if token in self._ends:
            self.finish = "eos"
        elif token in self._stops:
            self.finish, self.reason = "stop", token
        elif self._search and (found := self._search.found()):
            self.finish = "stop"
            self.reason, self._cut = found
        elif len(self.tokens) >= self._params.max_new_tokens:
            self.finish = "length"

    @property
    def text(self) -> str:
        """The text so far. The stop string or token that ended it is shown if that is asked for."""
        if self.finish == "stop" and self._cut is None and not self._params.include_stop_str_in_output:
            return self._decode(self.tokens[:-1])
        return self._decode(self.tokens)[: self._cut]


class _Beginning:
    """How much of a stop string, short of all of it, a growing text ends with (Knuth, Morris and Pratt 1977): each
    character is looked at a few times, however long the string is."""

    def __init__(self, stop: str):
        self._stop, self.size = stop, 0
        self._shorter = [0, 0]  # by size: the longest beginning that this one ends with; as far as it was needed

    def add(self, piece: str) -> None:
        for letter in piece:
            size = self._after(self.size, letter)
            if size == len(self._shorter):
                self._shorter.append(self._after(self._shorter[-1], letter))
            self.size = size if size < len(self._stop) else self._shorter[size]

    def _after(self, size: int, letter: str) -> int:
        while size and self._stop[size] != letter:
            size = self._shorter[size]
        return size + (self._stop[size] == letter)


class _Text:
    """One of the texts in which stop strings are looked for."""

    def __init__(self, decode: Decode, decoder: TextDecoder, stops: Sequence[str]):
        self._detokenizer, self._stops = Detokenizer(decode, decoder.is_byte), stops
        self._beginnings = [_Beginning(stop) for stop in stops if len(stop) > 1]
        self._reach = max(map(len, stops), default=1) - 1  # settled characters before a token that a stop may begin at
        self._before = self._piece = ""  # settled before the last token, as far back as `reach`, and by it
        self._tail = ""
        self.lengths = [0]  # in characters, after each token
        self.first = 0  # a stop string ends behind it

    def add(self, token: int) -> str:
        self._before = (self._before + self._piece)[-self._reach :] if self._reach else ""
        self._piece = self._detokenizer.add(token)
        if self._stops:
            self._tail = self._detokenizer.tail
            self._note(self._detokenizer.settled + len(self._tail))
        return self._piece

    def _note(self, length: int) -> None:
        """Bytes that were a character each may be one together: then the text is shorter than it was."""
        self.lengths.append(length)
        before = len(self.lengths) - 2
        while self.lengths[before] > length:
            self.lengths[before] = length
            before -= 1

    def find(self, stop: str) -> int:
        """Where it begins, -1: nowhere. Of what the last token has made or completed."""
        window = self._before + self._piece + self._tail
        start = self.lengths[-1] - len(window)
        at = window.find(stop, max(0, self.first - len(stop) + 1 - start))
        return at if at < 0 else start + at

    def may_begin(self) -> int:
        """From where on the settled text may be the beginning of a stop string. To be asked once after each token."""
        for one in self._beginnings:
            one.add(self._piece)
        return self._detokenizer.settled - max((one.size for one in self._beginnings), default=0)

    def place_in(self, other: _Text, place: int) -> int:
        """Where a place of this text is in the other one, of the same tokens. One within a token counts from its end,
        as only its beginning may differ."""
        if other is self:
            return place
        token = bisect.bisect_right(self.lengths, place)
        if token == len(self.lengths):
            return other.lengths[-1]
        return max(other.lengths[token - 1], other.lengths[token] - (self.lengths[token] - place))


class _StopSearch:
    """Looks for stop strings in the text that is shown and in the one with special tokens (or without, if they are
    shown)."""

    def __init__(self, params: SamplingParams, decoder: TextDecoder):
        self._stops, self._include = params.stop, params.include_stop_str_in_output
        skip, space = params.skip_special_tokens, bool(params.leading_space)
        self._shown = _Text(decoder.shown(skip, space), decoder, self._stops)
        self._texts = [self._shown]
        if self._stops and decoder.whole:
            self._texts.append(_Text(decoder.shown(not skip, space), decoder, self._stops))

    def add(self, token: int) -> str:
        """The characters shown that are settled now."""
        piece, *_ = [text.add(token) for text in self._texts]
        return piece

    def ignore(self) -> None:
        """A stop string that is there by now is none."""
        for text in self._texts:
            text.first = text.lengths[-1]

    def found(self) -> tuple[str, int] | None:
        """The stop string that the last token has completed, and how many characters are shown: those before it, or
        those up to its end."""
        found = []
        for text in self._texts:
            for stop in self._stops:
                if (at := text.find(stop)) >= 0:
                    end = at + len(stop) if self._include else at
                    found.append((stop, text.place_in(self._shown, at), text.place_in(self._shown, end)))
        if not found:
            return None
        stop, _, cut = min(found, key=lambda one: one[1])
        return stop, cut

    def certain(self) -> int:
        """Characters shown that are no part of a stop string, whatever follows. To be asked once after each token."""
        return min(text.place_in(self._shown, text.may_begin()) for text in self._texts)


class TextStream:
    """A text that grows token by token, in pieces that stay as they are whatever comes after them.

    A token may hold half a character, or the beginning of a stop string: what is not yet certain is held back. The
    pieces joined are the text that `Stopper` has of the same tokens.
    """

    def __init__(self, decode: Decode | TextDecoder, params: SamplingParams | None = None):
        self._params = params or SamplingParams()
        self._search = _StopSearch(self._params, TextDecoder.of(decode))
        self._hidden = frozenset() if self._params.include_stop_str_in_output else {*self._params.stop_token_ids}
        self._held = ""  # settled, but it may begin a stop string
        self._count = 0  # characters yielded

    def add(self, tokens: Sequence[int]) -> str:
        """What is certain now; may be empty."""
        return "".join(map(self._add, tokens))

    def end(self, text: str) -> str:
        """The rest, of a text that is over. `text`: all of it."""
        return text[self._count :]

    def _add(self, token: int) -> str:
        if token in self._hidden:
            return ""
        self._held += self._search.add(token)
        certain, found = self._search.certain(), self._search.found()
        certain = min(certain, found[1]) if found else certain
        count = max(0, min(certain - self._count, len(self._held)))
        piece, self._held = self._held[:count], self._held[count:]
        self._count += count
        return piece
