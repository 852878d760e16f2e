"""The suffix automaton of a growing text: every substring, how often it occurs, and what follows it.

Blumer et al. 1985, online: a token is added in amortised constant time, and there are at most two states a token. A
state stands for all substrings that end at the same places; its link leads to the longest suffix that ends at more.
So the end of a text has a match of every length: the longest suffix that occurred before, then shorter and more
frequent ones along the links.

A count goes up to `MOST_COUNTED` and stays there. That keeps it constant time: what a suffix of a substring counts is
never less than what the substring does, so the walk along the links that counts a token stops at the first that is
full, and no state is counted more often than that.

Knows: tokens of one text, or several with a separator between them. Refuses to know: models, and what a guess is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

MOST_COUNTED = 32
MOST_LINKS = 64
SEPARATOR = -1  # between texts: no token

Place = tuple[int, int]  # a state, and how many of the last tokens it matches
NOWHERE: Place = (0, 0)


class SuffixAutomaton:
    """Of the tokens that were added."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]  # of the longest substring of a state
        self._count = [0]
        self._last = 0  # the state of the whole text

    def add(self, token: int) -> None:
        follow, link, length, count = self._next, self._link, self._length, self._count
        state, new = self._last, len(follow)
        follow.append({})
        length.append(length[state] + 1)
        count.append(0)
        link.append(0)
        while state >= 0 and token not in follow[state]:
            follow[state][token] = new
            state = link[state]
        if state >= 0:
            other = follow[state][token]
            if length[other] > length[state] + 1:  # its longer substrings don't end here: they part
                short = len(follow)
                follow.append(follow[other].copy())
                length.append(length[state] + 1)
                count.append(count[other])
                link.append(link[other])
                link[other] = short
                while state >= 0 and follow[state].get(token) == other:
                    follow[state][token] = short
                    state = link[state]
                other = short
            link[new] = other
        self._last = state = new
        while state > 0 and count[state] < MOST_COUNTED:
            count[state] += 1
            state = link[state]

    @property
    def end(self) -> Place:
        """The longest suffix of the text that occurred before."""
        state = max(0, self._link[self._last])
        return state, self._length[state]

    def after(self, place: Place, token: int) -> Place:
        """The longest suffix of what `place` matches and `token` that occurs in the text."""
        state, match = place
        while token not in self._next[state]:
            if not state:
                return NOWHERE
            state = self._link[state]
            match = self._length[state]
        return self._next[state][token], match + 1

    def suffixes(self, place: Place) -> Iterator[tuple[int, Mapping[int, int]]]:
        """Of what `place` matches the suffixes that something followed, longest first: their length, and the state of
        each with a token that did, the one last that first did so last. Only those that more followed than before, and
        none beyond `MOST_LINKS` links that say nothing new: a repetition of n tokens has n such."""
        state, match = place
        seen = idle = 0
        while state and idle < MOST_LINKS:
            follow = self._next[state]
            idle += 1
            if len(follow) > seen:
                seen, idle = len(follow), 0
                yield match, follow
            state = self._link[state]
            match = self._length[state]

    def count(self, state: int) -> int:
        """How often its substrings occur, at most `MOST_COUNTED`."""
        return self._count[state]
