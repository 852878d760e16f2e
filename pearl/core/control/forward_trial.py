"""Whether a forward of a source beside the target is worth the target's time, asked before every pass.

    worth    guesses of such forwards that passes went through, less what their rows added to these passes
    price    the seconds of the forward, at the rate of the run; and of what the source has yet to read of the text

What a forward is worth depends on how far the guesses of others reach by then: where there are none it may bring a
token or two, below a sure chain hardly anything. So it is learned by how many tokens the pass is expected to commit
without it. A second forward before the same pass brings what the first has left, so it is judged apart. A source with
much to read, a long prompt or what it missed while it was not asked, reads it once the forwards that were not made
would have brought as much as that takes (the ski rental problem: at most twice the best).
Where no forward pays, one is tried from what `TRIED` of the run's seconds allow.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from pearl.core.control.averages import ema
from pearl.core.token_buckets import extended

TRIED = 0.005  # of the run's time: forwards that are not known to pay
FIRST_WORTH = 1.5  # tokens, until something is known: what published heads bring beside nothing else
_AGAIN = 1 / 3  # of that, for a further forward before the same pass
_REACH = (0.01, 0.25, 0.5, 1.0, 2.0, 4.0)  # least tokens that a pass is expected to go through, of each class but one
_MEAN_REACH = (0.0, 0.1, 0.35, 0.75, 1.5, 3.0, 6.0)  # about the middle of each class
_WEIGHT = 4.0  # in a class, of what is expected there by all that was seen, in forwards
_WEIGHT_OF_ALL = 8.0  # of what is expected before anything was seen, in forwards
_FORGET = 0.98  # of what was seen, from forward to forward
_ROW_WEIGHT = 0.3  # of one more forward in the seconds of a row that it had still to read
_SCALE_WEIGHT = 0.1  # of one more forward in how many times as long they take as at loading
_LITTLE = 16  # rows that are still to be read, which a forward reads for nothing

Place = tuple[bool, int]  # where it is counted what a forward is worth: `ForwardQuery.again`, the class of its reach


@dataclass(frozen=True)
class ForwardQuery:
    """One text before a pass. `reach`: tokens that the walk is expected to go through by the guesses that are there;
    `unread`: rows that a forward has to read of the text before it can guess; `again`: there was one before this pass
    already."""

    text: Hashable
    reach: float
    unread: int = 0
    again: bool = False

    @property
    def place(self) -> Place:
        return self.again, bisect.bisect_right(_REACH, self.reach)


class _Worth:
    """Tokens that forwards have brought, on the average, by the class of their reach.

    Before anything is known a forward brings less the further others reach, as its own guesses lie behind theirs
    (`_expected`). What forwards have brought in all, against that, is the same factor in all classes."""

    def __init__(self, first: float) -> None:
        """`first`: where nobody else guesses, until something is known."""
        self._expected = [first * math.exp(-reach) for reach in _MEAN_REACH]
        self._tokens = [0.0] * len(_MEAN_REACH)
        self._forwards = [0.0] * len(_MEAN_REACH)
        self._all_tokens = self._all_expected = 0.0  # of all that were made: brought, and expected
        self._before = _WEIGHT_OF_ALL * first

    def of(self, at: int) -> float:
        factor = max(0.0, self._before + self._all_tokens) / (self._before + self._all_expected)
        by_all = self._expected[at] * factor
        return (self._tokens[at] + _WEIGHT * by_all) / (self._forwards[at] + _WEIGHT)

    def made(self, at: int) -> None:
        self._tokens[at], self._forwards[at] = _FORGET * self._tokens[at], _FORGET * self._forwards[at] + 1
        self._all_tokens *= _FORGET
        self._all_expected = _FORGET * self._all_expected + self._expected[at]

    def brought(self, at: int, tokens: float) -> None:
        self._tokens[at] += tokens
        self._all_tokens += tokens


class ForwardTrial:
    """Of one source. `costs[n - 1]`: seconds of a forward of n rows, as they were measured at loading."""

    def __init__(self, costs: Sequence[float]):
        self._costs, self._scale = tuple(costs), 1.0  # a forward takes this many times what was measured
        self._row_s = 0.0  # of a row that is read on the way
        self._worth = {False: _Worth(FIRST_WORTH), True: _Worth(_AGAIN * FIRST_WORTH)}  # by `ForwardQuery.again`
        self._to_try_s = 0.0
        self._saved: dict[Hashable, float] = {}  # by text: what forwards that were not made would have brought, in s

    def worth(self, query: ForwardQuery) -> float:
        """Tokens of a forward."""
        again, at = query.place
        return self._worth[again].of(at)

    def seconds(self, texts: int, unread: int = 0) -> float:
        """Of a forward over so many texts."""
        return self._scale * extended(self._costs, texts) + (self._row_s * unread if unread > _LITTLE else 0.0)

    def choose(self, queries: Sequence[ForwardQuery], rate: float) -> list[int]:
        """The numbers of those that a forward is to be made for now. `queries`: one at least; `rate`: tokens per second
        of the run."""
        gains = [self.worth(one) / rate for one in queries]
        able = [number for number, one in enumerate(queries) if self._reading_pays(one, gains[number])]
        able.sort(key=lambda number: -gains[number])
        best, chosen, gain = 0.0, 0, 0.0
        for count, number in enumerate(able, 1):
            gain += gains[number]
            if gain - self.seconds(count) > best:
                best, chosen = gain - self.seconds(count), count
        if chosen:
            return able[:chosen]
        number = max(range(len(queries)), key=lambda one: gains[one] - self.seconds(1, queries[one].unread))
        price = self.seconds(1, queries[number].unread)
        self._to_try_s = min(self._to_try_s, 2 * price)
        if self._to_try_s < price:
            return []
        self._to_try_s -= price
        return [number]

    def _reading_pays(self, one: ForwardQuery, gain_s: float) -> bool:
        """Whether what it has still to read is little, or worth reading by now. Notes what a forward now would have
        brought."""
        if one.unread <= _LITTLE:
            return True
        saved = self._saved[one.text] = self._saved.get(one.text, 0.0) + max(0.0, gain_s - self.seconds(1))
        return saved >= self._row_s * one.unread

    def made(self, queries: Sequence[ForwardQuery], seconds: float) -> None:
        """A forward over these texts has taken so long."""
        unread = sum(one.unread for one in queries if one.unread > _LITTLE)
        if unread:
            row_s = max(0.0, seconds - self.seconds(len(queries))) / unread
            self._row_s = ema(self._row_s, row_s, weight=_ROW_WEIGHT) if self._row_s else row_s
        elif expected := extended(self._costs, len(queries)):
            self._scale = ema(self._scale, seconds / expected, weight=_SCALE_WEIGHT)
        for one in queries:
            self._saved.pop(one.text, None)
            again, at = one.place
            self._worth[again].made(at)

    def brought(self, place: Place, tokens: float) -> None:
        """A pass went through so many guesses of a forward of that place, less what its rows were worth."""
        again, at = place
        self._worth[again].brought(at, tokens)

    def passed(self, seconds: float) -> None:
        """A pass is over, with all that belongs to it."""
        self._to_try_s += TRIED * seconds

    def ended(self, text: Hashable) -> None:
        self._saved.pop(text, None)
