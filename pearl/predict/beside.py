"""Sources beside the target in a simulation: what they would guess at each place, and what asking them takes.

Knows: what one of them says of a place depends on the place alone, as of all that is played here. Refuses to know: when
it is asked (that decides the real `TargetSources`), and how its guesses become a tree (that does `OnePassSource`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pearl.core.params import SamplingParams
from pearl.drafters.draft_source import MAX_CHILDREN
from pearl.drafters.guesses import Guess, Guesses
from pearl.drafters.one_pass import DraftedText, OnePassSource, PathsQuery
from pearl.predict.script import DraftedToken, Script, token


@dataclass(frozen=True)
class SourceBeside:
    """One of them. `forward_s`: of the target's own time, whenever it is asked; 0: it answers at once. `depths`: tokens
    that it guesses then, one after the other."""

    origin: str
    forward_s: float = 0.0
    depths: int = 1


class ScriptedSource(OnePassSource):
    """Says what the script says of its places. It knows the text as it stands, as one beside the target does."""

    def __init__(self, source: SourceBeside, number: int, script: Callable[[], Script], work: Callable[[float], None]):
        """`number`: of it among the script's. `work`: passes so many seconds of the target's own time."""
        super().__init__(source.depths)
        self.origin, self.costs = source.origin, (source.forward_s,) if source.forward_s else ()
        self._number, self._script, self._work = number, script, work

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._sequences[batch_slot] = DraftedText(params)

    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        if queries and self.costs:
            self._work(self.costs[0])
        found = []
        for one in queries:
            first = len(one.prefix)
            said = [self._said(first + at) for at in range(max(map(len, one.paths)) + self.depths)]
            found.append([(said[: len(path)], said[len(path) : len(path) + self.depths]) for path in one.paths])
        return found

    def _said(self, position: int) -> list[Guess]:
        """Its guesses of the token at a position."""
        script = self._script()
        places: Sequence[DraftedToken | None] = script.beside[self._number]
        index = position - script.prompt
        place = places[index] if index < len(places) else None
        if place is None:
            return []
        best = enumerate(place.q[:MAX_CHILDREN])
        return [(token(position, place.choice(guess)), math.log(max(q, 1e-9)), ()) for guess, q in best]
