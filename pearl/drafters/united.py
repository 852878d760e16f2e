"""Several sources as one: all of them grow a tree, and a chain is the first one's that has something to say.

Each node keeps the origin of its source. A source that raises is left out of that text; only where a text has none left
does the whole raise, and where memory runs out, as a forward over fewer texts may do. The order is the user's: what
answers at once is best named first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.drafters.draft_source import (
    COUNTERS,
    Chain,
    ChainQuery,
    DraftSource,
    Grown,
    TreeQuery,
    as_guesses,
    grow_chain,
)
from pearl.machine.logs import FailureLog

_log = logging.getLogger(__name__)
Query = TypeVar("Query", ChainQuery, TreeQuery)
Answer = TypeVar("Answer")


class UnitedSource(DraftSource):
    """At most one of its sources reads hidden states."""

    def __init__(self, sources: Sequence[DraftSource]):
        assert len(sources) > 1, "several"
        self.sources = tuple(sources)
        self.origin = self.sources[0].origin
        self.grows_trees = any(one.grows_trees for one in sources)
        self.makes_trees_alone = any(one.makes_trees_alone for one in sources)
        readers = [one for one in sources if one.layers]
        assert len(readers) <= 1, "hidden states come for one source"
        self.layers, self.device = (readers[0].layers, readers[0].device) if readers else ((), None)
        self.costs = next((one.costs for one in sources if one.costs), ())
        self._failed: dict[int, set[DraftSource]] = {}  # by batch slot
        self._failures = FailureLog(_log)

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._failed[batch_slot] = set()
        self._each([batch_slot], lambda one: one.begin(batch_slot, params, continues))

    def end(self, batch_slot: int) -> None:
        self._each([batch_slot], lambda one: one.end(batch_slot))

    def observe(self, features: Features, batch_slot: int) -> None:
        for one in self.sources:
            if one.layers:
                self._ask(one, [batch_slot], lambda one=one: one.observe(features, batch_slot))  # type: ignore[misc]

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        return self.propose_batch([ChainQuery(0, tokens, (), room)])[0]

    def propose_batch(self, queries: Sequence[ChainQuery]) -> list[Chain]:
        found: dict[int, Chain] = {}  # by batch slot

        def propose(one: DraftSource) -> None:
            open_ = [query for query in self._live(one, queries) if not found.get(query.batch_slot)]
            chains = one.propose_batch(open_) if open_ else []
            for query, chain in zip(open_, chains, strict=True):
                found[query.batch_slot] = as_guesses(chain, one.origin)

        self._each([query.batch_slot for query in queries], propose)
        return [found.get(query.batch_slot, []) for query in queries]

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        grown: dict[int, Grown] = {query.batch_slot: [] for query in queries}

        def extend(one: DraftSource) -> None:
            mine = self._live(one, queries)
            if not one.grows_trees:  # below a root where it has spoken, or another has, it is not asked
                mine = [query for query in mine if not query.trie.root.children]
            if not mine:
                return
            if one.grows_trees:
                made = one.extend(mine)
            else:
                asked = [query.chain() for query in mine]
                made = [grow_chain(*pair, one.origin) for pair in zip(mine, one.propose_batch(asked), strict=True)]
            for query, new in zip(mine, made, strict=True):
                grown[query.batch_slot] += new

        self._each([query.batch_slot for query in queries], extend)
        return [grown[query.batch_slot] for query in queries]

    def _live(self, one: DraftSource, queries: Sequence[Query]) -> list[Query]:
        return [query for query in queries if one not in self._failed[query.batch_slot]]

    def _each(self, slots: Sequence[int], work: Callable[[DraftSource], object]) -> None:
        for one in self.sources:
            self._ask(one, slots, lambda one=one: work(one))  # type: ignore[misc]
        for name in COUNTERS:
            setattr(self, name, sum(getattr(one, name) for one in self.sources))

    def _ask(self, one: DraftSource, slots: Sequence[int], work: Callable[[], object]) -> None:
        """Raises what `work` does where no other source is left."""
        try:
            work()
        except torch.OutOfMemoryError:
            raise  # a forward over fewer sequences may do
        except Exception:
            for slot in slots:
                self._failed[slot].add(one)
            if any(len(self._failed[slot]) == len(self.sources) for slot in slots):
                raise
            self._failures.tell("one of several draft sources failed; the others go on.")
