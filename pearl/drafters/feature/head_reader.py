"""Reads texts with EAGLE-3: a row for every token, in which the features of the position before stand beside it.

    the prefix         tokens whose rows have features: read once, in the cache
    below it          the network goes on from its own hidden state: a row a token, each after its parent's

What is below the prefix is a tree of *drafted rows*, each with its hidden state and its keys and values. When features
come, the prefix grows over rows that were drafted: these are read anew, with features, and what hangs below them stays
as it was drafted. Both are a memo: emptied, the next forwards are more, and nothing else.

Knows: caches, trees of rows, and forwards over several sequences. Refuses to know: tries, sampling, which leaf pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pearl.core.messages import Features
from pearl.core.params import SamplingParams
from pearl.core.trie import shared_prefix
from pearl.drafters.feature.forward_rows import FeatureCache, FeatureSequence, block_masks, concatenated, layer_masks
from pearl.drafters.feature.network import FeatureDrafter
from pearl.machine.transfers import sent
from pearl.models.draft_model import LeavesQuery
from pearl.models.kv_cache.slot_cache import KeyValue
from pearl.models.reduced_head import scatter_vocabulary
from pearl.models.static_shapes.network import NetworkForward

_CHUNK = 512  # rows of the prefix that one forward reads at most
_MOST = 2048  # drafted rows of a sequence, beyond which all are forgotten


@dataclass(eq=False)
class DraftedRow:
    """A token below the prefix, or the prefix's last one."""

    token: int
    hidden: Tensor | None = None  # [H]; None: it is yet to be read
    seen: tuple[int, ...] = ()  # drafted rows that it sees: those above it and its own, by their place in the cache
    children: dict[int, DraftedRow] = field(default_factory=dict)

    def below(self) -> Iterator[DraftedRow]:
        """All rows below it, parents first; a chain may be longer than Python's stack is deep."""
        coming = [*reversed(self.children.values())]
        while coming:
            yield (row := coming.pop())
            coming += reversed(row.children.values())


@dataclass
class HeadSequence(FeatureSequence):
    """What is known of one sequence."""

    root: DraftedRow = field(default_factory=lambda: DraftedRow(-1))
    drafted: list[KeyValue] = field(default_factory=list)  # keys and values of the drafted rows, of each layer
    count: int = 0  # of drafted rows

    def forget_drafted(self) -> None:
        self.root, self.drafted, self.count = DraftedRow(-1), [], 0

    def past(self, kept: int) -> list[KeyValue]:
        """Of the first `kept` rows of the prefix, and of all drafted ones."""
        prefix = self.cache.upto(kept)
        if not self.drafted:
            return prefix
        return [
            (torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))
            for (k, v), (more_k, more_v) in zip(prefix, self.drafted, strict=True)
        ]

    def places(self, first: int, kept: int, last: int) -> list[int]:
        """The positions that `past` is of; `first`: of the prefix's first row, `last`: of its end."""
        drafted = [0] * self.count
        for row in self.root.below():
            drafted[row.seen[-1]] = last + len(row.seen)
        return [*range(first, kept), *drafted]

    def follow(self, prefix: Sequence[int]) -> int:
        """Moves the tree to where the prefix ends now. Returns how many of its positions need not be read."""
        shared = shared_prefix(self.read, prefix)
        if shared < len(self.read):
            self.forget_drafted()
        for token in prefix[shared:]:
            self.root = self.root.children.get(token) or DraftedRow(token)
        if shared < len(prefix):
            self.root.hidden, self.root.seen = None, ()  # its row is of the prefix now
            self._compact()
        elif self.root.hidden is None:
            shared -= 1
        return shared

    def _compact(self) -> None:
        """Only what hangs below the root stays in the cache."""
        if not self.root.children:
            root = self.root.token
            self.forget_drafted()
            self.root.token = root
            return
        rows = list(self.root.below())
        places = [row.seen[-1] for row in rows]
        new = {place: number for number, place in enumerate(places)}
        for row in rows:
            row.seen = tuple(new[place] for place in row.seen if place in new)
        kept = sent(torch.tensor(places), self.drafted[0][0].device)
        self.drafted = [(k.index_select(2, kept), v.index_select(2, kept)) for k, v in self.drafted]
        self.count = len(rows)


@dataclass
class _Part:
    """The rows of one sequence in a forward: of the prefix from `kept` up to `end`, and drafted ones."""

    state: HeadSequence
    prefix: Sequence[int]
    kept: int
    end: int
    new: list[tuple[DraftedRow, DraftedRow, int]] = field(default_factory=list)  # parent, row, position

    def mask(self, before: int) -> Tensor:
        """Who sees whom, bool [rows, kept + drafted + rows]. `before`: positions that have no row."""
        fresh, kept, drafted = self.end - self.kept, self.kept - before, self.state.count
        rows = fresh + len(self.new)
        mask = torch.zeros(rows, kept + drafted + rows, dtype=torch.bool)
        mask[:, :kept] = True
        mask[:fresh, kept + drafted : kept + drafted + fresh] = torch.ones(fresh, fresh, dtype=torch.bool).tril()
        mask[fresh:, kept + drafted : kept + drafted + fresh] = True
        for number, (parent, _, _) in enumerate(self.new, fresh):
            mask[number, [kept + place for place in parent.seen]] = True
            mask[number, kept + drafted + number] = True
        return mask


class HeadReader:
    """An autoregressive network with its target attached, as a `LeafReader`: logits are over the target's tokens."""

    overtaken: Callable[[], bool] | None = None  # never asked: one layer is soon over

    def __init__(self, drafter: FeatureDrafter, max_length: int, max_sequences: int = 1):
        self.drafter, self.max_length, self.max_sequences = drafter.eval(), max_length, max_sequences
        self.forward = NetworkForward(drafter.read, drafter.device)
        self._sequences: dict[int, HeadSequence] = {}
        shape = drafter.shape
        self._size = max(shape.known, int(drafter.vocabulary.max()) + 1)
        self._whole = torch.equal(drafter.vocabulary.cpu(), torch.arange(self._size))  # each draft token has its own id

    def begin(self, batch_slot: int, continues: bool) -> None:
        """The target tells the features of the whole prompt in any case."""
        old = self._sequences.get(batch_slot)
        cache = old.cache if old else FeatureCache(self.drafter)
        read = old.read if old and continues else []
        self._sequences[batch_slot] = HeadSequence(SamplingParams(), cache=cache, read=read)

    def forget(self, *, batch_slot: int) -> None:
        self.begin(batch_slot, continues=False)

    def end(self, *, batch_slot: int) -> None:
        """What was drafted for a text that is over goes nowhere."""
        if batch_slot in self._sequences:
            self.forget_drafted(batch_slot)

    def forget_drafted(self, batch_slot: int) -> None:
        """What is below the prefix is to be read again."""
        state = self._sequences[batch_slot]
        hidden = state.root.hidden
        state.forget_drafted()
        state.root.hidden = hidden

    def observe(self, features: Features, batch_slot: int) -> None:
        self._sequences[batch_slot].features.append(features)
        self._sequences[batch_slot].known += len(features)

    def unread(self, batch_slot: int) -> int:
        """Rows with features that are yet to be read."""
        state = self._sequences[batch_slot]
        return max(0, state.known + 1 - len(state.read))

    def ready(self, batch_slot: int) -> bool:
        """Whether there is a row to draft from."""
        return self._sequences[batch_slot].known >= self.drafter.shape.first_row

    def read(self, tokens: Sequence[int], keep: int) -> Tensor:
        """As `LeafReader` says, of the last token alone."""
        assert keep == 1, "the logits of other rows are gone"
        return self.read_leaves_together([LeavesQuery(0, tokens, [()])])[0]

    @torch.inference_mode()
    def read_leaves_together(self, queries: Sequence[LeavesQuery]) -> list[Tensor]:
        """A forward for all that can be read at once: usually one, as what is above a leaf has been read."""
        asked = [self._asked(query) for query in queries]
        try:
            while parts := [part for part, paths in asked if self._next(part, paths)]:
                self._forward(parts)
        except BaseException:
            for part, _ in asked:
                part.state.forget_drafted()  # its root has moved to where nothing was read
            raise
        hidden = [_row_at(part.state.root, path).hidden for part, paths in asked for path in paths]
        logits = self.drafter.logits(torch.stack(hidden)).float()  # type: ignore[arg-type]
        return list(self._of_target(logits).split([len(query.paths) for query in queries]))

    def _asked(self, query: LeavesQuery) -> tuple[_Part, list[tuple[int, ...]]]:
        """What is read already of a query, and its paths from the end of the prefix."""
        state = self._sequences[query.batch_slot]
        tokens = query.tokens
        prefix = list(tokens[: state.known + 1])
        if state.count > _MOST:
            self.forget_drafted(query.batch_slot)
        kept = max(state.follow(prefix), self.drafter.shape.first_row)
        beyond = tuple(tokens[len(prefix) :])
        return _Part(state, prefix, kept, kept), [(*beyond, *path) for path in query.paths]

    def _next(self, part: _Part, paths: Sequence[tuple[int, ...]]) -> bool:
        """Chooses the rows that can be read now. False: all are."""
        part.kept, part.end, part.new = part.end, min(len(part.prefix), part.end + _CHUNK), []
        if part.end < len(part.prefix):
            return True
        taken: dict[tuple[DraftedRow, int], DraftedRow] = {}
        for path in paths:
            row, position = part.state.root, len(part.prefix) - 1
            for token in path:
                position += 1
                child = row.children.get(token)
                if child is None:
                    if row.hidden is not None and (row, token) not in taken:
                        child = taken[row, token] = DraftedRow(token)
                        part.new.append((row, child, position))
                    break
                row = child
        return part.end > part.kept or bool(part.new)

    def _forward(self, parts: Sequence[_Part]) -> None:
        before = self.drafter.shape.first_row
        rows, positions = [], []
        for part in parts:
            rows.append(self._rows(part))
            positions += [*range(part.kept, part.end), *(position for _, _, position in part.new)]
        masks = [part.mask(before) for part in parts]
        pasts = [part.state.past(part.kept - before) for part in parts]
        mask, windows = block_masks(masks, [past[0][0].shape[2] for past in pasts]), self.drafter.shape.windows
        keys: list[int] = []
        for part in parts if windows else ():
            keys += part.state.places(before, part.kept, len(part.prefix) - 1)
        masks = layer_masks(mask, windows, positions, keys)
        hidden, *new = self.forward([positions], torch.cat(rows), masks, concatenated(pasts))
        made, first = list(zip(new[::2], new[1::2], strict=True)), 0
        for part, own in zip(parts, rows, strict=True):
            self._keep(part, hidden, made, first)
            first += len(own)

    def _rows(self, part: _Part) -> Tensor:
        """[rows, W]"""
        drafter, device = self.drafter, self.drafter.device
        found = []
        if part.end > part.kept:
            tokens = sent(torch.tensor(part.prefix[part.kept : part.end]), device)
            features = part.state.between(part.kept - 1, part.end - 1, device)
            found.append(drafter.rows(tokens, drafter.fused(features)))
        if part.new:
            tokens = sent(torch.tensor([row.token for _, row, _ in part.new]), device)
            states = torch.stack([parent.hidden for parent, _, _ in part.new])  # type: ignore[misc]
            found.append(drafter.rows(tokens, drafter.carried(states)))
        return torch.cat(found)

    def _keep(self, part: _Part, hidden: Tensor, made: Sequence[KeyValue], first: int) -> None:
        """Takes over what a forward has made of a sequence's rows, the first of which is row `first`."""
        state, fresh = part.state, part.end - part.kept
        last = first + fresh
        if fresh:
            state.cache.keep(made, part.kept - self.drafter.shape.first_row, slice(first, last))
            state.read = list(part.prefix[: part.end])
            if part.end == len(part.prefix):
                state.root.hidden = hidden[last - 1]
        if not part.new:
            return
        new = [(k[:, :, last : last + len(part.new)], v[:, :, last : last + len(part.new)]) for k, v in made]
        state.drafted = concatenated([state.drafted, new]) if state.drafted else new
        for number, (parent, row, _) in enumerate(part.new):
            row.hidden, row.seen = hidden[last + number], (*parent.seen, state.count + number)
            parent.children[row.token] = row
        state.count += len(part.new)

    def _of_target(self, logits: Tensor) -> Tensor:
        """logits: [R, D] over the draft vocabulary; [R, V] over the target's."""
        if self._whole:
            return logits
        return scatter_vocabulary(logits, self.drafter.vocabulary, self._size)


def _row_at(root: DraftedRow, path: Sequence[int]) -> DraftedRow:
    for token in path:
        root = root.children[token]
    return root
