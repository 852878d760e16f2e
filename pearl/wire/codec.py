"""Messages as 32-bit words, and back: what travels between two processes.

Knows: the layout of every message of `pearl.core.messages`; what can't be one is `Garbage`. Refuses to know: sockets,
groups and what a message is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from pearl.core.messages import (
    MOST,
    Beat,
    Close,
    Costs,
    End,
    Garbage,
    Guess,
    Message,
    Nodes,
    Plan,
    Report,
    SentSeparately,
    Start,
    Verdict,
)
from pearl.core.sampling import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.errors import UsageError

FRAME = 16  # words


_AUTO = -1  # on the wire


Words = np.ndarray  # int32 [n]


_KINDS: tuple[type, ...] = (Start, Verdict, End, Costs, Nodes, Report, Close, Beat)


_SEVERAL = len(_KINDS)


_COUNTS = ("forwards", "drafted", "verdicts", "hits", "misses", "prepared", "rows", "own", "confirmed", "memory")


def _float(x: float) -> list[int]:
    return np.array([x], np.float64).view(np.int32).tolist()


def _singles(numbers: Sequence[float]) -> list[int]:
    return np.array(numbers, np.float32).view(np.int32).tolist()


def _long(x: int) -> list[int]:
    return np.array([x], np.int64).view(np.int32).tolist()


class _Reader:
    """Takes numbers off the front of a row of words."""

    def __init__(self, words: Words):
        self._words, self._at = words, 0

    @property
    def left(self) -> int:
        return len(self._words) - self._at

    def _take(self, count: int) -> Words:
        if not 0 <= count <= self.left:
            raise Garbage(f"a message of {len(self._words)} words ends before {count} that it should hold")
        taken = self._words[self._at : self._at + count]
        self._at += count
        return taken

    def word(self) -> int:
        return int(self._take(1)[0])

    def words(self, count: int) -> tuple[int, ...]:
        return tuple(self._take(count).tolist())

    def singles(self, count: int) -> tuple[float, ...]:
        return tuple(self._take(count).copy().view(np.float32).tolist())

    def halves(self, count: int) -> np.ndarray:
        """int16 [count]; two in a word."""
        return self._take(-(-count // 2)).copy().view(np.int16)[:count]

    def real(self) -> float:
        return float(self._take(2).copy().view(np.float64)[0])

    def long(self) -> int:
        return int(self._take(2).copy().view(np.int64)[0])


def encode(message: Message) -> Words:
    """The message as words, the first two being its kind and its length, padded to a frame."""
    body = list(_encode_body(message))
    bits = _bits(message)
    words = [_KINDS.index(type(message)), 2 + len(body) + len(bits), *body]
    spare = [0] * (FRAME - len(words) - len(bits))
    return np.concatenate([np.array(words, np.int32), bits, np.array(spare, np.int32)])


def _bits(message: Message) -> Words:
    """What follows the body: a verdict's features, two in a word, as they lie in memory."""
    if not isinstance(message, Verdict) or not isinstance(message.features, np.ndarray):
        return np.zeros(0, np.int32)
    halves = message.features.ravel()
    return np.concatenate([halves, np.zeros(len(halves) % 2, np.int16)]).view(np.int32)


def length(frame: Words) -> int:
    """How many words the message has whose first frame this is. Raises `Garbage`."""
    if not 0 <= frame[0] <= _SEVERAL or not 2 < frame[1] <= MOST:
        raise Garbage(f"there is no message of kind {frame[0]} and {frame[1]} words")
    return max(FRAME, int(frame[1]))


def pack(messages: Sequence[Message]) -> Words:
    """Several messages as one, so that what is said of many texts at once leaves at once; one is itself."""
    if len(messages) == 1:
        return encode(messages[0])
    inner = [encode(message) for message in messages]
    head = np.zeros(FRAME, np.int32)
    head[:2] = _SEVERAL, FRAME + sum(map(len, inner))
    return np.concatenate([head, *inner])


def unpack(words: Words) -> list[Message]:
    """The inverse of `pack`. Raises `Garbage`."""
    if words[0] != _SEVERAL:
        return [decode(words)]
    messages, at = [], FRAME
    while at + FRAME <= len(words):
        size = length(words[at:])
        messages.append(decode(words[at : at + size]))
        at += size
    if at != len(words) or not messages:
        raise Garbage(f"several messages of {at - FRAME} words in {len(words) - FRAME}")
    return messages


def decode(words: Words) -> Message:
    """The inverse of `encode`. Raises `Garbage`."""
    if not 0 <= words[0] < len(_KINDS) or length(words) != max(FRAME, len(words)):
        raise Garbage(f"kind {words[0]} and length {words[1]} of {len(words)} words")
    read = _Reader(words[2 : int(words[1])])
    try:
        message = _decode_body(_KINDS[int(words[0])], read)
    except (ArithmeticError, LookupError, UsageError, ValueError) as error:
        raise Garbage(str(error)) from None
    if read.left:
        raise Garbage(f"{read.left} words more than a {type(message).__name__} has")
    return message


def _encode_body(message: Message) -> Iterator[int]:
    yield message.sequence
    match message:
        case Start(_, schedule, params, prompt, plan, continues):
            yield MODES.index(schedule.mode)
            for setting in (schedule.gamma, schedule.branches, schedule.width, schedule.max_ahead):
                yield _AUTO if setting is None else setting
            yield from (plan.block, plan.branches, plan.ahead)
            yield from (min(params.top_k, 2**31 - 1), int(params.rejection))  # no vocabulary is larger
            for number in (params.temperature, params.top_p, params.min_p):
                yield from _float(number)
            yield from _long(params.seed)
            yield from (continues, len(prompt), *prompt)
        case Verdict(_, position, plan, tokens, features):
            yield from (position, plan.block, plan.branches, plan.ahead, len(tokens), *tokens)
            yield from () if features is None else (*features.shape, int(isinstance(features, SentSeparately)))
        case Costs(_, seconds):
            yield from (len(seconds), *_singles(seconds))
        case Nodes(_, root, position, resting, guesses):
            yield from (root, position, int(resting), len(guesses))
            for guess in guesses:
                yield from (guess.id, guess.parent, guess.token, len(guess.proposal))
                yield from (token for token, _ in guess.proposal)
                yield from _singles([*(q for _, q in guess.proposal), guess.logp])
        case Report():
            for time in (message.busy_s, message.waiting_s):
                yield from _float(time)
            for name in _COUNTS:
                yield from _long(getattr(message, name))
            yield int(message.failed)
        case End() | Close() | Beat():
            pass


def _decode_body(kind: type, read: _Reader) -> Message:
    sequence = read.word()
    if kind is Start:
        mode = read.word()
        gamma, branches, width, max_ahead = (None if word == _AUTO else word for word in read.words(4))
        block, most, ahead, top_k, rejection = read.words(5)
        temperature, top_p, min_p = read.real(), read.real(), read.real()
        seed = read.long()
        schedule = replace(Schedule.of(_mode(mode)), gamma=gamma, branches=branches, width=width, max_ahead=max_ahead)
        method = "rejection" if rejection else "seeded"
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, method=method
        )
        continues, count = read.words(2)
        return Start(sequence, schedule, params, read.words(count), Plan(block, most, ahead), continues)
    if kind is Verdict:
        position, block, most, ahead, count = read.words(5)
        tokens = read.words(count)
        if not read.left:
            return Verdict(sequence, position, Plan(block, most, ahead), tokens)
        rows, width, elsewhere = read.words(3)
        if rows < 0 or width < 0 or rows * width > 2 * MOST:
            raise Garbage(f"features of {rows} positions with {width} numbers each")
        features = SentSeparately((rows, width)) if elsewhere else read.halves(rows * width).reshape(rows, width)
        return Verdict(sequence, position, Plan(block, most, ahead), tokens, features)
    if kind is Costs:
        return Costs(sequence, read.singles(read.word()))
    if kind is Nodes:
        root, position, resting, count = read.words(4)
        return Nodes(sequence, root, position, bool(resting), tuple(_decode_guess(read) for _ in range(count)))
    if kind is Report:
        busy, waiting = read.real(), read.real()
        counts = {name: read.long() for name in _COUNTS}
        return Report(sequence, busy, waiting, **counts, failed=bool(read.word()))
    return kind(sequence)


def _mode(number: int) -> str:
    if not 0 <= number < len(MODES):
        raise Garbage(f"there is no mode {number}")
    return MODES[number]


def _decode_guess(read: _Reader) -> Guess:
    id, parent, token, support = read.words(4)
    tokens = read.words(support)
    *q, logp = read.singles(support + 1)
    return Guess(id, parent, token, tuple(zip(tokens, q, strict=True)), logp)
