"""Messages as 32-bit words, and back: what travels between two processes.

    word 0      the kind: the place of its layout in `_LAYOUTS`
    word 1      how many words it has, these two included
    word 2 ...  its parts, as `_LAYOUTS` lists them, which is read both ways: a new message is one more entry there

Of features it has the shape: they travel another way, as what they are.

Knows: the layout of every message of `pearl.core.messages`; what can't be one is a `MalformedMessage`. Refuses to know:
frames, groups and what a message is for.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pearl.core.messages import (
    MAX_FEATURES,
    MAX_MESSAGE_WORDS,
    Beat,
    Close,
    Costs,
    DraftPlan,
    DraftStats,
    End,
    Guess,
    MalformedMessage,
    Message,
    Nodes,
    SentSeparately,
    Start,
    Verdict,
)
from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.core.trie import ORIGIN_NUMBER, ORIGINS
from pearl.errors import UsageError

_AUTO = -1  # on the wire
_SETTINGS = (
    "gamma",
    "draft_batch",
    "max_verify_tokens",
    "max_draft_tokens",
)  # a number each, None: auto
_ORIGIN_SHIFT = 16  # bits of a guess's origin above the size of its proposal, in one word
_LARGEST = 2**31 - 1  # no vocabulary is larger

Words = np.ndarray  # int32 [n]


class _Writer:
    """Puts numbers one after the other, behind a head. `kind` is a letter of `struct`: i, q, f or d."""

    def __init__(self) -> None:
        self.data = bytearray(4 * _HEAD)

    def put(self, kind: str, *numbers: float) -> None:
        self.data += struct.pack(f"<{len(numbers)}{kind}", *numbers)


class _Reader:
    """Takes numbers off the front."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes."""
        return len(self._data) - self._at

    def get(self, kind: str, count: int) -> tuple[Any, ...]:
        begin, end = self._at, self._at + count * _SIZES[kind]
        if not begin <= end <= len(self._data):  # the count may be anything
            raise MalformedMessage(
                f"a message of {len(self._data)} bytes ends before {count} numbers that it should hold"
            )
        self._at = end
        return struct.unpack_from(f"<{count}{kind}", self._data, begin)


@dataclass(frozen=True)
class _Part:
    """How something is written, and how it is read again."""

    write: Callable[[_Writer, Any], None]
    read: Callable[[_Reader], Any]


def _number(kind: str) -> _Part:
    return _Part(lambda to, x: to.put(kind, x), lambda of: of.get(kind, 1)[0])


def _row(kind: str) -> _Part:
    """Numbers, after their count."""

    def write(to: _Writer, row: Sequence[float]) -> None:
        to.put("i", len(row))
        to.put(kind, *row)

    return _Part(write, lambda of: of.get(kind, *of.get("i", 1)))


def _several(part: _Part) -> _Part:
    """Parts, after their count."""

    def write(to: _Writer, row: Sequence[Any]) -> None:
        to.put("i", len(row))
        for one in row:
            part.write(to, one)

    return _Part(write, lambda of: tuple(part.read(of) for _ in range(*of.get("i", 1))))


def _record(kind: type, words: str, **parts: _Part) -> _Part:
    """A dataclass: the fields that are a word each, by name, and then the others."""
    names = words.split()
    values = operator.attrgetter(*names, *parts)

    def write(to: _Writer, record: Any) -> None:
        found = values(record) if len(names) + len(parts) > 1 else (values(record),)
        to.put("i", *found[: len(names)])
        for value, part in zip(found[len(names) :], parts.values(), strict=True):
            part.write(to, value)

    def read(of: _Reader) -> Any:
        found = of.get("i", len(names))
        if not parts:
            return kind(*found)  # which has no other fields
        return kind(**dict(zip(names, found, strict=True)), **{name: part.read(of) for name, part in parts.items()})

    return _Part(write, read)


def _write_schedule(to: _Writer, schedule: Schedule) -> None:
    settings = [getattr(schedule, name) for name in _SETTINGS]
    to.put("i", MODES.index(schedule.mode), *(_AUTO if setting is None else setting for setting in settings))


def _read_schedule(of: _Reader) -> Schedule:
    mode, *settings = of.get("i", 1 + len(_SETTINGS))
    if not 0 <= mode < len(MODES):
        raise MalformedMessage(f"there is no mode {mode}")
    known: Any = {name: None if x == _AUTO else x for name, x in zip(_SETTINGS, settings, strict=True)}
    return replace(Schedule.of(MODES[mode]), **known)


def _write_params(to: _Writer, params: SamplingParams) -> None:
    """What shapes a guess; what ends a text stays with the target, and so do callables."""
    params = params.with_defaults()
    assert params.seed is not None, "a sequence has a seed before it begins"
    to.put("i", params.rejection)
    to.put("q", params.seed)
    to.put("d", *(getattr(params, name) for name in _FLOATS))
    to.put("i", *(min(getattr(params, name), _LARGEST) for name in _INTEGERS))
    for name, part in _LISTS.items():
        part.write(to, getattr(params, name))
    _ROW.write(to, tuple(params.logit_bias))
    to.put("d", *params.logit_bias.values())
    to.put("i", params.allowed_token_ids is not None)
    _ROW.write(to, params.allowed_token_ids or ())


def _read_params(of: _Reader) -> SamplingParams:
    (rejection,) = of.get("i", 1)
    (seed,) = of.get("q", 1)
    known: dict[str, Any] = dict(zip(_FLOATS, of.get("d", len(_FLOATS)), strict=True))
    known |= zip(_INTEGERS, of.get("i", len(_INTEGERS)), strict=True)
    known |= {name: part.read(of) for name, part in _LISTS.items()}
    biased = _ROW.read(of)
    known["logit_bias"] = dict(zip(biased, of.get("d", len(biased)), strict=True))
    (limited,) = of.get("i", 1)
    allowed = _ROW.read(of)
    known["allowed_token_ids"] = allowed if limited else None
    method, most = "rejection" if rejection else "seeded", max(1, known["min_tokens"])
    return SamplingParams(method=method, max_new_tokens=most, seed=seed, **known)


def _write_features(to: _Writer, features: Any) -> None:
    """The last part: nothing, or the shape of what comes another way."""
    if features is not None:
        on_host = isinstance(features, np.ndarray)
        to.put("i", *features.shape, features.direct if isinstance(features, SentSeparately) else not on_host)


def _read_features(of: _Reader) -> SentSeparately | None:
    if not of.left:
        return None
    rows, width, direct = of.get("i", 3)
    if rows < 0 or width < 0 or rows * width > MAX_FEATURES:
        raise MalformedMessage(f"features of {rows} positions with {width} numbers each")
    return SentSeparately((rows, width), bool(direct))


def _write_spans(to: _Writer, spans: tuple[float, ...]) -> None:
    """The last part, so that it costs nothing where nobody watches."""
    to.put("d", *spans)


def _read_spans(of: _Reader) -> tuple[float, ...]:
    return of.get("d", of.left // _SIZES["d"])


def _write_guess(to: _Writer, guess: Guess) -> None:
    counts = len(guess.proposal) | ORIGIN_NUMBER[guess.origin] << _ORIGIN_SHIFT
    to.put("i", guess.id, guess.parent, guess.token, counts, *(token for token, _ in guess.proposal))
    to.put("f", *(q for _, q in guess.proposal), guess.logp)


def _read_guess(of: _Reader) -> Guess:
    id, parent, token, counts = of.get("i", 4)
    origin, support = counts >> _ORIGIN_SHIFT, counts & (1 << _ORIGIN_SHIFT) - 1
    if not 0 <= origin < len(ORIGINS):
        raise MalformedMessage(f"there is no origin {origin}")
    tokens = of.get("i", support)
    *q, logp = of.get("f", support + 1)
    return Guess(id, parent, token, tuple(zip(tokens, q, strict=True)), logp, ORIGINS[origin])


_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTEGERS = ("top_k", "min_tokens", "no_repeat_ngram_size")
_ROW = _row("i")
_LISTS = {"stop_token_ids": _ROW, "suppress_tokens": _ROW, "bad_words_ids": _several(_ROW)}
_SIZES = {"i": 4, "f": 4, "q": 8, "d": 8}  # bytes
_LONG, _DOUBLE = _number("q"), _number("d")
_FLAG = _Part(lambda to, x: to.put("i", x), lambda of: bool(*of.get("i", 1)))
_PLAN = _record(DraftPlan, "gamma draft_batch max_depth")
_GUESS = _Part(_write_guess, _read_guess)
_COUNTS = (
    *("forwards", "overtaken", "rows", "lookahead_rows", "lookahead_hits"),
    *("drafted", "verdicts", "hits", "misses", "prepared"),
)

_LAYOUTS: dict[type, _Part] = {
    Start: _record(
        Start,
        "sequence_id continues",
        timed=_FLAG,
        schedule=_Part(_write_schedule, _read_schedule),
        params=_Part(_write_params, _read_params),
        plan=_PLAN,
        prompt=_row("i"),
        reference=_row("i"),
    ),
    Verdict: _record(
        Verdict,
        "sequence_id position",
        plan=_PLAN,
        tokens=_row("i"),
        features=_Part(_write_features, _read_features),
    ),
    End: _record(End, "sequence_id"),
    Costs: _record(Costs, "sequence_id", seconds=_row("f")),
    Nodes: _record(
        Nodes,
        "sequence_id root position",
        exhausted=_FLAG,
        guesses=_several(_GUESS),
        spans=_Part(_write_spans, _read_spans),
    ),
    DraftStats: _record(
        DraftStats,
        "sequence_id",
        failed=_FLAG,
        busy_s=_DOUBLE,
        waiting_s=_DOUBLE,
        overtaken_s=_DOUBLE,
        **dict.fromkeys((*_COUNTS, "memory"), _LONG),
    ),
    Close: _record(Close, "sequence_id"),
    Beat: _record(Beat, "sequence_id", sent=_DOUBLE, echoed=_DOUBLE, heard=_DOUBLE),
}
_KINDS = {kind: number for number, kind in enumerate(_LAYOUTS)}
_READS = [part.read for part in _LAYOUTS.values()]
_TOGETHER = len(_LAYOUTS)  # the kind of several messages in one
_HEAD = 2  # words: kind and length


def encode(message: Message) -> Words:
    """The message as words."""
    kind, to = type(message), _Writer()
    _LAYOUTS[kind].write(to, message)
    struct.pack_into("<2i", to.data, 0, _KINDS[kind], len(to.data) // 4)
    return np.frombuffer(to.data, np.int32)


def decode(words: Words) -> Message:
    """The inverse of `encode`. Raises `MalformedMessage`."""
    kind, count = words[:_HEAD].tolist()
    if not 0 <= kind < len(_READS) or count != len(words):
        raise MalformedMessage(f"kind {kind} and length {count} of {len(words)} words")
    of = _Reader(words[2:].tobytes())
    try:
        message = _READS[kind](of)
    except (ArithmeticError, LookupError, UsageError, ValueError) as error:
        raise MalformedMessage(str(error)) from None
    if of.left:
        raise MalformedMessage(f"{of.left} bytes more than a {type(message).__name__} has")
    return message


def length(head: Words) -> int:
    """How many words the message has that begins with these, two at least. Raises `MalformedMessage`."""
    kind, count = head[:_HEAD].tolist()
    if not 0 <= kind <= _TOGETHER or not _HEAD < count <= MAX_MESSAGE_WORDS:
        raise MalformedMessage(f"there is no message of kind {kind} and {count} words")
    return count


def pack(messages: Sequence[Message]) -> Words:
    """Several messages as one, so that what is said of many texts at once leaves at once; one is itself."""
    if len(messages) == 1:
        return encode(messages[0])
    inner = [encode(message) for message in messages]
    return np.concatenate([np.array([_TOGETHER, _HEAD + sum(map(len, inner))], np.int32), *inner])


def unpack(words: Words) -> list[Message]:
    """The inverse of `pack`. Raises `MalformedMessage`."""
    if words[0] != _TOGETHER:
        return [decode(words)]
    messages, at = [], _HEAD
    while at + _HEAD <= len(words):
        size = length(words[at:])
        messages.append(decode(words[at : at + size]))
        at += size
    if at != len(words) or not messages:
        raise MalformedMessage(f"several messages of {at} words in {len(words)}")
    return messages
