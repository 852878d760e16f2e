"""Where a text ends (an end-of-sequence id, a stop token or string, the most tokens asked for), and its pieces.

The end is judged token by token in the order of the text, never pass by pass, so a block that runs over the end is cut
where the target alone would have stopped. Refuses to know how the tokens came about.

A stop string is looked for in two texts: the one that is shown, and the one with special tokens, as a special token may
be what somebody wants to stop at.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache

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


class StopAutomaton:
    """All stop strings of a request, looked for at once in a text that grows (Aho and Corasick 1975): a character costs
    the same however many they are, and however long.

    A state is a number: the longest beginning of a stop string that the text ends with; 0: none. Texts keep their
    states themselves, so they may share it."""

    def __init__(self, stops: Sequence[str]):
        self._next: list[dict[str, int]] = [{}]  # by state and character
        self._stop: list[int | None] = [None]  # by state: the number of the stop string that it is
        for number, stop in enumerate(stops):
            self._insert(number, stop)
        count = len(self._next)
        self._shorter = [0] * count  # by state: the longest other one that it ends with
        self._ending = [0] * count  # by state: of itself and its shorter ones the longest that is a stop string
        self.begun = [0] * count  # by state: characters at its end that are part of a stop string, but not all of it
        self._link()

    def _insert(self, number: int, stop: str) -> None:
        state = 0
        for letter in stop:
            known = self._next[state]
            if letter not in known:
                known[letter] = len(self._next)
                self._next.append({})
                self._stop.append(None)
            state = known[letter]
        if self._stop[state] is None:
            self._stop[state] = number

    def _link(self) -> None:
        """From the short states to the long ones, as each needs those that are shorter."""
        states, size = list(self._next[0].values()), 1
        while states:
            longer = []
            for state in states:
                shorter = self._shorter[state]
                self._ending[state] = self._ending[shorter] if self._stop[state] is None else state
                self.begun[state] = size if self._next[state] else self.begun[shorter]
                for letter, following in self._next[state].items():
                    self._shorter[following] = self.after(shorter, letter)
                    longer.append(following)
            states, size = longer, size + 1

    def after(self, state: int, letter: str) -> int:
        while state and letter not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(letter, 0)

    def ends(self, state: int) -> bool:
        """Whether a stop string ends here."""
        return self._ending[state] > 0

    def ending(self, state: int) -> Iterator[int]:
        """The numbers of the stop strings that end here, the longest first."""
        while state := self._ending[state]:
            number = self._stop[state]
            assert number is not None, "a state that is a stop string"
            yield number
            state = self._shorter[state]


@lru_cache(maxsize=1)
def stop_automaton(stops: tuple[str, ...]) -> StopAutomaton:
    """Samples of one request have the same."""
    return StopAutomaton(stops)


class _Text:
    """One of the texts in which stop strings are looked for."""

    def __init__(self, decode: Decode, decoder: TextDecoder, stops: StopAutomaton | None):
        self._detokenizer, self._stops = Detokenizer(decode, decoder.is_byte), stops
        self._state = 0  # of the automaton, after what is settled
        self._ends: list[tuple[int, int]] = []  # where the last token has completed stop strings: (place, state)
        self.lengths = [0]  # in characters, after each token
        self.first = 0  # a stop string ends behind it

    def add(self, token: int) -> str:
        piece = self._detokenizer.add(token)
        if self._stops:
            tail = self._detokenizer.tail
            self._note(self._detokenizer.settled + len(tail))
            self._look(self._stops, piece, tail)
        return piece

    def _look(self, stops: StopAutomaton, piece: str, tail: str) -> None:
        """What the last token has settled is read once, its tail again and again until it is settled."""
        self._ends, state, settled = [], self._state, self._detokenizer.settled
        for place, letter in enumerate(piece + tail, settled - len(piece) + 1):
            state = stops.after(state, letter)
            if stops.ends(state):
                self._ends.append((place, state))
            if place == settled:
                self._state = state

    def _note(self, length: int) -> None:
        """Bytes that were a character each may be one together: then the text is shorter than it was."""
        self.lengths.append(length)
        before = len(self.lengths) - 2
        while self.lengths[before] > length:
            self.lengths[before] = length
            before -= 1

    def found(self) -> Iterator[tuple[int, int]]:
        """The stop strings that the last token has completed: the number of each, and where it ends."""
        for place, state in self._ends:
            if self._stops and place > self.first:
                yield from ((number, place) for number in self._stops.ending(state))

    def may_begin(self) -> int:
        """From where on the settled text may be the beginning of a stop string."""
        return self._detokenizer.settled - (self._stops.begun[self._state] if self._stops else 0)

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
        automaton = stop_automaton(self._stops) if self._stops else None
        self._shown = _Text(decoder.shown(skip, space), decoder, automaton)
        self._texts = [self._shown]
        if automaton and decoder.whole:
            self._texts.append(_Text(decoder.shown(not skip, space), decoder, automaton))

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
        for number, text in enumerate(self._texts):
            for stop, end in text.found():
                begin = end - len(self._stops[stop])
                places = [text.place_in(self._shown, place) for place in (begin, end)]
                found.append((places[0], number, stop, places[self._include]))
        if not found:
            return None
        *_, stop, cut = min(found)
        return self._stops[stop], cut

    def certain(self) -> int:
        """Characters shown that are no part of a stop string, whatever follows."""
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
