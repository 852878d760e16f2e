"""The rows of one forward below a prefix: new rows of its text, new rows of paths, and the slots after each path.

    rows of the text    see the text up to themselves
    rows of paths       see the text, the way to themselves, and themselves
    slots of a path     see the text, the path, and themselves up to each row (`pearl.drafters.feature.mask`)

Paths of one trie begin alike, and those of the next forward go on where those of the last one ended. So a row of a path
is read once for all paths that it is on, and kept until the text grows; then features have come for some of them.

Knows: which rows are there, what each reads, and what it sees. Refuses to know: tries, sampling, and which paths are
worth a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pearl.core.trie import shared_prefix
from pearl.drafters.feature.forward_rows import FeatureCache, FeatureSequence
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.one_pass import PathsQuery
from pearl.machine.transfers import sent


@dataclass
class PathRows:
    """Rows that have been read below a prefix, by number: 0 is the prefix's last row, the others are those of paths."""

    ways: list[tuple[int, ...]] = field(default_factory=lambda: [()])  # by number: the rows of its path, itself last
    hidden: Tensor | None = None  # [numbers, H], of those that a forward has read
    _after: dict[tuple[int, int], int] = field(default_factory=dict)  # by a row and the token after it

    def grow(self, path: Sequence[int]) -> tuple[list[int], list[int]]:
        """The numbers of the prefix's last row and of each row of a path, and the tokens of those that are new."""
        numbers, new = [0], []
        for token in path:
            number = self._after.get((numbers[-1], token))
            if number is None:
                number = self._after[numbers[-1], token] = len(self.ways)
                self.ways.append((*self.ways[numbers[-1]], number))
                new.append(token)
            numbers.append(number)
        return numbers, new

    def said(self, hidden: Tensor) -> Tensor:
        """Takes over the hidden states of its new rows, [.., H], slots behind them. Returns those of all its rows, and
        the slots."""
        whole = hidden if self.hidden is None else torch.cat([self.hidden, hidden])
        self.hidden = whole[: len(self.ways)].clone()  # not a view of all rows of a forward
        return whole


@dataclass
class PathsSequence(FeatureSequence):
    """What is known of one sequence. Its cache holds the prefix that was read last, then the rows of `paths`."""

    cache: FeatureCache
    paths: PathRows = field(default_factory=PathRows)

    def forget(self) -> None:
        """All is to be read again, as after a forward that failed."""
        self.read, self.paths = [], PathRows()

    def forget_last(self, count: int) -> None:
        """The last tokens of what is in the cache are to be read again."""
        self.read = self.read[: max(0, len(self.read) - count)]


@dataclass(frozen=True)
class QueryRows:
    """The rows of one sequence in a forward."""

    inputs: Tensor  # [R, W]
    positions: list[int]  # of the R rows
    keys: list[int]  # positions of what is in the cache
    mask: Tensor  # bool [R, keys + R]
    lasting: int  # rows that are kept, the first ones
    skipped: int  # of these, how many come before the first with a number
    wanted: list[int]  # whose guesses: rows by number, and behind them slots

    @property
    def kept(self) -> int:
        return len(self.keys)


class RowReader:
    """Lays out the rows of a network whose parts are all there."""

    def __init__(self, drafter: FeatureDrafter):
        self._drafter = drafter
        unknown = drafter.unknown()
        assert unknown is not None, "a network that drafts several tokens in one forward"
        self._unknown = unknown  # [H]
        self._slots = drafter.slots(1, drafter.shape.depths - 1)[0]  # [K - 1, W]

    def rows(self, query: PathsQuery) -> QueryRows:
        """Those of a query; the rows of paths that they begin have their numbers from here on."""
        state, prefix = query.state, query.prefix
        before, slots = self._drafter.shape.first_row, len(self._slots)
        kept = shared_prefix(state.read, prefix)
        if state.paths.hidden is None or not kept == len(state.read) == len(prefix):
            kept = min(kept, len(prefix) - 1)
            state.read, state.paths = list(prefix), PathRows()
        paths: PathRows = state.paths
        fresh, known = len(prefix) - max(kept, before), len(paths.ways)
        numbers, tokens = [], []
        for path in query.paths:
            on, new = paths.grow(path)
            numbers.append(on)
            tokens += new
        wanted, behind = [], len(paths.ways)
        for on in numbers:
            wanted += on if query.way else on[-1:]
            wanted += range(behind, behind + slots)
            behind += slots
        at = [len(prefix) - 1 + len(way) for way in paths.ways]  # positions by number
        return QueryRows(
            inputs=torch.cat([*self._known(query, kept), *self._ahead(tokens), *[self._slots] * len(numbers)]),
            positions=[
                *range(max(kept, before), len(prefix)),
                *at[known:],
                *(at[on[-1]] + depth for on in numbers for depth in range(1, slots + 1)),
            ],
            keys=[*range(before, max(kept, before)), *at[1:known]],
            mask=rows_mask(len(prefix) - before, fresh, paths.ways, known, [on[-1] for on in numbers], slots),
            lasting=fresh + len(tokens),
            skipped=max(0, fresh - 1),
            wanted=wanted,
        )

    def _known(self, query: PathsQuery, kept: int) -> list[Tensor]:
        """The prefix's rows from `kept` on, with features, [R, W]."""
        drafter, prefix = self._drafter, query.prefix
        first = max(kept, drafter.shape.first_row)
        if first == len(prefix):
            return []
        tokens = sent(torch.tensor(prefix[first:]), drafter.device)
        if drafter.shape.features and first:
            features = query.state.between(first - 1, len(prefix) - 1, drafter.device)
            return [drafter.rows(tokens, drafter.fused(features))]
        # the first token of a text, which has none
        features = torch.zeros(len(tokens), drafter.shape.feature_row, dtype=torch.bfloat16, device=drafter.device)
        withheld = torch.arange(len(tokens)) == 0
        if drafter.shape.features and len(prefix) > 1:
            features[1:] = query.state.between(0, len(prefix) - 1, drafter.device)
        return [drafter.known(tokens[None], features[None], sent(withheld[None], drafter.device))[0]]

    def _ahead(self, tokens: Sequence[int]) -> list[Tensor]:
        """Rows of tokens whose features are not there, [R, W]."""
        if not tokens:
            return []
        there = sent(torch.tensor(tokens), self._drafter.device)
        return [self._drafter.rows(there, self._unknown.expand(len(tokens), -1))]


def rows_mask(
    prefix: int, fresh: int, ways: Sequence[Sequence[int]], known: int, ends: Sequence[int], slots: int
) -> Tensor:
    """Who sees whom, bool [rows, kept + rows]. Columns: the prefix's, those of paths by number, and each end's slots.

    prefix: its rows, of which the last `fresh` are new; ways: the paths' rows on the way to each number, itself last;
    known: numbers that are kept, without those of new rows; ends: the number after which each group of slots stands."""
    kept = prefix - fresh if fresh else prefix + known - 1
    first = prefix + len(ways) - 1  # column of the first slot
    columns = first + len(ends) * slots
    mask = torch.zeros(columns - kept, columns, dtype=torch.bool)
    mask[:fresh, :prefix] = torch.ones(fresh, prefix, dtype=torch.bool).tril(prefix - fresh)
    mask[fresh:, :prefix] = True
    own = torch.ones(slots, slots, dtype=torch.bool).tril()
    row = fresh
    for way in ways[known:]:
        mask[row, [prefix - 1 + number for number in way]] = True
        row += 1
    for group, end in enumerate(ends):
        of = slice(row, row + slots)
        if ways[end]:
            mask[of, [prefix - 1 + number for number in ways[end]]] = True
        mask[of, first + group * slots : first + (group + 1) * slots] = own
        row += slots
    return mask
