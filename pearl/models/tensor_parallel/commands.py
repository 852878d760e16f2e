"""What the first rank of a tensor-parallel target tells the others: the calls of its reader, as small whole numbers.

Every rank holds a `LanguageModel` over its shard of the weights. It is a function of the calls that were made of it:
which rows a forward has, where they lie in the cache and what moves there follows from them. So a call is all that a
rank must be told, and it is a few dozen numbers: of a text only what is new since the call before. Rank 0 alone knows
why a call is made; nobody else decides anything.

A call is a list of words, the first of which is its kind; a sequence is written as its length and its items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from pearl.core.token_buckets import LIMIT, BatchedTokenBuckets, TokenBuckets
from pearl.core.trie import shared_prefix
from pearl.models.language_model import LanguageModel, SideRow, Wanted


class Texts:
    """What both sides know of each text: its tokens in the last call that named it."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, ...]] = {}

    def fold(self, text: int, tokens: Sequence[int]) -> list[int]:
        """`tokens` as words: how many of the last ones stay, and what follows them."""
        tokens = tuple(tokens)
        kept = shared_prefix(self._last.get(text, ()), tokens)
        self._last[text] = tokens
        return [kept, *_sequence(tokens[kept:])]

    def unfold(self, text: int, words: Iterator[int]) -> tuple[int, ...]:
        tokens = self._last.get(text, ())[: next(words)] + _items(words)
        self._last[text] = tokens
        return tokens


@dataclass(frozen=True)
class Read:
    """`LanguageModel.read`"""

    kind: ClassVar[int] = 1
    wanted: Wanted
    padded: bool

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.padded, *_wanted(self.wanted, texts)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Read:
        padded = bool(next(words))
        return Read(_one_wanted(words, texts), padded)

    def on(self, reader: LanguageModel) -> object:
        one = self.wanted
        return reader.read(one.tokens, one.keep, self.padded, one.branches, one.text)


@dataclass(frozen=True)
class ReadTogether:
    """`LanguageModel.read_together`"""

    kind: ClassVar[int] = 2
    wanted: tuple[Wanted, ...]

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, len(self.wanted), *chain.from_iterable(_wanted(one, texts) for one in self.wanted)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> ReadTogether:
        return ReadTogether(tuple(_one_wanted(words, texts) for _ in range(next(words))))

    def on(self, reader: LanguageModel) -> object:
        return reader.read_together(self.wanted)


@dataclass(frozen=True)
class Forward:
    """`LanguageModel.forward`"""

    kind: ClassVar[int] = 3
    tokens: tuple[int, ...]
    first: int
    keep: int

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.first, self.keep, *_sequence(self.tokens)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Forward:
        first, keep = next(words), next(words)
        return Forward(_items(words), first, keep)

    def on(self, reader: LanguageModel) -> object:
        return reader.forward(list(self.tokens), self.first, self.keep)


@dataclass(frozen=True)
class TryTogether:
    """`LanguageModel.try_together`"""

    kind: ClassVar[int] = 4
    tokens: tuple[int, ...]
    first: int
    lengths: tuple[int, ...]
    count: int

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.first, self.count, *_sequence(self.tokens), *_sequence(self.lengths)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> TryTogether:
        first, count = next(words), next(words)
        return TryTogether(_items(words), first, _items(words), count)

    def on(self, reader: LanguageModel) -> object:
        return reader.try_together(list(self.tokens), self.first, self.lengths, self.count)


@dataclass(frozen=True)
class Forget:
    """`LanguageModel.forget`"""

    kind: ClassVar[int] = 5
    but: tuple[int, ...]
    text: int

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.text, *texts.fold(self.text, self.but)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Forget:
        text = next(words)
        return Forget(texts.unfold(text, words), text)

    def on(self, reader: LanguageModel) -> object:
        return reader.forget(self.but, self.text)


@dataclass(frozen=True)
class Rows:
    """`LanguageModel.rows` and `joint` are these from now on. What a count costs is only the first rank's business."""

    kind: ClassVar[int] = 6
    safe: tuple[int, ...]
    branches: bool
    joint: tuple[int, ...]  # empty: no forwards that several texts share

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.branches, *_sequence(self.safe), *_sequence(self.joint)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Rows:
        branches = bool(next(words))
        return Rows(_items(words), branches, _items(words))

    def on(self, reader: LanguageModel) -> object:
        reader.rows = TokenBuckets(self.safe, (0.0,) * LIMIT, branches=self.branches)
        reader.joint = BatchedTokenBuckets(self.joint, (0.0,) * len(self.joint)) if self.joint else None
        return None


@dataclass(frozen=True)
class Spread:
    """`LanguageModel.spread`"""

    kind: ClassVar[int] = 9
    tokens: int

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.tokens]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Spread:
        return Spread(next(words))

    def on(self, reader: LanguageModel) -> object:
        return reader.spread(self.tokens)


@dataclass(frozen=True)
class Wait:
    """Nothing to do; the first rank is alive."""

    kind: ClassVar[int] = 7

    def words(self, texts: Texts) -> list[int]:
        return [self.kind]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Wait:
        return Wait()

    def on(self, reader: LanguageModel) -> object:
        return None


@dataclass(frozen=True)
class End:
    """The run is over."""

    kind: ClassVar[int] = 8

    def words(self, texts: Texts) -> list[int]:
        return [self.kind]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> End:
        return End()

    def on(self, reader: LanguageModel) -> object:
        return None


Call = Read | ReadTogether | Forward | TryTogether | Forget | Rows | Spread | Wait | End
_KINDS: dict[int, type[Call]] = {
    made.kind: made for made in (Read, ReadTogether, Forward, TryTogether, Forget, Rows, Spread, Wait, End)
}


def decode(words: Sequence[int], texts: Texts) -> Call:
    """The call that these words are. `texts` is what was known of the texts before it, on both sides."""
    rest = iter(words)
    call = _KINDS[next(rest)].of(rest, texts)
    assert next(rest, None) is None, "a call is all of its words"
    return call


def _wanted(one: Wanted, texts: Texts) -> list[int]:
    return [one.text, one.keep, *texts.fold(one.text, one.tokens), *_sequence(chain.from_iterable(one.branches))]


def _one_wanted(words: Iterator[int], texts: Texts) -> Wanted:
    text, keep = next(words), next(words)
    tokens, flat = texts.unfold(text, words), _items(words)
    branches: list[SideRow] = list(zip(flat[::2], flat[1::2], strict=True))
    return Wanted(text, tokens, keep, tuple(branches))


def _sequence(items: Iterable[int]) -> list[int]:
    listed = list(items)
    return [len(listed), *listed]


def _items(words: Iterator[int]) -> tuple[int, ...]:
    return tuple(next(words) for _ in range(next(words)))
