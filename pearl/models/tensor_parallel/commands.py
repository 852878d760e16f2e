"""What the first rank of a tensor-parallel target tells the others: the calls of its reader, as small whole numbers.

Every rank holds a `VerifierModel` over its shard of the weights. It is a function of the calls that were made of it:
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
from pearl.models.language_model import SideRow
from pearl.models.verifier import SequenceQuery, SharedForwardTrial, VerifierModel


class Texts:
    """What both sides know of each batch slot: the tokens of the last call that named it."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, ...]] = {}

    def fold(self, batch_slot: int, tokens: Sequence[int]) -> list[int]:
        """`tokens` as words: how many of the last ones stay, and what follows them."""
        tokens = tuple(tokens)
        kept = shared_prefix(self._last.get(batch_slot, ()), tokens)
        self._last[batch_slot] = tokens
        return [kept, *_sequence(tokens[kept:])]

    def unfold(self, batch_slot: int, words: Iterator[int]) -> tuple[int, ...]:
        tokens = self._last.get(batch_slot, ())[: next(words)] + _items(words)
        self._last[batch_slot] = tokens
        return tokens


@dataclass(frozen=True)
class Read:
    """`VerifierModel.read`"""

    kind: ClassVar[int] = 1
    query: SequenceQuery

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, *_query(self.query, texts)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Read:
        return Read(_one_query(words, texts))

    def on(self, shard: VerifierModel) -> object:
        one = self.query
        return shard.read(one.tokens, one.keep, one.side_rows, one.batch_slot)


@dataclass(frozen=True)
class ReadTogether:
    """`VerifierModel.read_together`"""

    kind: ClassVar[int] = 2
    queries: tuple[SequenceQuery, ...]

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, len(self.queries), *chain.from_iterable(_query(one, texts) for one in self.queries)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> ReadTogether:
        return ReadTogether(tuple(_one_query(words, texts) for _ in range(next(words))))

    def on(self, shard: VerifierModel) -> object:
        return shard.read_together(self.queries)


@dataclass(frozen=True)
class Forward:
    """`VerifierModel.forward`"""

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

    def on(self, shard: VerifierModel) -> object:
        return shard.forward(list(self.tokens), self.first, self.keep)


@dataclass(frozen=True)
class ReadTrial:
    """`SharedForwardTrial.read`"""

    kind: ClassVar[int] = 4
    tokens: tuple[int, ...]
    first: int
    lengths: tuple[int, ...]
    count: int

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.first, self.count, *_sequence(self.tokens), *_sequence(self.lengths)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> ReadTrial:
        first, count = next(words), next(words)
        return ReadTrial(_items(words), first, _items(words), count)

    def on(self, shard: VerifierModel) -> object:
        return SharedForwardTrial(shard).read(self.tokens, self.first, self.lengths, self.count)


@dataclass(frozen=True)
class Forget:
    """`VerifierModel.forget`"""

    kind: ClassVar[int] = 5
    but: tuple[int, ...]
    batch_slot: int

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.batch_slot, *texts.fold(self.batch_slot, self.but)]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Forget:
        batch_slot = next(words)
        return Forget(texts.unfold(batch_slot, words), batch_slot)

    def on(self, shard: VerifierModel) -> object:
        return shard.forget(self.but, self.batch_slot)


@dataclass(frozen=True)
class Rows:
    """`VerifierModel.rows` and `joint` are these from now on. What a count costs is only the first rank's business."""

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

    def on(self, shard: VerifierModel) -> object:
        shard.rows = TokenBuckets(self.safe, (0.0,) * LIMIT, branches=self.branches)
        shard.joint = BatchedTokenBuckets(self.joint, (0.0,) * len(self.joint)) if self.joint else None
        return None


@dataclass(frozen=True)
class CopyFirst:
    """`SharedForwardTrial.copy_first`"""

    kind: ClassVar[int] = 9
    tokens: int

    def words(self, texts: Texts) -> list[int]:
        return [self.kind, self.tokens]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> CopyFirst:
        return CopyFirst(next(words))

    def on(self, shard: VerifierModel) -> object:
        return SharedForwardTrial(shard).copy_first(self.tokens)


@dataclass(frozen=True)
class Wait:
    """Nothing to do; the first rank is alive."""

    kind: ClassVar[int] = 7

    def words(self, texts: Texts) -> list[int]:
        return [self.kind]

    @staticmethod
    def of(words: Iterator[int], texts: Texts) -> Wait:
        return Wait()

    def on(self, shard: VerifierModel) -> object:
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

    def on(self, shard: VerifierModel) -> object:
        return None


Call = Read | ReadTogether | Forward | ReadTrial | Forget | Rows | CopyFirst | Wait | End
_KINDS: dict[int, type[Call]] = {
    made.kind: made for made in (Read, ReadTogether, Forward, ReadTrial, Forget, Rows, CopyFirst, Wait, End)
}


def decode(words: Sequence[int], texts: Texts) -> Call:
    """The call that these words are. `texts` is what was known of the texts before it, on both sides."""
    rest = iter(words)
    call = _KINDS[next(rest)].of(rest, texts)
    assert next(rest, None) is None, "a call is all of its words"
    return call


def _query(one: SequenceQuery, texts: Texts) -> list[int]:
    tokens = texts.fold(one.batch_slot, one.tokens)
    return [one.batch_slot, one.keep, *tokens, *_sequence(chain.from_iterable(one.side_rows))]


def _one_query(words: Iterator[int], texts: Texts) -> SequenceQuery:
    batch_slot, keep = next(words), next(words)
    tokens, flat = texts.unfold(batch_slot, words), _items(words)
    side_rows: list[SideRow] = list(zip(flat[::2], flat[1::2], strict=True))
    return SequenceQuery(batch_slot, tokens, keep, tuple(side_rows))


def _sequence(items: Iterable[int]) -> list[int]:
    listed = list(items)
    return [len(listed), *listed]


def _items(words: Iterator[int]) -> tuple[int, ...]:
    return tuple(next(words) for _ in range(next(words)))
