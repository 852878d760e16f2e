"""A network over hidden states that drafts in parallel: one forward gives the distributions of the next K tokens.

What the target has read comes with its verdicts, as features. Known positions whose features are there are read once
and stay in the cache; tokens beyond them are guesses or too new, so they enter with what was learned for that instead,
and are read anew once the text has grown (`pearl.drafters.feature.path_rows`).

Bits are of no account here: whatever is drafted, the target decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.feature.forward_rows import FeatureCache, block_masks, concatenated, layer_masks
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.parallel_source import ParallelSource
from pearl.drafters.feature.path_rows import PathsSequence, RowReader
from pearl.drafters.guesses import Guesses
from pearl.drafters.one_pass import Leaf, PathsQuery
from pearl.machine.transfers import select_rows
from pearl.models import timing

_NEW = 3  # tokens that a pass commits, for what a forward takes


class FeatureSource(ParallelSource):
    """Chains and trees of P-EAGLE, or of the feature drafter that pearl trained before it."""

    _drafter: FeatureDrafter

    def __init__(self, drafter: FeatureDrafter, top_k: int = 0, longest: int = 1 << 20):
        """`top_k`, `longest`: see `OnePassSource`."""
        with torch.inference_mode():
            self._reader = RowReader(drafter)
        super().__init__(drafter, top_k, longest)

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        """The target tells the features of the whole prompt in any case."""
        old = self._sequences.get(batch_slot) or PathsSequence(params, FeatureCache(self._drafter))
        self._sequences[batch_slot] = PathsSequence(params, old.cache, old.read if continues else [])

    def _leaves(self, query: TreeQuery) -> list[Leaf]:
        return self._and_root(query, super()._leaves(query))

    @torch.inference_mode()
    def read_on(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        """One forward. For each path of each sequence: what follows each node on its way, the prefix's last token
        first, and guesses of K depths after its end."""
        if not queries:
            return []
        try:
            return self._read(queries)
        except Exception:  # of some rows nobody knows whether they are there
            for one in queries:
                one.state.forget()
            raise

    def _read(self, queries: Sequence[PathsQuery]) -> list[list[tuple[Guesses, Guesses]]]:
        blocks = [self._reader.rows(one) for one in queries]
        past = [one.state.cache.upto(block.kept) for one, block in zip(queries, blocks, strict=True)]
        positions = [position for block in blocks for position in block.positions]
        keys = [position for block in blocks for position in block.keys]
        mask = block_masks([block.mask for block in blocks], [block.kept for block in blocks])
        masks = layer_masks(mask, self._drafter.shape.windows, positions, keys)
        rows = torch.cat([block.inputs for block in blocks])
        hidden, *new = self.forward([positions], rows, masks, concatenated(past))
        made = list(zip(new[::2], new[1::2], strict=True))
        states: list[Tensor] = []
        which, asked, first = [], 0, 0  # `asked`: rows of logits
        for one, block in zip(queries, blocks, strict=True):
            one.state.cache.keep(made, block.kept, slice(first, first + block.lasting))
            said = one.state.paths.said(hidden[first + block.skipped : first + len(block.positions)])
            distinct = list(dict.fromkeys(block.wanted))  # paths share rows
            place = {row: at for at, row in enumerate(distinct, asked)}
            which += [place[row] for row in block.wanted]
            states.append(select_rows(said, distinct))
            first, asked = first + len(block.positions), asked + len(distinct)
        self.forwards += 1
        self.rows += first
        of_rows = torch.cat(states)
        logits = self._drafter.logits(of_rows).float()
        if len(which) > asked:
            logits, of_rows = select_rows(logits, which), select_rows(of_rows, which)
        return self.tables(queries, logits, of_rows)

    @property
    def _looks_back(self) -> bool:
        return self._drafter.shape.markov_rank > 0

    def _said_of(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        bias, sure = self._drafter.after(tokens, hidden)
        return bias, torch.nn.functional.logsigmoid(sure.float())

    def _timed(self, count: int) -> PathsQuery:
        return PathsQuery(self._sequences[0], [0] * timing.TIMED[0], [[token] for token in range(count)], way=False)

    def _read_timed(self, query: PathsQuery) -> None:
        """As after a pass: some tokens are new."""
        query.state.forget_last(_NEW)
        self.read_on([query])

    def probe(self, seed: int) -> None:
        """Some forwards over a text of that number."""
        generator, (length, _) = torch.Generator().manual_seed(seed), timing.TIMED
        text = torch.randint(self._drafter.shape.known or 2, (length + 2,), generator=generator).tolist()
        self.begin(0, SamplingParams())
        if self.layers:
            features = torch.randn(length + 1, self._drafter.shape.feature_row, generator=generator)
            self.observe(features.to(torch.bfloat16).view(torch.int16).numpy())
        for more in range(3):
            for leaves in range(1, self.max_leaves + 1):
                paths = [[token] * (1 + more) for token in range(leaves)]
                self._read_timed(PathsQuery(self._sequences[0], text[: length + more], paths))
        self.begin(0, SamplingParams())
