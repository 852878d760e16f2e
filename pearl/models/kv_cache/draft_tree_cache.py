"""What a drafter has read: a tree of tokens, each with its keys in whatever slot was free.

Knows: which path of tokens lies in which slots, and what a forward must read so that each of some paths has been read.
Refuses to know: models and tensors of theirs. It is a memo: emptied, it makes the next forward longer and nothing else.

The *committed prefix* is the text as far as it has been read; everything below hangs on its last token. When the text
grows along a path that is there, its nodes join the prefix and what hung beside them is given back.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pearl.core.trie import shared_prefix
from pearl.models.kv_cache.attention import AttentionMask
from pearl.models.kv_cache.window import Window

_STEP = 16  # slots are read in multiples of this


@dataclass(slots=True, eq=False)
class TreeNode:
    token: int
    slot: int
    position: int
    parent: TreeNode | None = None  # of one below the committed prefix
    children: dict[int, TreeNode] = field(default_factory=dict)


@dataclass(frozen=True)
class ForwardChunk:
    """One forward."""

    tokens: list[int]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows]
    seen: int
    mask: AttentionMask  # of [1, 1, rows, seen]
    wanted: Tensor  # the rows whose logits are asked for


@dataclass(frozen=True)
class ReadPlan:
    nodes: list[TreeNode]  # to be read, parents first
    added: list[TreeNode]  # those of them that were not there before, in the same order
    order: list[int]  # for each path asked for, its place among the wanted nodes
    wanted: set[int]  # their indices in `nodes`
    high: int  # slots in use lie below
    places: np.ndarray  # int64 [slots], the position of the token in each
    end: TreeNode  # of the committed prefix
    prefix: np.ndarray  # bool [slots]: those of the committed prefix

    def chunks(self, rows: int, windows: Sequence[Window] = ()) -> Iterator[ForwardChunk]:
        """Forwards of at most so many rows. `windows`: those of the model's layers."""
        seen = -(-self.high // _STEP) * _STEP
        for start in range(0, len(self.nodes), rows):
            part = self.nodes[start : start + rows]
            positions = np.array([node.position for node in part])
            visible = self._visible(part, seen)
            windowed = {
                window: AttentionMask(_as_mask(visible & (self.places[:seen] >= window.first(positions)[:, None])))
                for window in windows
            }
            yield ForwardChunk(
                tokens=[node.token for node in part],
                positions=torch.from_numpy(positions),
                slots=torch.tensor([node.slot for node in part]),
                seen=seen,
                mask=AttentionMask(_as_mask(visible), windowed=windowed),
                wanted=torch.tensor([i for i in range(len(part)) if start + i in self.wanted], dtype=torch.int64),
            )

    def _visible(self, part: Sequence[TreeNode], seen: int) -> np.ndarray:
        """bool [rows, seen]: for each node the slots of its ancestors and its own. Made a forward at a time: for all
        tokens of a text it would be as large as the text's length squared."""
        made = np.empty((len(part), seen), dtype=bool)
        rows: dict[TreeNode, int] = {}
        for row, node in enumerate(part):
            above = node.parent
            if above in rows:
                made[row] = made[rows[above]]
            else:
                made[row] = self.prefix[:seen]
                while above is not self.end:
                    assert above is not None, "a node hangs below the committed prefix"
                    made[row, above.slot] = True
                    above = above.parent
            made[row, node.slot] = True
            rows[node] = row
        return made


def _as_mask(visible: np.ndarray) -> Tensor:
    return torch.from_numpy(visible)[None, None]


def _nodes(paths: Sequence[tuple[int, ...]]) -> int:
    """Of the tree that holds them: of each path in order what it does not share with the one before."""
    ordered = sorted(paths)
    shared = (shared_prefix(a, b) for a, b in itertools.pairwise(ordered))
    return sum(map(len, ordered)) - sum(shared)


class DraftTreeCache:
    """The slots of a cache, and which path lies where."""

    def __init__(self, slots: int):
        self._slots = slots
        self._free = list(range(slots))  # a heap: low slots first, so that few are read
        self._used = np.zeros(slots, dtype=bool)
        self._places = np.zeros(slots, dtype=np.int64)  # positions
        self._prefix: list[int] = []  # tokens
        self._prefix_slots: list[int] = []  # and where they lie
        self._seen = np.zeros(slots, dtype=bool)  # the same
        self._end = TreeNode(-1, -1, -1)  # the last of it

    def adopt(self, tokens: Sequence[int]) -> None:
        """The beginning of a text lies in the first slots already, of a cache that was empty."""
        at = self._end
        for token in tokens:
            at = self._add(at, token)

    def plan(self, text: list[int], paths: Sequence[tuple[int, ...]]) -> ReadPlan:
        """What to read so that `text` and each path after it has been; the last token of each path is read anew."""
        self._follow(text)
        missing = text[len(self._prefix) :]
        free = len(self._free) - len(missing)
        if free < sum(map(len, paths)) and free < _nodes(paths):  # all that is not asked for makes room
            self._release(list(self._end.children.values()))
            self._end.children = {}
        new: list[TreeNode] = []
        added: list[TreeNode] = []
        places: list[int] = []
        for path in paths:
            at = self._end
            tokens = [*missing, *path]
            for depth, token in enumerate(tokens, 1):
                child = at.children.get(token)
                if child is None:
                    child = self._add(at, token)
                    new.append(child)
                    added.append(child)
                elif depth == len(tokens) and child not in new:
                    new.append(child)  # its logits are gone; the same slot is written again
                at = child
            assert at is not self._end, "the last token of the text is to be read: it may not be in the prefix yet"
            places.append(new.index(at))
        wanted = sorted(set(places))
        high = int(self._used.nonzero()[0][-1]) + 1
        order = [wanted.index(place) for place in places]
        return ReadPlan(new, added, order, set(wanted), high, self._places, self._end, self._seen)

    def undo(self, plan: ReadPlan) -> None:
        """What was planned last has not been read."""
        for node in reversed(plan.added):  # children before their parents
            assert node.parent is not None, "the committed prefix moves with the next plan"
            del node.parent.children[node.token]
            self._give_back(node.slot)

    def give_back(self, token: int) -> None:
        """Frees the nodes of a token below the committed prefix, and what hangs on them."""
        stack = [self._end]
        while stack:
            node = stack.pop()
            if token in node.children:
                self._release([node.children.pop(token)])
            stack += node.children.values()

    def _follow(self, text: list[int]) -> None:
        """Moves the committed prefix along the text, up to the token before its last."""
        shared = shared_prefix(self._prefix, text[:-1])
        if shared < len(self._prefix):  # another text
            self._release(list(self._end.children.values()))
            for slot in self._prefix_slots[shared:]:
                self._give_back(slot)
            del self._prefix[shared:], self._prefix_slots[shared:]
            self._settle()
        while len(self._prefix) < len(text) - 1 and text[len(self._prefix)] in self._end.children:
            chosen = self._end.children.pop(text[len(self._prefix)])
            self._release(list(self._end.children.values()))
            self._prefix.append(chosen.token)
            self._prefix_slots.append(chosen.slot)
            self._seen[chosen.slot], chosen.parent, self._end = True, None, chosen
        if self._prefix and len(self._prefix) == len(text) - 1:  # beside the last token nothing can come true any more
            dead = [child for token, child in self._end.children.items() if token != text[-1]]
            self._release(dead)
            self._end.children = {t: c for t, c in self._end.children.items() if t == text[-1]}

    def _settle(self) -> None:
        """What the committed prefix sees, and its end, after it was cut."""
        self._seen = np.zeros(self._slots, dtype=bool)
        self._seen[self._prefix_slots] = True
        last = (self._prefix[-1], self._prefix_slots[-1]) if self._prefix else (-1, -1)
        self._end = TreeNode(*last, len(self._prefix) - 1)

    def _add(self, parent: TreeNode, token: int) -> TreeNode:
        assert self._free, "more nodes than slots"
        slot = heapq.heappop(self._free)
        self._used[slot] = True
        self._places[slot] = parent.position + 1
        child = parent.children[token] = TreeNode(token, slot, parent.position + 1, parent)
        return child

    def _release(self, nodes: list[TreeNode]) -> None:
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            self._give_back(node.slot)

    def _give_back(self, slot: int) -> None:
        self._used[slot] = False
        heapq.heappush(self._free, slot)
