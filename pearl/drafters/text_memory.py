"""Earlier texts as a source of guesses: where their tokens stand, found by hashes of the last few.

The place of a match is found as LZ77 coders find theirs (hash chains, as in zlib): for windows of a few lengths there
is a table of the last place where a window with that hash ended, and each place knows the one before it with the same
hash. A hit is compared token by token, and the match is measured by how far back it goes. Measured at a million tokens
beside suffix arrays and an automaton of Python objects (docs/log.md), this needs the least of memory and of time: at
most 28 bytes a token, and a fixed number of places to look at whatever the size.

The texts least recently used go first, some at a time, as a table without them is made anew. A text that helped to
write another counts as used.

Knows: tokens of texts that are over. Refuses to know: the text that is being written, and what a guess is worth.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pearl.errors import UsageError
from pearl.machine.files import atomic_write

WINDOWS = (16, 5)  # tokens, longest first: long ones tell texts apart that share much, short ones find the rest
TRIED = (4, 6)  # places that are looked at, for each
BYTES_A_TOKEN = 28  # at most: the token, and for each window a link and one or two places in a table
MATCHED = 48  # tokens: no match is measured further
_KEPT = 0.75  # of the room, when some texts have to go
_END = -1  # between texts: no token
_PRIME = 0x9E3779B1


class Match(NamedTuple):
    """The last `length` tokens of a text are those that end before `place`, where what followed them stands."""

    place: int
    length: int


class TextMemory:
    """Of at most `mb` MB."""

    def __init__(self, mb: float):
        self.capacity = max(64, int(mb * 1e6 / BYTES_A_TOKEN))
        self._tokens = np.zeros(self.capacity, dtype=np.int32)
        slots = 1 << (2 * self.capacity - 1).bit_length() - 1
        self._mask = slots - 1
        self._last = [np.full(slots, -1, dtype=np.int32) for _ in WINDOWS]  # by hash: the end of a window
        self._before = [np.full(self.capacity, -1, dtype=np.int32) for _ in WINDOWS]  # with the same hash
        self._starts: list[int] = []  # of the texts, ascending
        self._used: list[int] = []  # when each was, on a clock that counts uses
        self._start_of: dict[int, int] = {}  # by a hash of the whole text
        self._clock = itertools.count(1)
        self._end = 0
        self._waiting: list[Sequence[int]] | None = None  # since this round began
        self.moves = 0  # how often places have changed

    @property
    def texts(self) -> int:
        return len(self._starts)

    @property
    def size(self) -> int:
        """Tokens, with one between texts."""
        return self._end

    def add(self, tokens: Sequence[int]) -> None:
        """A text that is over; of one that has no room its end."""
        if self._waiting is not None:
            self._waiting.append(tokens)
            return
        text = np.array([*tokens[-(self.capacity // 2) :], _END], dtype=np.int32)
        start = self._start_of.get(_hash_of(text))
        if start is not None and np.array_equal(self._tokens[start : start + len(text)], text):
            self.touch(start)
            return
        if self._end + len(text) > self.capacity:
            self._make_room(len(text))
        first = self._end
        self._append(text, next(self._clock))
        self._index(first)

    def begin_round(self, forget: bool = False) -> None:
        """What is added from now on is found from the next round on: no mode of an evaluation helps another.
        `forget`: what was added in the last round."""
        waiting, self._waiting = self._waiting or [], None
        for tokens in () if forget else waiting:
            self.add(tokens)
        self._waiting = []

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The longest match of the end of a text, of equals the newest; None: there is none of `WINDOWS[-1]` tokens."""
        for level, size in enumerate(WINDOWS):
            if len(tokens) < size:
                continue
            tail = np.array(tokens[-MATCHED:], dtype=np.int32)
            place, best = int(self._last[level][self._hash(tail[-size:].tolist())]), None
            for _ in range(TRIED[level]):
                if place < 0:
                    break
                length = self._matched(tail, place + 1)
                if length >= size and (best is None or length > best.length):
                    best = Match(place + 1, length)
                    if length == len(tail):
                        break
                place = int(self._before[level][place])
            if best:
                return best
        return None

    def after(self, place: int, most: int) -> list[int]:
        """At most so many tokens from a place on, up to the end of that text."""
        found = self._tokens[place : min(place + most, self._end)].tolist()
        return found[: found.index(_END)] if _END in found else found

    def token(self, place: int) -> int:
        """That at a place; below 0 where a text has ended."""
        return int(self._tokens[place]) if place < self._end else _END

    def touch(self, place: int) -> None:
        """The text there is of use. `place`: of one of its tokens, or after the last."""
        self._used[bisect.bisect_right(self._starts, place) - 1] = next(self._clock)

    def _matched(self, tail: np.ndarray, end: int) -> int:
        """How many tokens before `end` are the last of `tail`."""
        most = min(len(tail), end)
        same = self._tokens[end - most : end][::-1] == tail[len(tail) - most :][::-1]
        return most if same.all() else int(same.argmin())

    def _hash(self, window: Sequence[int]) -> int:
        value = 0
        for token in window:
            value = (value * _PRIME + token + 1) & 0xFFFFFFFFFFFFFFFF
        return (value >> 20) & self._mask

    def _append(self, text: np.ndarray, used: int) -> None:
        """`text`: with `_END`. The tables do not know it yet."""
        self._starts.append(self._end)
        self._used.append(used)
        self._start_of[_hash_of(text)] = self._end
        self._tokens[self._end : self._end + len(text)] = text
        self._end += len(text)

    def _index(self, first: int) -> None:
        """Hangs the windows that end from `first` on into the tables."""
        for level, size in enumerate(WINDOWS):
            begin = max(first, size - 1)
            if begin >= self._end:
                continue
            part = self._tokens[begin - size + 1 : self._end].astype(np.uint64)
            value = np.zeros(self._end - begin, dtype=np.uint64)
            for offset in range(size):
                value = value * np.uint64(_PRIME) + part[offset : offset + len(value)] + np.uint64(1)
            hashes = ((value >> np.uint64(20)) & np.uint64(self._mask)).astype(np.int64)
            order = np.argsort(hashes, kind="stable")
            same = np.zeros(len(order), dtype=bool)  # as the one before it, in that order
            same[1:] = hashes[order[1:]] == hashes[order[:-1]]
            before = self._last[level][hashes[order]]
            before[same] = order[:-1][same[1:]] + begin
            self._before[level][order + begin] = before
            newest = np.append(~same[1:], True)
            self._last[level][hashes[order[newest]]] = order[newest] + begin

    def _make_room(self, needed: int) -> None:
        """Lets go of the texts least recently used; the tables are made anew."""
        room = int(_KEPT * self.capacity) - needed
        ends = [*self._starts[1:], self._end]
        kept = []
        for used, start, end in sorted(zip(self._used, self._starts, ends, strict=True), reverse=True):
            room -= end - start
            if room < 0:
                break
            kept.append((used, self._tokens[start:end].copy()))
        self.moves += 1
        self._starts, self._used, self._start_of, self._end = [], [], {}, 0
        for table in (*self._last, *self._before):
            table.fill(-1)
        for used, text in reversed(kept):
            self._append(text, used)
        self._index(0)

    # On disk

    def save(self, path: Path, vocabulary: int) -> None:
        """`vocabulary`: of the tokens."""
        if self._waiting:
            self.begin_round()
        order = np.argsort(self._used)
        starts, ends = np.array(self._starts, dtype=np.int64), np.array([*self._starts[1:], self._end], dtype=np.int64)
        texts = [self._tokens[starts[text] : ends[text]] for text in order]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(
                file,
                tokens=np.concatenate(texts) if texts else np.zeros(0, dtype=np.int32),
                vocabulary=np.int64(vocabulary),
            )

    def load(self, path: Path, vocabulary: int) -> int:
        """What was saved there, as far as there is room for it; the least recently used texts come first. Returns how
        many tokens that are, with those that have no room. Raises `UsageError`."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                kept, of = saved["tokens"], int(saved["vocabulary"])
            tokens = kept.astype(np.int32, casting="same_kind")
        except MemoryError:
            raise
        except Exception as error:  # no archive, a damaged one, or no numbers: numpy and zip have errors of many kinds
            if isinstance(error, OSError) and error.strerror:
                raise UsageError(f"The memory {path} can't be read ({error.strerror}): name another file.") from None
            raise UsageError(_no_memory(path)) from None
        if of != vocabulary:
            raise UsageError(
                f"The memory {path} holds tokens of another vocabulary ({of} tokens, not {vocabulary}): give each "
                "target a memory of its own."
            )
        if tokens.ndim != 1 or (len(tokens) and not (tokens.min() >= _END and tokens.max() < vocabulary)):
            raise UsageError(_no_memory(path))
        for text in np.split(tokens, np.flatnonzero(tokens == _END) + 1):
            if len(text) > 1:
                self.add(text[:-1].tolist())
        return len(tokens)


def _no_memory(path: Path) -> str:
    return f"{path} is damaged, or no memory of texts at all: name another memory_file, or delete it."


def _hash_of(text: np.ndarray) -> int:
    return hash(text.tobytes())
