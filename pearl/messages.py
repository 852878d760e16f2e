"""What the two sides say to each other, and its layout in 32-bit words.

    target -> drafter    Start    a sequence begins: its schedule, its sampling, its prompt
                         Verdict  the tokens that a pass committed (tokens, not node ids: tokens have no races)
                         End      the sequence is over
    drafter -> target    Nodes    guesses: (id, parent id, token) each, and their q where rejection sampling needs it
                         Report   what the drafter did in a sequence, in answer to End
    both ways            Close    nothing more will come

Every message carries the number of its sequence, so nothing can leak into the next one. A message is a *frame* of 16
words (64 bytes); a longer one says so in its second word and the rest follows in one piece. Both ends know the shapes:
numbers only, no pickles. Floating-point numbers travel as their own bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pearl.sampling import SamplingParams
from pearl.schedule import MAX_GAMMA, MODES, Schedule

FRAME = 16  # words
_AUTO = MAX_GAMMA + 1  # gamma "auto" on the wire
Words = np.ndarray  # int32 [n]


@dataclass(frozen=True)
class Guess:
    """A new node: `token` follows the node called `parent` and is called `id` from now on."""

    id: int
    parent: int
    token: int
    proposal: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Start:
    sequence: int
    schedule: Schedule
    params: SamplingParams  # stop strings and token limits stay with the target, which alone decides the end
    prompt: tuple[int, ...]
    block: int  # the block length in force, see Schedule.guesses_to_wait_for


@dataclass(frozen=True)
class Verdict:
    sequence: int
    position: int  # of the new root
    block: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class End:
    sequence: int


@dataclass(frozen=True)
class Nodes:
    """`root` is the id of the drafter's root and `position` its place in the text: so the target knows every parent.
    `resting`: no more will come until the root moves."""

    sequence: int
    root: int
    position: int
    resting: bool
    guesses: tuple[Guess, ...] = ()


@dataclass(frozen=True)
class Report:
    """The drafter's facts of one sequence: times in seconds, memory in bytes."""

    sequence: int
    busy_s: float = 0.0
    waiting_s: float = 0.0
    forwards: int = 0
    drafted: int = 0
    verdicts: int = 0
    hits: int = 0  # verdicts whose new root was already in the drafter's trie
    memory: int = 0
    failed: bool = False  # the draft source raised; the rest of the sequence is the target's alone


@dataclass(frozen=True)
class Close:
    sequence: int = 0


Message = Start | Verdict | End | Nodes | Report | Close
_KINDS: tuple[type, ...] = (Start, Verdict, End, Nodes, Report, Close)


def _float(x: float) -> list[int]:
    return np.array([x], np.float64).view(np.int32).tolist()


def _long(x: int) -> list[int]:
    return np.array([x], np.int64).view(np.int32).tolist()


class _Reader:
    """Takes numbers off the front of a row of words."""

    def __init__(self, words: Words):
        self._words, self._at = words, 0

    def _take(self, count: int) -> Words:
        taken = self._words[self._at : self._at + count]
        assert len(taken) == count, "a message ended early"
        self._at += count
        return taken

    def word(self) -> int:
        return int(self._take(1)[0])

    def words(self, count: int) -> tuple[int, ...]:
        return tuple(self._take(count).tolist())

    def real(self) -> float:
        return float(self._take(2).copy().view(np.float64)[0])

    def long(self) -> int:
        return int(self._take(2).copy().view(np.int64)[0])


def encode(message: Message) -> Words:
    """The message as words, the first two being its kind and its length, padded to a frame."""
    body = list(_encode_body(message))
    words = [_KINDS.index(type(message)), 2 + len(body), *body]
    return np.array(words + [0] * (FRAME - len(words)), np.int32)


def length(frame: Words) -> int:
    """How many words the message has whose first frame this is."""
    return max(FRAME, int(frame[1]))


def decode(words: Words) -> Message:
    """The inverse of `encode`."""
    kind = _KINDS[int(words[0])]
    return _decode_body(kind, _Reader(words[2 : int(words[1])]))


def _encode_body(message: Message) -> Iterator[int]:
    yield message.sequence
    match message:
        case Start(_, schedule, params, prompt, block):
            yield from (MODES.index(schedule.mode), _AUTO if schedule.gamma is None else schedule.gamma)
            top_k = min(params.top_k, 2**31 - 1)  # no vocabulary is larger
            yield from (schedule.max_ahead, block, top_k, int(params.rejection))
            for number in (params.temperature, params.top_p, params.min_p):
                yield from _float(number)
            yield from _long(params.seed)
            yield from (len(prompt), *prompt)
        case Verdict(_, position, block, tokens):
            yield from (position, block, len(tokens), *tokens)
        case Nodes(_, root, position, resting, guesses):
            yield from (root, position, int(resting), len(guesses))
            for guess in guesses:
                yield from (guess.id, guess.parent, guess.token, len(guess.proposal))
                yield from (token for token, _ in guess.proposal)
                yield from np.array([q for _, q in guess.proposal], np.float32).view(np.int32).tolist()
        case Report():
            for seconds in (message.busy_s, message.waiting_s):
                yield from _float(seconds)
            counts = (message.forwards, message.drafted, message.verdicts, message.hits, message.memory, message.failed)
            for count in counts:
                yield from _long(count)
        case End() | Close():
            pass


def _decode_body(kind: type, read: _Reader) -> Message:
    sequence = read.word()
    if kind is Start:
        mode, gamma, max_ahead, block, top_k, rejection = read.words(6)
        temperature, top_p, min_p = read.real(), read.real(), read.real()
        seed = read.long()
        schedule = replace(Schedule.of(MODES[mode], None if gamma == _AUTO else gamma), max_ahead=max_ahead)
        method = "rejection" if rejection else "seeded"
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, method=method
        )
        return Start(sequence, schedule, params, read.words(read.word()), block)
    if kind is Verdict:
        position, block, count = read.words(3)
        return Verdict(sequence, position, block, read.words(count))
    if kind is Nodes:
        root, position, resting, count = read.words(4)
        return Nodes(sequence, root, position, bool(resting), tuple(_decode_guess(read) for _ in range(count)))
    if kind is Report:
        busy, waiting = read.real(), read.real()
        forwards, drafted, verdicts, hits, memory, failed = (read.long() for _ in range(6))
        return Report(sequence, busy, waiting, forwards, drafted, verdicts, hits, memory, bool(failed))
    return kind(sequence)


def _decode_guess(read: _Reader) -> Guess:
    id, parent, token, support = read.words(4)
    tokens = read.words(support)
    q = np.array(read.words(support), np.int32).view(np.float32).tolist()
    return Guess(id, parent, token, tuple(zip(tokens, q, strict=True)))
