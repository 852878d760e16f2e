"""What a recorded run says of the sources beside its target: which there were, what they guessed, what they took.

Knows: the files of a run. Refuses to know: how they are asked in a simulation (`pearl.predict.beside`).

A source that answers at once is taken to know nothing at places where no guess of it was judged, as what it knows comes
in stretches. One with a model has something to say of any text: there its guesses are drawn from its others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from pearl.predict.beside import SourceBeside
from pearl.predict.script import DraftedToken

_DEPTHS = 8  # tokens that one without a model guesses, at most
Places = list[DraftedToken | None]


def sources_beside(environment: Mapping[str, Any]) -> tuple[SourceBeside, ...]:
    """Those that ran, whatever was asked for; an early run tells of none."""
    return tuple(
        SourceBeside(one["origin"], one["seconds"][0], one["depths"])
        if one["seconds"]
        else SourceBeside(one["origin"], 0.0, _DEPTHS)
        for one in environment.get("beside") or ()
    )


def places_of(judged: Sequence[Mapping[str, Any] | None], source: SourceBeside, rng: random.Random) -> Places:
    """What it guessed at each place of a text, of what was judged there; None: nothing was."""
    places = [_of_origin(one, source.origin) if one else None for one in judged]
    known = [place for place in places if place]
    return [place or rng.choice(known) for place in places] if source.forward_s and known else places


def _of_origin(judged: Mapping[str, Any], origin: str) -> DraftedToken | None:
    mine = [place for place, whose in enumerate(judged.get("origins") or ()) if whose == origin]
    q = tuple(judged["q"][place] for place in mine)
    return DraftedToken(mine.index(judged["rank"]) if judged["rank"] in mine else len(q), q) if q else None
