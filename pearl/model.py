"""A causal language model that reads a text and remembers what it has read.

`LanguageModel.read(tokens, keep)` is a pure function of its tokens: the cache only decides what needs no second
reading. It compares the tokens themselves, so nothing has to tell it about misses, roll-backs or roots. Deleting the
cache changes the cost and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pearl.cache import Branch, SlotCache, as_model_mask, reads_branches
from pearl.feature.taps import Taps
from pearl.head import DraftHead
from pearl.leaves import Leaves
from pearl.rows import ANY, LIMIT, RowPlan
from pearl.trie import shared_prefix

TREE = 256  # slots for the nodes of a drafter beyond its longest text
CHUNK = 512  # rows of one prefill forward at most


SideRow = tuple[int, int]  # (row of the parent, token): rows beside the chain are numbered on from its last


class Reader(Protocol):
    """What the roles ask of a model."""

    rows: RowPlan
    max_length: int  # of a text, in tokens

    @property
    def branches(self) -> bool:
        """Whether `read` takes side branches."""

    def read(self, tokens: Sequence[int], keep: int, padded: bool = True, branches: Sequence[SideRow] = ()) -> Tensor:
        """Logits [keep + len(branches), V] of what follows each of the last `keep` of `tokens`, and each side row."""

    def read_leaves(self, text: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits [len(paths), V] of what follows `text` and each path, for a drafter: bits are of no account."""

    def forget(self, but: Sequence[int] = ()) -> None:
        """Empties the cache, but for what it holds of the text `but`, from its beginning."""


class LanguageModel:
    """A transformers model over a `SlotCache`."""

    def __init__(
        self,
        model: torch.nn.Module,
        vocabulary: int,
        max_length: int,
        rows: RowPlan = ANY,
        head: DraftHead | None = None,
        taps: Taps | None = None,
    ):
        """`vocabulary`: the logits are cut to this many tokens. `max_length`: of a text, in tokens. `head`: the
        model's, if it is cut to a draft vocabulary. `taps`: layers whose hidden states `features` gives."""
        self._head, self._taps = head, taps
        self._said: list[Tensor] = []  # by the tapped layers, [rows, F] of each forward of the last `read`
        self._before = 0  # rows of it before the first whose logits were asked for
        self.model, self.vocabulary, self.max_length, self.rows = model, vocabulary, max_length, rows
        self._cache = SlotCache(max_length + TREE)
        self._cached: list[int] = []  # the token in each slot
        self._first = 0  # position of the first row of the last forward
        self._sides: dict[tuple[int, int], int] = {}  # of the last forward: (its row, token) -> the side row after it
        self._leaves: Leaves | None = None  # what is where, if `read_leaves` was the last to write

    @property
    def branches(self) -> bool:
        return self.rows.branches and reads_branches(self.model)

    @torch.inference_mode()
    def forget(self, but: Sequence[int] = ()) -> None:
        but = list(but)
        self._cached, self._sides, self._leaves = but[: self._known(but, len(but))], {}, None
        if self._head:
            self._head.forget()

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], keep: int, padded: bool = True, branches: Sequence[SideRow] = ()) -> Tensor:
        """Logits [keep + len(branches), V] of what follows each of the last `keep` of `tokens`, at least one, and each
        side row. A side row's parent is one of those last tokens, numbered from 0, or an earlier side row.

        `padded`: bring the forward up to a row count whose bits are safe. A drafter, whose guesses are checked anyway,
        saves those rows.
        """
        tokens = list(tokens)
        assert 0 < keep <= len(tokens) <= self.max_length, "a text must fit the cache and hold the rows asked for"
        if self._head:
            self._head.follow(tokens)
        known = self._known(tokens, len(tokens) - keep)
        self._cached, self._sides, self._leaves = tokens[:known], {}, None  # if what follows fails, no more is known
        self._said, self._before = [], len(tokens) - keep - known
        while (ahead := len(tokens) - keep - known) >= CHUNK or (branches and ahead > LIMIT):
            self.forward(tokens[known : known + min(CHUNK, ahead)], known, 1)
            known += min(CHUNK, ahead)
        new = tokens[known:]
        before = len(new) - keep
        sides = [(before + parent, token) for parent, token in branches]
        rows = len(new) + len(sides)
        pads = self.rows.pad(rows) - rows if padded else 0
        logits = self.forward(new, known, keep + len(sides) + pads, sides, pads)
        self._cached = tokens
        self._sides = {side: len(new) + i for i, side in enumerate(sides)}
        return logits[: keep + len(sides), : self.vocabulary]

    def features(self, rows: Sequence[int]) -> np.ndarray | None:
        """What the tapped layers said at rows of the last `read`; None if none are tapped.

        Rows are numbered as its logits are; those before the first one, as far as they were read, are negative. Returns
        int16 [rows, F], the bits of bfloat16.
        """
        if self._taps is None:
            return None
        said = torch.cat(self._said) if len(self._said) > 1 else self._said[0]
        wanted = torch.tensor([self._before + row for row in rows], device=said.device)
        return said[wanted].to(torch.bfloat16).view(torch.int16).cpu().numpy()

    def _known(self, tokens: list[int], most: int) -> int:
        """How many of `tokens` need no reading. A side branch of the last forward that the text took is put in place:
        its rows have the bits that the chain's would have."""
        known = min(shared_prefix(self._cached, tokens), most)
        row, taken = known - self._first - 1, []
        while known + len(taken) < most and (side := self._sides.get((row, tokens[known + len(taken)]))) is not None:
            taken.append(side)
            row = side
        if taken:
            self._cache.move(taken, known)
        return known + len(taken)

    def forward(self, tokens: list[int], first: int, keep: int, sides: Sequence[SideRow] = (), pads: int = 0) -> Tensor:
        """One forward of `tokens` at the positions from `first`, of side rows, and of `pads` rows that only fill it.

        Returns logits [keep, V] of the last `keep` rows, V as the model has it.
        """
        self._first = first
        depths = list(range(len(tokens)))
        for parent, _ in sides:
            depths.append(depths[parent] + 1)
        rows = [*tokens, *(token for _, token in sides), *[tokens[-1]] * pads]
        branches = _branches(first, len(tokens), [parent for parent, _ in sides], depths, self.rows)
        mask = self._cache.place(first, len(rows), len(tokens), branches, depths[len(tokens) :])
        positions = torch.tensor([first + depth for depth in depths] + [first] * pads)
        logits = self._run(rows, positions, mask, keep)
        if self._taps:
            self._said.append(self._taps.states()[0])
        return logits

    def read_leaves(self, text: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits [len(paths), V] of what follows `text` and each of `paths`, which may share their beginnings.

        For a drafter, whose bits nobody compares: nodes lie where there is room, and no row is added.
        """
        if self._head:
            self._head.follow(text)
        self._cached, self._sides = [], {}  # its slots are overwritten
        leaves = self._leaves or Leaves(self._cache.slots)
        self._leaves = None  # if what follows fails, nothing is known
        plan, wanted = leaves.plan(list(text), paths), []
        for chunk in plan.chunks(CHUNK):
            self._cache.place_at(chunk.slots, chunk.seen)
            wanted.append(self._run(chunk.tokens, chunk.positions, chunk.mask, chunk.wanted))
        self._leaves = leaves
        return torch.cat(wanted)[plan.order, : self.vocabulary]

    @torch.inference_mode()
    def _run(self, rows: list[int], positions: Tensor, mask: Tensor, keep: int | Tensor) -> Tensor:
        device = self.model.device
        with self._cache.under_way():
            out = self.model(
                input_ids=torch.tensor([rows], device=device),
                position_ids=positions[None].to(device),
                attention_mask=as_model_mask(self.model, mask),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return out.logits[0]


def _branches(first: int, chain: int, parents: Sequence[int], depths: Sequence[int], plan: RowPlan) -> list[Branch]:
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
