"""The drafter's side of a model: what follows a sequence, or paths of guesses after it, of one or of several.

Whatever is drafted, the target decides. So here bits are of no account: nodes lie in the cache where there is room, and
no row is added to a forward.

Letters: V tokens of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pearl.core.token_buckets import LIMIT, PREFILL_CHUNK, SLOT_MULTIPLE
from pearl.machine.transfers import select_rows
from pearl.models.hidden_states import find_decoder_layers
from pearl.models.kv_cache.draft_tree_cache import DraftTreeCache, ForwardChunk
from pearl.models.kv_cache.prefix_cache import EMPTY, Piece, digest
from pearl.models.kv_cache.transformers_interface import uses_cache_attention
from pearl.models.language_model import LanguageModel, SequenceRows, SideRow
from pearl.models.reduced_head import ReducedVocabHead
from pearl.models.static_shapes.one_text import COUNTS, DRAFT_COUNTS, ForwardRows

_ROWS = (*DRAFT_COUNTS, *range(80, 1 << 10, 16))  # of a forward that several sequences share, where shapes are static
DRAFT_PREFILL_CHUNK = 4 * SLOT_MULTIPLE  # rows of one forward over a prompt at most


class Overtaken(Exception):
    """A forward was given up between two layers, as nobody wants any more what it would have said."""


@dataclass(frozen=True)
class LeavesQuery:
    """What is asked of one sequence in a forward that several have together; see `DraftModel.read_leaves`."""

    batch_slot: int
    tokens: Sequence[int]
    paths: Sequence[tuple[int, ...]]
    passing: int = -1  # a token whose rows below the text are given back after the forward; -1: none is


class DraftModel(LanguageModel):
    """A model that drafts. `read` continues chains, `read_leaves` trees.

    `overtaken`: set while one sequence is read, it tells whether nobody wants the answer any more. It is asked before
    each layer and the head of a forward that has but some guesses to read and runs as code on a CPU; then that forward
    raises `Overtaken`. What was read before it is known as it was. A long prompt is read to its end.
    """

    overtaken: Callable[[], bool] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: int,
        max_length: int,
        head: ReducedVocabHead | None = None,
        max_sequences: int = 1,
        coarse: bool = False,
    ):
        super().__init__(model, vocabulary, max_length, max_sequences, coarse, head=head)
        self._asked: Callable[[], bool] | None = None  # by the layers of the forward under way
        self._asks = False  # they have been told to

    @property
    def draftable(self) -> set[int] | None:
        """Tokens that it can guess before they have come; None: all."""
        return self._head.draftable if self._head else None

    def end(self, *, batch_slot: int) -> None:
        """The text in a batch slot is over; it may go on."""
        if self._head:
            self._head.end(batch_slot)

    def read_leaves(self, tokens: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits [len(paths), V] of what follows `tokens` and each of `paths`, which may share their beginnings."""
        return self.read_leaves_together([LeavesQuery(0, tokens, paths)])[0]

    @torch.inference_mode()
    def read_leaves_together(self, queries: Sequence[LeavesQuery]) -> list[Tensor]:
        """As `read_leaves`, for several sequences in one forward, where their attention is ours."""
        if not uses_cache_attention(self.model):
            return [self._read_chains(one) for one in queries]
        found: dict[int, list[Tensor]] = {one.batch_slot: [] for one in queries}
        parts, plans, trees, fresh = list[tuple[int, ForwardChunk]](), [], [], list[LeavesQuery]()
        for one in queries:
            slot = self._slots[one.batch_slot]
            self.observe(one.tokens, one.batch_slot)
            if slot.tree is None:
                fresh.append(one)
            tree = slot.tree or DraftTreeCache(slot.cache.slots)
            tree.adopt(one.tokens[: self._restored(one.tokens[:-1], one.batch_slot)])
            trees.append(tree)
            slot.cached, slot.sides, slot.pieces = [], {}, []  # its cache is overwritten
            slot.tree = None  # if what follows fails, nothing is known
            plans.append(trees[-1].plan(list(one.tokens), one.paths))
            chunks = plans[-1].chunks(DRAFT_PREFILL_CHUNK, self.windows)
            last = next(chunks)
            for chunk in chunks:
                found[one.batch_slot].append(self._read_chunk(last, one.batch_slot))
                last = chunk
            if len(queries) == 1:
                try:
                    with self._asking(len(plans[-1].nodes)):
                        found[one.batch_slot].append(self._read_chunk(last, one.batch_slot))
                except Overtaken:
                    tree.undo(plans[-1])
                    slot.tree = tree
                    raise
            elif len(last.tokens) > LIMIT or not self.shares_forwards:
                found[one.batch_slot].append(self._read_chunk(last, one.batch_slot))
            else:
                parts.append((one.batch_slot, last))
        for batch_slot, logits in self._read_chunks(parts):
            found[batch_slot].append(logits)
        for one in fresh:
            self._remember_beginning(one)
        for one, tree in zip(queries, trees, strict=True):
            if one.passing >= 0:
                tree.give_back(one.passing)
            self._slots[one.batch_slot].tree = tree
        return [
            select_rows(torch.cat(found[one.batch_slot]), plan.order)[:, : self.vocabulary]
            for one, plan in zip(queries, plans, strict=True)
        ]

    def read(self, tokens: Sequence[int], keep: int, side_rows: Sequence[SideRow] = (), batch_slot: int = 0) -> Tensor:
        self._restored(tokens[: len(tokens) - keep], batch_slot)
        return super().read(tokens, keep, side_rows, batch_slot)

    def forward(self, tokens: list[int], *arguments: Any, **more: Any) -> Tensor:
        with self._asking(len(tokens)):
            return super().forward(tokens, *arguments, **more)

    @contextlib.contextmanager
    def _asking(self, rows: int) -> Iterator[None]:
        """A forward of so many rows in here may end early."""
        self._asked = self.overtaken if rows <= LIMIT and self.model.device.type == "cpu" else None
        if self._asked and not self._asks:
            self._asks = True
            for part in _parts(self.model):
                part.register_forward_pre_hook(self._ask)
        try:
            yield
        finally:
            self._asked = None

    def _ask(self, _layer: nn.Module, _inputs: object) -> None:
        if self._asked and self._asked():
            raise Overtaken

    def _restored(self, tokens: Sequence[int], batch_slot: int) -> int:
        """How much of the beginning of a text is put into an empty cache, as earlier texts had it."""
        slot = self._slots[batch_slot]
        return 0 if slot.cached or slot.tree else self.restore(tokens, batch_slot)

    def _remember_beginning(self, query: LeavesQuery) -> None:
        """Keeps the pieces of a text that was read into an empty tree: there they lie in the first slots."""
        if self.prefix_cache is None:
            return
        key, cache = EMPTY, self._slots[query.batch_slot].cache
        for first in range(0, len(query.tokens) - PREFILL_CHUNK + 1, PREFILL_CHUNK):
            key = digest(key, query.tokens[first : first + PREFILL_CHUNK])
            if key not in self.prefix_cache:
                self.prefix_cache.add(key, Piece(cache.take(first, PREFILL_CHUNK)))

    def _read_chains(self, query: LeavesQuery) -> Tensor:
        """By chains, each with all paths that are a beginning of the next: a model that makes its masks itself reads
        no others. It is timed on longer texts than it may have to read."""
        found, some = [], list[tuple[int, ...]]()
        for path, after in zip(query.paths, [*query.paths[1:], None], strict=True):
            some.append(path)
            if after is None or len(after) != len(path) + 1 or after[: len(path)] != path:
                chain = [*query.tokens, *path][: self.max_length]
                found.append(self.read(chain, min(len(some), len(chain)), batch_slot=query.batch_slot))
                some = []
        return torch.cat(found)

    def _place_chunk(self, chunk: ForwardChunk, batch_slot: int) -> SequenceRows:
        cache = self._slots[batch_slot].cache
        cache.place_nodes(chunk.slots, chunk.mask)
        return SequenceRows(batch_slot, chunk.tokens, chunk.positions.tolist(), cache)

    def _chunk_rows(self, chunk: ForwardChunk, batch_slot: int) -> ForwardRows:
        masks = [chunk.mask.within(window).visible[0, 0] for window in (None, *self.windows)]
        cache, slots = self._slots[batch_slot].cache, chunk.slots.tolist()
        cache.high = max(cache.high, max(slots) + 1)
        return ForwardRows(chunk.tokens, chunk.positions.tolist(), slots, mask=torch.stack(masks).numpy())

    def _read_chunk(self, chunk: ForwardChunk, batch_slot: int) -> Tensor:
        if self.static and self.static.supports(len(chunk.tokens)):
            rows = self._chunk_rows(chunk, batch_slot)
            return select_rows(self.static(self._slots[batch_slot].cache, rows)[0], chunk.wanted)
        laid = self._place_chunk(chunk, batch_slot)
        return self.run(laid.tokens, laid.positions, laid.cache, chunk.wanted)

    def _read_chunks(self, chunks: Sequence[tuple[int, ForwardChunk]]) -> Iterator[tuple[int, Tensor]]:
        """Those of several sequences in one forward: batch slots, and the logits wanted of each."""
        if not chunks:
            return
        lengths = [len(chunk.tokens) for _, chunk in chunks]
        count = next((count for count in _ROWS if count >= sum(lengths)), sum(lengths))
        if self.shared and self.shared.supports(count):
            queries = next(count for count in COUNTS if count >= max(lengths))
            logits, _ = self.shared([(slot, self._chunk_rows(one, slot)) for slot, one in chunks], queries, count)
        else:
            logits, _ = self.run_together([self._place_chunk(one, slot) for slot, one in chunks])
        first = 0
        for (batch_slot, chunk), length in zip(chunks, lengths, strict=True):
            yield batch_slot, select_rows(logits[first : first + length], chunk.wanted)
            first += length


def _parts(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a forward and its head, as far as they are known."""
    if not isinstance(model, PreTrainedModel):  # what stands for one where time is measured
        return []
    return [*(find_decoder_layers(model) or ()), *filter(None, [model.get_output_embeddings()])]


def read_unknown_tokens(part: nn.Module, tokens: int) -> None:
    """Lets a drafter read those of its target's `tokens` that its tables have no row for: as their last one. `part`: of
    it, whose embeddings are all of tokens.

    Guesses after such a token are poorer, and no more.
    """

    def known(table: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        asked, *others = inputs
        return asked.clamp(max=len(table.weight) - 1), *others  # type: ignore[arg-type]

    for table in part.modules():
        if isinstance(table, nn.Embedding) and len(table.weight) < tokens:
            table.register_forward_pre_hook(known)
