"""What a page is shown of a target at work: passes, guesses and the drafter's work, as plain data.

    began    a text has a place                 its mode, how long its prompt is
    pass     a pass is over                     five moments; of a text that one asked for: its tokens, its tree
    draft    guesses have arrived               when the drafter was at work for them

It is copied in the engine's thread, between two passes, and made into words elsewhere. Times are milliseconds of the
target's `time.perf_counter`, which is one clock for all processes of a machine; those of a drafter on another one have
been corrected by the difference (`pearl.wire.peer_clock`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pearl.core.messages import Nodes
from pearl.core.stopping import TextStream
from pearl.roles.pass_recorder import PassTimes
from pearl.roles.sequence import SequenceState
from pearl.roles.verification import PassRows, PassWalk
from pearl.server import TARGET

Event = dict[str, Any]
MOST = 1000  # texts that may be under way


@dataclass(frozen=True)
class Row:
    """A row of a pass."""

    token: int
    parent: int  # the row that it follows, -1: the root, which follows the text
    logp: float  # of the token after its parent, as the drafter saw it
    origin: str


@dataclass(frozen=True)
class Token:
    """A token that a pass has committed."""

    token: int
    origin: str  # of the guess that it was, or TARGET
    rank: int | None  # among the guesses at its place; None: it was none of them
    row: int | None  # of the pass; None: the pass had not read it
    q: float | None  # the drafter's probability, if it was guessed
    logp: float | None  # the target's own, if the request asks for log-probabilities


@dataclass(frozen=True)
class Began:
    sequence: int
    label: str
    mode: str
    prompt: int  # tokens
    cached: int  # of those: need no reading
    at: float  # seconds
    stream: TextStream


@dataclass(frozen=True)
class Passed:
    sequence: int
    number: int
    position: int  # of the root
    times: PassTimes
    texts: int  # that shared the forward
    rows: list[Row]
    tokens: list[Token]
    finish: str | None
    text: str  # all of it, once it is over


@dataclass(frozen=True)
class Drafted:
    sequence: int
    at: float  # seconds: when the message arrived
    spans: tuple[float, ...]
    guesses: int


Seen = Began | Passed | Drafted


def began(sequence: SequenceState) -> Began:
    handle = sequence.request.user_data
    return Began(
        sequence.sequence_id,
        handle.request.label,
        sequence.schedule.mode,
        len(sequence.request.prompt),
        sequence.cached,
        sequence.placed,
        handle.new_stream(),
    )


def passed(sequence: SequenceState, rows: PassRows, walked: PassWalk, times: PassTimes) -> Passed:
    chain = len(rows.nodes) - len(rows.sides)
    parents = [*range(-1, chain - 1), *(parent for parent, _ in rows.sides)]
    read = [Row(node.token, parent, node.logp, node.origin) for node, parent in zip(rows.nodes, parents, strict=True)]
    return Passed(
        sequence.sequence_id,
        len(sequence.passes) - 1,
        walked.position,
        times,
        sequence.passes[-1].texts,
        read,
        _tokens(sequence, rows, read, walked),
        sequence.stopper.finish,
        sequence.stopper.text if sequence.stopper.finish else "",
    )


def _tokens(sequence: SequenceState, rows: PassRows, read: list[Row], walked: PassWalk) -> list[Token]:
    """The walk once more: each token was a row below the one before it, or a guess that had arrived and was not read,
    which is the root by now; or nobody had guessed it."""
    count = len(walked.committed)
    asked = sequence.logprobs[len(sequence.logprobs) - count :] if sequence.params.logprobs is not None else []
    below = {(row.parent, row.token): place for place, row in enumerate(read)}
    found, at = [], 0
    for place, token in enumerate(walked.committed):
        outcome = walked.outcomes[place] if place < len(walked.outcomes) else None
        rank = outcome.rank if outcome else None
        row = below.get((at, token))
        at = at if row is None else row
        origin = TARGET if outcome is None or rank is None else outcome.origin
        q = outcome.q[rank] if outcome and rank is not None else None
        found.append(Token(token, origin, rank, row, q, asked[place][token] if asked else None))
    return found


def drafted(nodes: Nodes, at: float) -> Drafted:
    return Drafted(nodes.sequence_id, at, nodes.spans, len(nodes.guesses))


class Teller:
    """Makes events of what was seen: in the order of a text, as its tokens make characters together."""

    def __init__(self, zero: float, text_of: Any):
        """`zero`: the moment that events count from, seconds. `text_of`: what one token is by itself."""
        self._zero, self._text_of = zero, text_of
        self._begun: dict[int, Began] = {}
        self._lengths: dict[int, int] = {}  # characters so far
        self._texts: dict[int, str] = {}  # by token

    def tell(self, seen: Seen) -> tuple[str, Event, Event]:
        """The label of its text, what the one is told who asked for that, and what all others are."""
        if isinstance(seen, Began):
            self._begun[seen.sequence], self._lengths[seen.sequence] = seen, 0
            if len(self._begun) > MOST:  # nothing says that a text was aborted
                self._forget(next(iter(self._begun)))
            all_of = {"e": "began", "seq": seen.sequence, "mode": seen.mode, "t": self._ms(seen.at)}
            return seen.label, all_of | {"label": seen.label, "prompt": seen.prompt, "cached": seen.cached}, all_of
        known = self._begun.get(seen.sequence)
        label = known.label if known else ""
        if isinstance(seen, Drafted):
            spans = [self._ms(moment) for moment in seen.spans if math.isfinite(moment)]
            told = {"e": "draft", "seq": seen.sequence, "t": self._ms(seen.at), "spans": spans, "n": seen.guesses}
            return label, told, told
        times = seen.times
        moments = (times.began, times.since, times.ready, times.read, times.ended)
        told = {"e": "pass", "seq": seen.sequence, "n": seen.number, "t": [self._ms(one) for one in moments]}
        told |= {"rows": len(seen.rows), "got": len(seen.tokens), "texts": seen.texts, "finish": seen.finish}
        mine = told | {"pos": seen.position, **self._inner(seen, known)} if known and label else told
        if seen.finish:
            self._forget(seen.sequence)
        return label, mine, told

    def forget(self) -> None:
        """Nobody watches any more."""
        self._begun.clear()
        self._lengths.clear()

    def _forget(self, sequence: int) -> None:
        self._begun.pop(sequence, None)
        self._lengths.pop(sequence, None)

    def _inner(self, seen: Passed, known: Began) -> Event:
        tree = [[self._text(row.token), row.parent, _round(row.logp), row.origin] for row in seen.rows]
        tokens = []
        for depth, one in enumerate(seen.tokens, 1):
            piece = known.stream.add([one.token])
            if seen.finish and depth == len(seen.tokens):
                piece += known.stream.end(seen.text)
            at = self._lengths[seen.sequence]
            self._lengths[seen.sequence] += len(piece)
            facts = {"id": one.token, "text": piece, "at": at, "depth": depth, "from": one.origin}
            facts |= {"rank": one.rank, "row": one.row, "q": one.q}
            tokens.append(facts | ({} if one.logp is None else {"p": _round(math.exp(one.logp))}))
        return {"tokens": tokens, "tree": tree}

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._text_of([token])
        return text

    def _ms(self, moment: float) -> float:
        return round((moment - self._zero) * 1e3, 2)


def _round(x: float) -> float:
    return round(x, 4) if math.isfinite(x) else 0.0
