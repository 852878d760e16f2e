"""What the first rank of a tensor-parallel target tells the others: the calls of its model, as small whole numbers.

Every rank holds a `VerifierModel` over its shard of the weights. It is a function of the calls that were made of it:
which rows a forward has, where they lie in the cache and what moves there follows from them. So a command is all that a
rank must be told, and it is a few dozen numbers: of a sequence only what is new since the command before. Rank 0 alone
knows why a call is made; nobody else decides anything.

A command is a list of words: its kind, then its fields in their order, each as its type says (`_CODECS`). A tuple is
written as its length and its items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, get_type_hints

from pearl.core.token_buckets import LIMIT, BatchedTokenBuckets, TokenBuckets
from pearl.core.trie import shared_prefix
from pearl.models.language_model import SideRow
from pearl.models.verifier import SequenceQuery, SharedForwardTrial, VerifierModel

Ints = tuple[int, ...]
Queries = tuple[SequenceQuery, ...]


class SlotTokens(NamedTuple):
    """Tokens of the sequence in a batch slot."""

    batch_slot: int
    tokens: Ints


class TokenDeltas:
    """What both sides know of each batch slot: the tokens of the last command that named it."""

    def __init__(self) -> None:
        self._last: dict[int, Ints] = {}

    def encode(self, batch_slot: int, tokens: Iterable[int]) -> list[int]:
        """`tokens` as words: how many of the last ones stay, and what follows them."""
        tokens = tuple(tokens)
        kept = shared_prefix(self._last.get(batch_slot, ()), tokens)
        self._last[batch_slot] = tokens
        return [kept, *_ints(tokens[kept:])]

    def decode(self, batch_slot: int, words: Iterator[int]) -> Ints:
        tokens = self._last.get(batch_slot, ())[: next(words)] + _read_ints(words)
        self._last[batch_slot] = tokens
        return tokens


class Command:
    """One call; its place in `_KINDS` is its first word."""

    def words(self, deltas: TokenDeltas) -> list[int]:
        fields = [_CODECS[kind][0](getattr(self, name), deltas) for name, kind in get_type_hints(type(self)).items()]
        return [_KINDS.index(type(self)), *chain.from_iterable(fields)]

    def run(self, shard: VerifierModel) -> object:
        """Makes the call."""
        return None


def decode(words: Sequence[int], deltas: TokenDeltas) -> Command:
    """The command that these words are. `deltas` is what was known of the sequences before it, on both sides."""
    rest = iter(words)
    kind = _KINDS[next(rest)]
    command = kind(*[_CODECS[field][1](rest, deltas) for field in get_type_hints(kind).values()])
    assert next(rest, None) is None, "a command is all of its words"
    return command


@dataclass(frozen=True)
class ReadSequence(Command):
    query: SequenceQuery

    def run(self, shard: VerifierModel) -> object:
        one = self.query
        return shard.read(one.tokens, one.keep, one.side_rows, one.batch_slot)


@dataclass(frozen=True)
class ReadTogether(Command):
    queries: Queries

    def run(self, shard: VerifierModel) -> object:
        return shard.read_together(self.queries)


@dataclass(frozen=True)
class Forward(Command):
    tokens: Ints
    first: int
    keep: int

    def run(self, shard: VerifierModel) -> object:
        return shard.forward(list(self.tokens), self.first, self.keep)


@dataclass(frozen=True)
class Forget(Command):
    kept: SlotTokens

    def run(self, shard: VerifierModel) -> object:
        return shard.forget(self.kept.tokens, self.kept.batch_slot)


@dataclass(frozen=True)
class Restore(Command):
    text: SlotTokens

    def run(self, shard: VerifierModel) -> object:
        return shard.restore(self.text.tokens, self.text.batch_slot)


@dataclass(frozen=True)
class KeepPrefixes(Command):
    """All ranks keep and drop the same pieces, as their parts are equally large."""

    mb: int

    def run(self, shard: VerifierModel) -> object:
        shard.keep_prefixes(self.mb)
        return None


@dataclass(frozen=True)
class BeginRound(Command):
    forget: bool

    def run(self, shard: VerifierModel) -> object:
        shard.begin_round(self.forget)
        return None


@dataclass(frozen=True)
class SetBuckets(Command):
    """`buckets` and `batched_buckets` are these from now on. What a row count costs is the first rank's business."""

    safe: Ints
    pad_to: Ints
    branches: bool
    batched: Ints  # empty: no forwards that several sequences share

    def run(self, shard: VerifierModel) -> object:
        shard.buckets = TokenBuckets(self.safe, (0.0,) * LIMIT, branches=self.branches, pad_to=self.pad_to)
        shard.batched_buckets = BatchedTokenBuckets(self.batched, (0.0,) * len(self.batched)) if self.batched else None
        return None


@dataclass(frozen=True)
class CopyFirst(Command):
    tokens: int

    def run(self, shard: VerifierModel) -> object:
        return SharedForwardTrial(shard).copy_first(self.tokens)


@dataclass(frozen=True)
class ReadTrial(Command):
    tokens: Ints
    first: int
    lengths: Ints
    count: int

    def run(self, shard: VerifierModel) -> object:
        return SharedForwardTrial(shard).read(self.tokens, self.first, self.lengths, self.count)


@dataclass(frozen=True)
class KeepAlive(Command):
    """Nothing to do; the first rank is alive."""


@dataclass(frozen=True)
class Shutdown(Command):
    """The run is over."""


_KINDS: list[type[Command]] = Command.__subclasses__()  # in the order in which they stand here


def _ints(items: Sequence[int]) -> list[int]:
    return [len(items), *items]


def _read_ints(words: Iterator[int]) -> Ints:
    return tuple(next(words) for _ in range(next(words)))


def _query(one: SequenceQuery, deltas: TokenDeltas) -> list[int]:
    tokens = deltas.encode(one.batch_slot, one.tokens)
    return [one.batch_slot, one.keep, *tokens, *_ints(list(chain.from_iterable(one.side_rows)))]


def _read_query(words: Iterator[int], deltas: TokenDeltas) -> SequenceQuery:
    batch_slot, keep = next(words), next(words)
    tokens, flat = deltas.decode(batch_slot, words), _read_ints(words)
    side_rows: list[SideRow] = list(zip(flat[::2], flat[1::2], strict=True))
    return SequenceQuery(batch_slot, tokens, keep, tuple(side_rows))


def _read_slot_tokens(words: Iterator[int], deltas: TokenDeltas) -> SlotTokens:
    batch_slot = next(words)
    return SlotTokens(batch_slot, deltas.decode(batch_slot, words))


_Codec = tuple[Callable[[Any, TokenDeltas], list[int]], Callable[[Iterator[int], TokenDeltas], Any]]
_CODECS: dict[Any, _Codec] = {  # words of a field, and the field of words, by its type
    int: (lambda one, _: [one], lambda words, _: next(words)),
    bool: (lambda one, _: [int(one)], lambda words, _: bool(next(words))),
    Ints: (lambda items, _: _ints(items), lambda words, _: _read_ints(words)),
    SlotTokens: (lambda one, deltas: [one.batch_slot, *deltas.encode(*one)], _read_slot_tokens),
    SequenceQuery: (_query, _read_query),
    Queries: (
        lambda queries, deltas: [len(queries), *chain.from_iterable(_query(one, deltas) for one in queries)],
        lambda words, deltas: tuple(_read_query(words, deltas) for _ in range(next(words))),
    ),
}
