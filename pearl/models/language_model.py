"""A causal language model that reads sequences and remembers what it has read: one forward at a time.

`LanguageModel.read(tokens, keep)` is a pure function of its tokens: the cache only decides what needs no second
reading. It compares the tokens themselves, so nothing has to tell it about misses, roll-backs or roots. Deleting the
cache changes the cost and nothing else.

Knows: which rows a forward has, where they lie in the cache, how several sequences share one. Refuses to know who asks:
a target (`pearl.models.verifier`), a drafter (`pearl.models.draft_model`) or a score (`pearl.models.scoring`).

Letters: V tokens of the vocabulary, F numbers of the hooked layers' hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pearl.core.token_buckets import ANY, LIMIT, PREFILL_CHUNK, TokenBuckets
from pearl.core.trie import shared_prefix
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache.attention_probe import attention_of
from pearl.models.kv_cache.batch_cache import BatchCache, SequenceSlice
from pearl.models.kv_cache.draft_tree_cache import DraftTreeCache
from pearl.models.kv_cache.prefix_cache import EMPTY, Digest, Piece, PrefixCache, digest
from pearl.models.kv_cache.slot_cache import Branch, KVBuffers, SlotCache
from pearl.models.kv_cache.transformers_interface import ForwardCache, forward, uses_cache_attention
from pearl.models.kv_cache.window import Window
from pearl.models.reduced_head import ReducedVocabHead
from pearl.models.static_shapes.one_text import COUNTS, ForwardRows, StaticShapeRunner
from pearl.models.static_shapes.recordings import Capture
from pearl.models.static_shapes.several_texts import SharedShapeRunner

TREE_SLOTS = 256  # for the nodes of a drafter, beyond its longest sequence

SideRow = tuple[int, int]  # (row of the parent, token): rows beside the chain are numbered on from its last


@dataclass
class SlotState:
    """What is known of the sequence in one batch slot: its cached tokens, and where its last forward left side rows."""

    cache: SlotCache
    cached: list[int] = field(default_factory=list)  # the token in each slot of the cache
    first: int = 0  # position of the first row of the last forward
    sides: dict[tuple[int, int], int] = field(default_factory=dict)  # (a row of it, token) -> the side row after it
    tree: DraftTreeCache | None = None  # what is where, if leaves were read last
    pieces: list[Digest] = field(default_factory=list)  # of its beginning that were read as such, one after the other
    states: list[Tensor] = field(default_factory=list)  # of the hooked layers, [rows, F] of each forward of a read
    before: int = 0  # rows of it before the first whose logits were asked for

    def begin(self, tokens: list[int], keep: int) -> int:
        """How many of `tokens` need no reading. If what follows fails, no more is known."""
        known = self.known(tokens, len(tokens) - keep)
        self.cached, self.sides, self.tree = tokens[:known], {}, None
        del self.pieces[known // PREFILL_CHUNK :]
        self.states, self.before = [], len(tokens) - keep - known
        return known

    def done(self, tokens: list[int], chain: int, side_rows: Sequence[SideRow]) -> None:
        """The last forward has read the last `chain` of `tokens`, and `side_rows`."""
        self.cached = tokens
        self.sides = {side: chain + i for i, side in enumerate(side_rows)}

    def known(self, tokens: list[int], most: int) -> int:
        """How many of `tokens` need no reading. A path of side rows of the last forward that the sequence took is put
        in place: its rows have the bits that the chain's would have."""
        known = min(shared_prefix(self.cached, tokens), most)
        row = known - self.first - 1
        taken: list[int] = []
        while known + len(taken) < most and (side := self.sides.get((row, tokens[known + len(taken)]))) is not None:
            taken.append(side)
            row = side
        if taken:
            self.cache.move(taken, known)
        return known + len(taken)


@dataclass(frozen=True)
class SequenceRows:
    """The rows of one sequence in a forward: its chain, its side rows, padding."""

    batch_slot: int
    tokens: list[int]
    positions: list[int]
    cache: SlotCache  # in which they are placed

    def __len__(self) -> int:
        return len(self.tokens)


class LanguageModel:
    """A transformers model over a `SlotCache` for each of its batch slots."""

    buckets: TokenBuckets = ANY  # row counts to which `read` pads its forwards; those of `ANY` are not padded

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: int,
        max_length: int,
        max_sequences: int = 1,
        coarse: bool = False,
        hooks: HiddenStateHooks | None = None,
        head: ReducedVocabHead | None = None,
    ):
        """`vocabulary`: the logits are cut to this many tokens. `max_length`: of a sequence, in tokens.
        `max_sequences`: how many there may be side by side. `coarse`: see `KVBuffers`. `hooks`: on layers whose hidden
        states are kept. `head`: the model's, if it is cut to a draft vocabulary."""
        self.model, self.vocabulary, self.max_length = model, vocabulary, max_length
        self.static: StaticShapeRunner | None = None  # forwards of one text
        self.shared: SharedShapeRunner | None = None  # and those that several share
        self.prefix_cache: PrefixCache | None = None  # over texts
        self._attention = attention_of(model)
        self.buffers = KVBuffers(max_length + TREE_SLOTS, max_sequences, coarse, self._attention.alike)
        self._hooks, self._head = hooks, head
        self.max_sequences = max_sequences
        self._slots = [SlotState(SlotCache(self.buffers, slot)) for slot in range(max_sequences)]

    def enable_static_shapes(
        self, counts: Sequence[int] = COUNTS, capture: Capture | None = None, backend: str = "packed"
    ) -> StaticShapeRunner:
        """From here on forwards of one sequence that are no wider than the last of `counts` have static shapes, and
        whole pieces of prompts; and forwards that several sequences share. Where that is so already, what `capture` has
        recorded stays."""
        more, made = (self._hooks, self._head, self.windows), self.static
        if not (capture and made and (made.counts, made.capture, made.backend) == (tuple(counts), capture, backend)):
            pieces = not self._attention.slices_rows
            made = StaticShapeRunner(self.model, self.buffers.slots, counts, capture, backend, *more, pieces)
        self.static = made
        self.share_static_shapes(capture)
        return made

    def share_static_shapes(self, capture: Capture | None) -> None:
        """The same of forwards that several sequences share alone."""
        more, made = (self._hooks, self._head, self.windows), self.shared
        if not (self.static and self.max_sequences > 1 and self.shares_forwards):
            self.shared = None
        elif not (capture and made and (made.capture, made.backend) == (capture, self.static.backend)):
            self.shared = SharedShapeRunner(self.model, self.buffers, capture, self.static.backend, *more)

    @torch.inference_mode()
    def forget(self, but: Sequence[int] = (), batch_slot: int = 0) -> int:
        """Empties the cache of a batch slot, but for what it holds of the tokens `but`, from their beginning. Returns
        how many of them it does hold."""
        state, but = self._slots[batch_slot], list(but)
        known = state.known(but, len(but))
        state.cache.clear(known, scratch=self.static is not None)
        self._slots[batch_slot] = SlotState(state.cache, but[:known], pieces=state.pieces[: known // PREFILL_CHUNK])
        if self._head:
            self._head.forget(batch_slot)
        return known

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], keep: int, side_rows: Sequence[SideRow] = (), batch_slot: int = 0) -> Tensor:
        """Logits [keep + len(side_rows), V] of what follows each of the last `keep` of `tokens`, at least one, and each
        side row. A side row's parent is one of those last tokens, numbered from 0, or an earlier side row.
        """
        tokens = list(tokens)
        new, sides = self.begin(batch_slot, tokens, keep, side_rows, LIMIT if side_rows else PREFILL_CHUNK - 1)
        rows = len(new) + len(sides)
        pads = self.buckets.pad(rows) - rows
        logits = self.forward(new, len(tokens) - len(new), keep + len(sides) + pads, sides, pads, batch_slot)
        self._slots[batch_slot].done(tokens, len(new), sides)
        return logits[: keep + len(sides), : self.vocabulary]

    @torch.inference_mode()
    def restore(self, tokens: Sequence[int], batch_slot: int = 0) -> int:
        """Puts pieces of a text that were read before into the cache, after those that are there. Returns how many
        tokens these are. A `LanguageModel.read` of them would have left the same bits."""
        state, store = self._slots[batch_slot], self.prefix_cache
        first = len(state.pieces) * PREFILL_CHUNK
        if store is None or len(state.cached) != first or shared_prefix(state.cached, tokens) < first:
            return 0
        key, keys = state.pieces[-1] if state.pieces else EMPTY, []
        for at in range(first, len(tokens) - PREFILL_CHUNK + 1, PREFILL_CHUNK):
            key = digest(key, tokens[at : at + PREFILL_CHUNK])
            if key not in store:
                break
            keys.append(key)
        pieces = store.find(keys)
        for place, piece in enumerate(pieces):
            state.cache.put(piece.stacks, first + place * PREFILL_CHUNK)
        count = len(pieces) * PREFILL_CHUNK
        state.pieces += keys[: len(pieces)]
        state.cached = list(tokens[: first + count])
        state.sides, state.before = {}, count - 1
        state.states = [one.states for one in pieces if one.states is not None]
        return count

    def keep_prefixes(self, mb: int) -> None:
        """From here on pieces of prompts are kept over texts, in at most so many MB."""
        self.prefix_cache = PrefixCache(mb * 1_000_000) if mb else None

    def begin_round(self, forget: bool = False) -> None:
        """See `PrefixCache.begin_round`."""
        if self.prefix_cache:
            self.prefix_cache.begin_round(forget)

    def _remember(self, tokens: list[int], first: int, batch_slot: int, states: Tensor | None) -> None:
        """Keeps a piece that has just been read, if it is one, after those before it."""
        state, store = self._slots[batch_slot], self.prefix_cache
        if store is None or len(tokens) != PREFILL_CHUNK or first != len(state.pieces) * PREFILL_CHUNK:
            return
        key = digest(state.pieces[-1] if state.pieces else EMPTY, tokens)
        if key not in store:
            store.add(key, Piece(state.cache.take(first, PREFILL_CHUNK), states), state.pieces)
        state.pieces.append(key)

    def observe(self, tokens: Sequence[int], batch_slot: int) -> None:
        """Tells a head that is cut to a draft vocabulary what the sequence is that is read next."""
        if self._head:
            self._head.observe_tokens(tokens, batch_slot)

    def begin(
        self, batch_slot: int, tokens: list[int], keep: int, side_rows: Sequence[SideRow], most: int
    ) -> tuple[list[int], list[SideRow]]:
        """The tokens that a forward has still to read, and the side rows, whose parents are numbered from the first of
        those. Before them at most `most` that nobody asked for: if there are more, they are read here."""
        assert 0 < keep <= len(tokens) <= self.max_length, "a text must fit the cache and hold the rows asked for"
        self.observe(tokens, batch_slot)
        known = self._slots[batch_slot].begin(tokens, keep)
        while (ahead := len(tokens) - keep - known) > most:
            self.forward(tokens[known : known + min(PREFILL_CHUNK, ahead)], known, 1, batch_slot=batch_slot)
            known += min(PREFILL_CHUNK, ahead)
            self._slots[batch_slot].cached = tokens[:known]
        return tokens[known:], [(ahead + parent, token) for parent, token in side_rows]

    def forward(
        self,
        tokens: list[int],
        first: int,
        keep: int,
        side_rows: Sequence[SideRow] = (),
        pads: int = 0,
        batch_slot: int = 0,
    ) -> Tensor:
        """One forward of `tokens` at the positions from `first`, of side rows, and of `pads` rows that only fill it.

        Returns logits [keep, V] of the last `keep` rows, V as the model has it.
        """
        count = len(tokens) + len(side_rows) + pads
        if self.static and self.static.supports(count, keep):
            rows = self.note_rows(tokens, first, side_rows, batch_slot, count)
            logits, states = self.static(self._slots[batch_slot].cache, rows)
            last = min(count, len(logits))  # of a piece of a prompt there is but one row
            logits, states = logits[last - keep : last].clone(), None if states is None else states.clone()
        else:
            laid = self.place_rows(tokens, first, side_rows, pads, batch_slot)
            logits = self.run(laid.tokens, laid.positions, laid.cache, keep)
            states = self._hooks.states()[0] if self._hooks else None
        if states is not None:
            self._slots[batch_slot].states.append(states)
        # where shapes are static, a piece whose other rows are asked for too has gone through other kernels
        if not side_rows and not pads and (keep == 1 or not self.static):
            self._remember(tokens, first, batch_slot, states)
        return logits

    def place_rows(
        self, tokens: list[int], first: int, side_rows: Sequence[SideRow] = (), pads: int = 0, batch_slot: int = 0
    ) -> SequenceRows:
        """Notes the rows of a forward, and gives them places in the cache."""
        return self.place(self.note_rows(tokens, first, side_rows, batch_slot), pads, batch_slot)

    def place(self, rows: ForwardRows, pads: int, batch_slot: int) -> SequenceRows:
        """Gives those rows, and some that only fill the forward, places in the cache."""
        cache, chain, first = self._slots[batch_slot].cache, len(rows.slots), rows.first
        count, main = len(rows.tokens) + pads, self.buckets.least(chain)
        cache.place_chain(first, count, chain, rows.branches, rows.positions, main)
        padding = [rows.tokens[chain - 1]] * pads, [first] * pads
        return SequenceRows(batch_slot, [*rows.tokens, *padding[0]], [*rows.positions, *padding[1]], cache)

    def note_rows(
        self, tokens: list[int], first: int, side_rows: Sequence[SideRow], batch_slot: int, least: int = 0
    ) -> ForwardRows:
        """The rows of a forward without padding, which its batch slot knows from here on as its next one."""
        rows, cache = self.forward_rows(tokens, first, side_rows, least), self._slots[batch_slot].cache
        self._slots[batch_slot].first, cache.high = first, max(cache.high, max(rows.positions) + 1)
        return rows

    def forward_rows(self, tokens: list[int], first: int, side_rows: Sequence[SideRow], least: int) -> ForwardRows:
        """The rows of any forward, without padding. `least`: see `ForwardRows`."""
        chain, positions = len(tokens), list(range(first, first + len(tokens)))
        assert positions[-1] < self.buffers.slots, "the cache is too short for this forward"
        for parent, _ in side_rows:
            positions.append(positions[parent] + 1)
        branches = _branches(chain, [parent for parent, _ in side_rows], positions, self.buckets)
        tokens = [*tokens, *(token for _, token in side_rows)]
        return ForwardRows(tokens, positions, range(first, first + chain), first, branches, least=least)

    def run_together(
        self, parts: Sequence[SequenceRows], queries: Sequence[int] | None = None, pads: int = 0
    ) -> tuple[Tensor, dict[int, slice]]:
        """One forward of several sequences: logits [rows, V], and which rows are whose, by batch slot.

        `queries`: rows of each in the attention, at least its own; None: just its own. `pads`: rows that only fill it.
        """
        slices, places, first = [], {}, 0
        for part, count in zip(parts, queries or map(len, parts), strict=True):
            slices.append(SequenceSlice(part.cache, range(first, first + len(part)), count))
            places[part.batch_slot] = slice(first, first + len(part))
            first += len(part)
        tokens = [token for part in parts for token in part.tokens]
        positions = [position for part in parts for position in part.positions]
        cache = BatchCache(slices, first + pads)
        return self.run(tokens + tokens[-1:] * pads, positions + positions[-1:] * pads, cache), places

    @property
    def shares_forwards(self) -> bool:
        """Whether several sequences can be read in one forward, and rows beside a chain."""
        return uses_cache_attention(self.model) and self._attention.owns_keys

    @property
    def windows(self) -> tuple[Window, ...]:
        """The different ones of its layers."""
        return self._attention.windows

    @torch.inference_mode()
    def run(self, tokens: list[int], positions: list[int], cache: ForwardCache, keep: int | Tensor = 0) -> Tensor:
        """Logits [rows, V] of one forward, V as the model has it; `keep`: see transformers' `logits_to_keep`."""
        one = self.model, torch.tensor([tokens]), torch.tensor([positions]), cache
        if self._attention.slices_rows and not (isinstance(keep, int) and keep == 0):
            logits = forward(*one)[0]
            return logits[-keep:] if isinstance(keep, int) else logits[keep]
        return forward(*one, keep)[0]


def _branches(chain: int, parents: Sequence[int], positions: Sequence[int], plan: TokenBuckets) -> list[Branch]:
    """The side rows as paths. A row goes on with its parent's path if it is that row's first child there.

    Worked example: chain rows 0 1 2, side rows 3 (after 0), 4 (after 3), 5 (after 3). The paths are 3 4 and 3 5; the
    second lays 3 too, whose attention the first has computed.
    """
    paths: list[list[int]] = []  # the rows of each from where it leaves the chain
    own: list[int] = []  # how many at its end are computed there
    for row, parent in enumerate(parents, chain):
        through = next((path for path in paths if parent in path), None)
        if through is None:
            paths.append([row])
            own.append(1)
        elif through[-1] == parent:
            through.append(row)
            own[paths.index(through)] += 1
        else:
            paths.append([*through[: through.index(parent) + 1], row])
            own.append(1)
    made = []
    for path, count in zip(paths, own, strict=True):
        mine = path[-count:]
        queries = (*mine, *[mine[-1]] * (plan.least(count) - count))
        made.append(Branch(positions[path[0]], tuple(path), queries, count))
    return made
