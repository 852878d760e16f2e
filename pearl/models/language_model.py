"""A causal language model that reads a text and remembers what it has read.

`LanguageModel.read(tokens, keep)` is a pure function of its tokens: the cache only decides what needs no second
reading. It compares the tokens themselves, so nothing has to tell it about misses, roll-backs or roots. Deleting the
cache changes the cost and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pearl.core.features import DeviceFeatures
from pearl.core.messages import Features
from pearl.core.token_buckets import ANY, GRAIN, LIMIT, BatchedTokenBuckets, Check, TokenBuckets
from pearl.core.trie import shared_prefix
from pearl.models.draft_tree_cache import Chunk, DraftTreeCache
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache import (
    Branch,
    Buffers,
    Share,
    SharedCache,
    SlotCache,
    active_cache,
    as_model_mask,
    reads_branches,
)
from pearl.models.reduced_head import ReducedVocabHead
from pearl.models.static_shapes import COUNTS, Capture, Rows, StaticShapeRunner

TREE = 256  # slots for the nodes of a drafter beyond its longest text
CHUNK = GRAIN  # rows of one forward over a prompt at most: other texts wait no longer than that
DRAFT_CHUNK = 4 * GRAIN  # the same of a drafter
QUERIES = (4, 8)  # rows of a text in the attention that texts share: of a kind, so that many share one call


SideRow = tuple[int, int]  # (row of the parent, token): rows beside the chain are numbered on from its last


@dataclass(frozen=True)
class Wanted:
    """What is asked of one text in a forward that several have together; see `Reader.read`."""

    text: int  # which of the reader's texts
    tokens: Sequence[int]
    keep: int
    branches: Sequence[SideRow] = ()


@dataclass(frozen=True)
class WantedLeaves:
    """The same of a drafter's text; see `Reader.read_leaves`."""

    text: int
    tokens: Sequence[int]
    paths: Sequence[tuple[int, ...]]


class Reader(Protocol):
    """What the roles ask of a model."""

    rows: TokenBuckets
    joint: BatchedTokenBuckets | None  # row counts of forwards that several texts share; None: each text has its own
    max_length: int  # of a text, in tokens

    @property
    def texts(self) -> int:
        """How many it can hold side by side."""

    @property
    def branches(self) -> bool:
        """Whether `read` takes side branches."""

    def read(
        self,
        tokens: Sequence[int],
        keep: int,
        padded: bool = True,
        branches: Sequence[SideRow] = (),
        text: int = 0,
    ) -> Tensor:
        """Logits [keep + len(branches), V] of what follows each of the last `keep` of `tokens`, and each side row."""

    def read_together(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """As `read` for several texts, each with the bits that it has alone."""

    def read_leaves(self, text: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits [len(paths), V] of what follows `text` and each path, for a drafter: bits are of no account."""

    def read_leaves_together(self, wanted: Sequence[WantedLeaves]) -> list[Tensor]:
        """As `read_leaves` for several texts."""

    def forget(self, but: Sequence[int] = (), text: int = 0) -> None:
        """Empties the cache of a text, but for what it holds of the tokens `but`, from their beginning."""


@dataclass
class _Memo:
    """What is known of one text: the token in each slot, and where its last forward left its branches."""

    cache: SlotCache
    cached: list[int] = field(default_factory=list)
    first: int = 0  # position of the first row of the last forward
    sides: dict[tuple[int, int], int] = field(default_factory=dict)  # (a row of it, token) -> the side row after it
    leaves: DraftTreeCache | None = None  # what is where, if `read_leaves` was the last to write
    said: list[Tensor] = field(default_factory=list)  # by the tapped layers, [rows, F] of each forward of the last read
    before: int = 0  # rows of it before the first whose logits were asked for

    def begin(self, tokens: list[int], keep: int) -> int:
        """How many of `tokens` need no reading. If what follows fails, no more is known."""
        known = self.known(tokens, len(tokens) - keep)
        self.cached, self.sides, self.leaves = tokens[:known], {}, None
        self.said, self.before = [], len(tokens) - keep - known
        return known

    def done(self, tokens: list[int], chain: int, sides: Sequence[SideRow]) -> None:
        """The last forward has read the last `chain` of `tokens`, and `sides`."""
        self.cached = tokens
        self.sides = {side: chain + i for i, side in enumerate(sides)}

    def known(self, tokens: list[int], most: int) -> int:
        """How many of `tokens` need no reading. A side branch of the last forward that the text took is put in place:
        its rows have the bits that the chain's would have."""
        known = min(shared_prefix(self.cached, tokens), most)
        row, taken = known - self.first - 1, []
        while known + len(taken) < most and (side := self.sides.get((row, tokens[known + len(taken)]))) is not None:
            taken.append(side)
            row = side
        if taken:
            self.cache.move(taken, known)
        return known + len(taken)


@dataclass(frozen=True)
class _Part:
    """The rows of one text in a forward: its chain, its side rows, padding."""

    text: int
    tokens: list[int]
    positions: list[int]
    mask: Tensor  # bool [1, 1, rows, slots seen]
    cache: SlotCache

    def __len__(self) -> int:
        return len(self.tokens)


class LanguageModel:
    """A transformers model over a `SlotCache` for each of its texts."""

    def __init__(
        self,
        model: torch.nn.Module,
        vocabulary: int,
        max_length: int,
        rows: TokenBuckets = ANY,
        head: ReducedVocabHead | None = None,
        taps: HiddenStateHooks | None = None,
        texts: int = 1,
        coarse: bool = False,
    ):
        """`vocabulary`: the logits are cut to this many tokens. `max_length`: of a text, in tokens. `head`: the
        model's, if it is cut to a draft vocabulary. `taps`: layers whose hidden states `features` gives. `texts`: how
        many there may be side by side. `coarse`: see `cache.Buffers`."""
        self._head, self._taps = head, taps
        self.model, self.vocabulary, self.max_length, self.rows = model, vocabulary, max_length, rows
        self.joint: BatchedTokenBuckets | None = None
        self.fixed: StaticShapeRunner | None = None
        self.checks: tuple[Check, ...] = ()  # what was found of its bits (`pearl.models.numerics_check`)
        self.features_stay = False  # on the device, for a lane
        buffers = Buffers(max_length + TREE, texts, coarse)
        self._memos = [_Memo(SlotCache(buffers, text)) for text in range(texts)]

    @property
    def texts(self) -> int:
        return len(self._memos)

    @property
    def branches(self) -> bool:
        return self.rows.branches and reads_branches(self.model)

    def fix(
        self, counts: Sequence[int] = COUNTS, capture: Capture | None = None, form: str = "packed"
    ) -> StaticShapeRunner:
        """From here on forwards of one text that are no wider than the last of `counts` have fixed shapes."""
        slots = self._memos[0].cache.slots
        self.fixed = StaticShapeRunner(self.model, slots, counts, capture, form, self._taps, self._head)
        return self.fixed

    @torch.inference_mode()
    def forget(self, but: Sequence[int] = (), text: int = 0) -> None:
        memo, but = self._memos[text], list(but)
        self._memos[text] = _Memo(memo.cache, but[: memo.known(but, len(but))])
        if self._head:
            self._head.forget(text)

    @torch.inference_mode()
    def read(
        self,
        tokens: Sequence[int],
        keep: int,
        padded: bool = True,
        branches: Sequence[SideRow] = (),
        text: int = 0,
    ) -> Tensor:
        """Logits [keep + len(branches), V] of what follows each of the last `keep` of `tokens`, at least one, and each
        side row. A side row's parent is one of those last tokens, numbered from 0, or an earlier side row.

        `padded`: bring the forward up to a row count whose bits are safe. A drafter, whose guesses are checked anyway,
        saves those rows.
        """
        tokens = list(tokens)
        new, sides = self._begin(text, tokens, keep, branches, LIMIT if branches else CHUNK - 1)
        rows = len(new) + len(sides)
        pads = self.rows.pad(rows) - rows if padded else 0
        logits = self.forward(new, len(tokens) - len(new), keep + len(sides) + pads, sides, pads, text)
        self._memos[text].done(tokens, len(new), sides)
        return logits[: keep + len(sides), : self.vocabulary]

    @torch.inference_mode()
    def read_together(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """As `read`, for several texts in one forward, each with the bits that it has alone."""
        if len(wanted) == 1 or self.joint is None:
            return [self.read(one.tokens, one.keep, True, one.branches, one.text) for one in wanted]
        found: dict[int, Tensor] = {}  # [rows, V] by text
        parts: list[_Part] = []
        for one in sorted(wanted, key=lambda one: one.text):
            tokens = list(one.tokens)
            new, sides = self._begin(one.text, tokens, one.keep, one.branches, LIMIT)
            if sum(map(len, parts)) + len(new) + len(sides) > self.joint.most:
                found |= self._forward_together(parts)
                parts = []
            parts.append(self._lay(new, len(tokens) - len(new), sides, 0, one.text))
        found |= self._forward_together(parts)
        for one in wanted:
            chain = len(found[one.text]) - len(one.branches)
            sides = [(chain - one.keep + parent, token) for parent, token in one.branches]
            self._memos[one.text].done(list(one.tokens), chain, sides)
        return [found[one.text][-one.keep - len(one.branches) :, : self.vocabulary] for one in wanted]

    @torch.inference_mode()
    def read_whole(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [tokens, V] of what follows every token of several texts, in one forward. What was known of texts is
        forgotten; bits are of no account."""
        assert len(texts) <= self.texts, "more texts than places"
        for text, tokens in enumerate(texts):
            self.forget(text=text)
            if self._head:
                self._head.follow(tokens, text)
        parts = [self._lay(list(tokens), 0, (), 0, text) for text, tokens in enumerate(texts)]
        if len(parts) == 1 or not reads_branches(self.model):
            read = [self._run(p.tokens, torch.tensor(p.positions), p.mask, 0, p.cache) for p in parts]
            return [logits[:, : self.vocabulary] for logits in read]
        rows = [token for part in parts for token in part.tokens]
        positions = [position for part in parts for position in part.positions]
        logits, places = self._run_together(parts, [len(part) for part in parts], rows, positions)
        return [logits[places[text], : self.vocabulary] for text in range(len(texts))]

    @torch.inference_mode()
    def spread(self, tokens: int) -> None:
        """Gives all texts the keys and values that the first has of so many tokens. For `try_together`."""
        self._memos[0].cache.buffers.spread(tokens)

    @torch.inference_mode()
    def try_together(self, tokens: list[int], first: int, lengths: Sequence[int], count: int) -> list[Tensor]:
        """Logits [lengths[i], V] of a forward in which text i reads so many of `tokens` at the positions from `first`,
        and which has `count` rows. For `rows.find_invariant_batches`."""
        parts = [self._lay(tokens[:length], first, (), 0, text) for text, length in enumerate(lengths) if length]
        self.joint = BatchedTokenBuckets((count,), (0.0,))
        found = self._forward_together(parts)
        self.joint = None
        return [logits[:, : self.vocabulary] for logits in found.values()]

    def features(self, rows: Sequence[int], text: int = 0) -> Features | None:
        """What the tapped layers said at rows of the last read; None if none are tapped.

        Rows are numbered as its logits are; those before the first one, as far as they were read, are negative. Returns
        [rows, F]: int16, the bits of bfloat16, or what stays on the device if `features_stay`.
        """
        if self._taps is None:
            return None
        memo = self._memos[text]
        said = torch.cat(memo.said) if len(memo.said) > 1 else memo.said[0]
        wanted = torch.tensor([memo.before + row for row in rows], device=said.device)
        features = DeviceFeatures(said[wanted].to(torch.bfloat16))
        return features if self.features_stay else features.bits()

    def _begin(
        self, text: int, tokens: list[int], keep: int, branches: Sequence[SideRow], most: int
    ) -> tuple[list[int], list[SideRow]]:
        """The tokens that a forward has still to read, and the side rows, whose parents are numbered from the first of
        those. Before them at most `most` that nobody asked for: if there are more, they are read here."""
        assert 0 < keep <= len(tokens) <= self.max_length, "a text must fit the cache and hold the rows asked for"
        if self._head:
            self._head.follow(tokens, text)
        known = self._memos[text].begin(tokens, keep)
        while (ahead := len(tokens) - keep - known) > most:
            self.forward(tokens[known : known + min(CHUNK, ahead)], known, 1, text=text)
            known += min(CHUNK, ahead)
        return tokens[known:], [(ahead + parent, token) for parent, token in branches]

    def forward(
        self,
        tokens: list[int],
        first: int,
        keep: int,
        sides: Sequence[SideRow] = (),
        pads: int = 0,
        text: int = 0,
    ) -> Tensor:
        """One forward of `tokens` at the positions from `first`, of side rows, and of `pads` rows that only fill it.

        Returns logits [keep, V] of the last `keep` rows, V as the model has it.
        """
        rows = len(tokens) + len(sides) + pads
        if self.fixed and self.fixed.takes(rows):
            logits, states = self._forward_fixed(self.fixed, tokens, first, sides, rows, text)
            logits = logits[rows - keep : rows]
        else:
            part = self._lay(tokens, first, sides, pads, text)
            logits = self._run(part.tokens, torch.tensor(part.positions), part.mask, keep, part.cache)
            states = self._taps.states()[0] if self._taps else None
        if states is not None:
            self._memos[text].said.append(states)
        return logits

    def _forward_fixed(
        self, fixed: StaticShapeRunner, tokens: list[int], first: int, sides: Sequence[SideRow], least: int, text: int
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V] and states [R, F] of a forward of fixed shape, with at least so many rows."""
        memo, chain = self._memos[text], len(tokens)
        memo.first = first
        depths = _depths(chain, sides)
        rows = Rows(
            tokens=[*tokens, *(token for _, token in sides)],
            positions=[first + depth for depth in depths],
            slots=range(first, first + chain),
            first=first,
            branches=_branches(first, chain, [parent for parent, _ in sides], depths, self.rows) if sides else (),
            least=least,
        )
        assert first + chain <= memo.cache.slots, "the cache is too short for this forward"
        logits, states = fixed(memo.cache, rows)
        return logits.clone(), None if states is None else states.clone()

    def _lay(self, tokens: list[int], first: int, sides: Sequence[SideRow], pads: int, text: int) -> _Part:
        """The rows of a forward, and their places in the cache."""
        memo = self._memos[text]
        memo.first = first
        depths = _depths(len(tokens), sides)
        rows = [*tokens, *(token for _, token in sides), *[tokens[-1]] * pads]
        branches = _branches(first, len(tokens), [parent for parent, _ in sides], depths, self.rows)
        mask = memo.cache.place(first, len(rows), len(tokens), branches, depths[len(tokens) :])
        positions = [*(first + depth for depth in depths), *[first] * pads]
        return _Part(text, rows, positions, mask, memo.cache)

    def _forward_together(self, parts: Sequence[_Part]) -> dict[int, Tensor]:
        """One forward of the rows of several texts. Returns the logits [rows, V] of each."""
        assert self.joint is not None
        rows = [token for part in parts for token in part.tokens]
        positions = [position for part in parts for position in part.positions]
        pads = self.joint.pad(len(rows)) - len(rows)
        classes = (next((most for most in QUERIES if most >= len(part)), len(part)) for part in parts)
        queries = [self.rows.pad(count) for count in classes]
        logits, places = self._run_together(parts, queries, rows + rows[-1:] * pads, positions + positions[-1:] * pads)
        states = self._taps.states()[0] if self._taps else None
        for part in parts:
            if states is not None:
                self._memos[part.text].said.append(states[places[part.text]])
        return {text: logits[place] for text, place in places.items()}

    def _run_together(
        self, parts: Sequence[_Part], queries: Sequence[int], rows: list[int], positions: list[int]
    ) -> tuple[Tensor, dict[int, slice]]:
        """Logits [rows, V], and which of them are whose. `queries`: rows of each in the attention."""
        shares, places, first = [], {}, 0
        for part, count in zip(parts, queries, strict=True):
            shares.append(Share(part.cache, range(first, first + len(part)), part.mask, count))
            places[part.text] = slice(first, first + len(part))
            first += len(part)
        nobody = torch.ones(1, 1, len(rows), 1, dtype=torch.bool)  # each text brings a mask of its own
        return self._run(rows, torch.tensor(positions), nobody, 0, SharedCache(shares)), places

    def read_leaves(self, text: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits [len(paths), V] of what follows `text` and each of `paths`, which may share their beginnings.

        For a drafter, whose bits nobody compares: nodes lie where there is room, and no row is added.
        """
        return self.read_leaves_together([WantedLeaves(0, text, paths)])[0]

    @torch.inference_mode()
    def read_leaves_together(self, wanted: Sequence[WantedLeaves]) -> list[Tensor]:
        """As `read_leaves`, for several texts in one forward."""
        found: dict[int, list[Tensor]] = {one.text: [] for one in wanted}
        parts, asked, plans, leaves = [], [], [], []
        for one in wanted:
            memo = self._memos[one.text]
            if self._head:
                self._head.follow(one.tokens, one.text)
            memo.cached, memo.sides = [], {}  # its slots are overwritten
            leaves.append(memo.leaves or DraftTreeCache(memo.cache.slots))
            memo.leaves = None  # if what follows fails, nothing is known
            plans.append(leaves[-1].plan(list(one.tokens), one.paths))
            *before, last = plans[-1].chunks(DRAFT_CHUNK)
            for chunk in before:
                found[one.text].append(self._read_chunk(chunk, one.text))
            if len(wanted) == 1 or len(last.tokens) > LIMIT or not reads_branches(self.model):
                found[one.text].append(self._read_chunk(last, one.text))
            else:
                parts.append(self._lay_chunk(last, one.text))
                asked.append(last.wanted)
        if parts:
            rows = [token for part in parts for token in part.tokens]
            positions = [position for part in parts for position in part.positions]
            logits, places = self._run_together(parts, [len(part) for part in parts], rows, positions)
            for part, rows_asked in zip(parts, asked, strict=True):
                found[part.text].append(logits[places[part.text]][rows_asked])
        for one, known in zip(wanted, leaves, strict=True):
            self._memos[one.text].leaves = known
        return [
            torch.cat(found[one.text])[plan.order, : self.vocabulary] for one, plan in zip(wanted, plans, strict=True)
        ]

    def _lay_chunk(self, chunk: Chunk, text: int) -> _Part:
        cache = self._memos[text].cache
        cache.place_at(chunk.slots, chunk.seen)
        return _Part(text, chunk.tokens, chunk.positions.tolist(), chunk.mask, cache)

    def _read_chunk(self, chunk: Chunk, text: int) -> Tensor:
        if self.fixed and self.fixed.takes(len(chunk.tokens)):
            mask = chunk.mask[0, 0].numpy()
            rows = Rows(chunk.tokens, chunk.positions.tolist(), chunk.slots.tolist(), mask=mask)
            return self.fixed(self._memos[text].cache, rows)[0][chunk.wanted]
        part = self._lay_chunk(chunk, text)
        return self._run(part.tokens, chunk.positions, part.mask, chunk.wanted, part.cache)

    @torch.inference_mode()
    def _run(
        self, rows: list[int], positions: Tensor, mask: Tensor, keep: int | Tensor, cache: SlotCache | SharedCache
    ) -> Tensor:
        device = self.model.device
        with active_cache(cache):
            out = self.model(
                input_ids=torch.tensor([rows], device=device),
                position_ids=positions[None].to(device),
                attention_mask=as_model_mask(self.model, mask),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return out.logits[0]


def _depths(chain: int, sides: Sequence[SideRow]) -> list[int]:
    """Of the rows of a pass, below its first."""
    depths = list(range(chain))
    for parent, _ in sides:
        depths.append(depths[parent] + 1)
    return depths


def _branches(
    first: int, chain: int, parents: Sequence[int], depths: Sequence[int], plan: TokenBuckets
) -> list[Branch]:
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
        queries = (*mine, *[mine[-1]] * (plan.pad(count) - count))
        made.append(Branch(first + depths[path[0]], tuple(path), queries, count))
    return made
