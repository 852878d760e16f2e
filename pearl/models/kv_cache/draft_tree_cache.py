"""What a drafter has read: a tree of tokens, each with its keys in whatever slot was free.

Knows: which path of tokens lies in which slots, and what a forward must read so that each of some paths has been read.
Refuses to know: models and tensors of theirs. It is a memo: emptied, it makes the next forward longer and nothing else.

The *trunk* is the text as far as it has been read; everything below hangs on its last token. When the text grows along
a path that is there, its entries join the trunk and what hung beside them is given back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_STEP = 16  # slots are read in multiples of this


@dataclass(slots=True, eq=False)
class _Entry:
    token: int
    slot: int
    position: int
    visible: np.ndarray  # bool [slots]: the slots of its ancestors and its own
    children: dict[int, _Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """One forward."""

    tokens: list[int]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows]
    seen: int
    mask: Tensor  # bool [1, 1, rows, seen]
    wanted: Tensor  # the rows whose logits are asked for


@dataclass(frozen=True)
class Plan:
    entries: list[_Entry]  # to be read, parents first
    order: list[int]  # for each path asked for, its place among the wanted entries
    wanted: set[int]  # their indices in `entries`
    high: int  # slots in use lie below

    def chunks(self, rows: int) -> Iterator[Chunk]:
        seen = -(-self.high // _STEP) * _STEP
        for start in range(0, len(self.entries), rows):
            part = self.entries[start : start + rows]
            yield Chunk(
                tokens=[entry.token for entry in part],
                positions=torch.tensor([entry.position for entry in part]),
                slots=torch.tensor([entry.slot for entry in part]),
                seen=seen,
                mask=torch.from_numpy(np.stack([entry.visible[:seen] for entry in part]))[None, None],
                wanted=torch.tensor([i for i in range(len(part)) if start + i in self.wanted], dtype=torch.int64),
            )


class DraftTreeCache:
    """The slots of a cache, and which path lies where."""

    def __init__(self, slots: int):
        self._slots = slots
        self._free = list(range(slots))  # a heap: low slots first, so that few are read
        self._used = np.zeros(slots, dtype=bool)
        self._trunk: list[_Entry] = []
        self._end = _Entry(-1, -1, -1, np.zeros(slots, dtype=bool))  # the last of the trunk

    def plan(self, text: list[int], paths: Sequence[tuple[int, ...]]) -> Plan:
        """What to read so that `text` and each path after it has been; the last token of each path is read anew."""
        self._follow(text)
        missing = text[len(self._trunk) :]
        if len(self._free) < len(missing) + sum(map(len, paths)):  # all that is not asked for makes room
            self._release(list(self._end.children.values()))
            self._end.children = {}
        new: list[_Entry] = []
        places: list[int] = []
        for path in paths:
            at = self._end
            tokens = [*missing, *path]
            for depth, token in enumerate(tokens, 1):
                child = at.children.get(token)
                if child is None:
                    child = self._add(at, token)
                    new.append(child)
                elif depth == len(tokens) and child not in new:
                    new.append(child)  # its logits are gone; the same slot is written again
                at = child
            assert at is not self._end, "the last token of the text is to be read: it may not be in the trunk yet"
            places.append(new.index(at))
        wanted = sorted(set(places))
        high = int(self._used.nonzero()[0][-1]) + 1
        return Plan(new, [wanted.index(place) for place in places], set(wanted), high)

    def _follow(self, text: list[int]) -> None:
        """Moves the trunk along the text, up to the token before its last."""
        shared = 0
        for entry, token in zip(self._trunk, text[:-1], strict=False):
            if entry.token != token:
                break
            shared += 1
        if shared < len(self._trunk):  # another text
            self._release(list(self._end.children.values()))
            for entry in self._trunk[shared:]:
                self._give_back(entry)
            del self._trunk[shared:]
            self._settle()
        while len(self._trunk) < len(text) - 1 and text[len(self._trunk)] in self._end.children:
            chosen = self._end.children.pop(text[len(self._trunk)])
            self._release(list(self._end.children.values()))
            self._trunk.append(chosen)
            self._end = chosen
        if self._trunk and len(self._trunk) == len(text) - 1:  # beside the last token nothing can come true any more
            dead = [child for token, child in self._end.children.items() if token != text[-1]]
            self._release(dead)
            self._end.children = {t: c for t, c in self._end.children.items() if t == text[-1]}

    def _settle(self) -> None:
        """The end of the trunk, after it was cut."""
        visible = np.zeros(self._slots, dtype=bool)
        visible[[entry.slot for entry in self._trunk]] = True
        last = self._trunk[-1] if self._trunk else None
        self._end = _Entry(last.token, last.slot, last.position, visible) if last else _Entry(-1, -1, -1, visible)

    def _add(self, parent: _Entry, token: int) -> _Entry:
        assert self._free, "more nodes than slots"
        slot = heapq.heappop(self._free)
        self._used[slot] = True
        visible = parent.visible.copy()
        visible[slot] = True
        child = parent.children[token] = _Entry(token, slot, parent.position + 1, visible)
        return child

    def _release(self, entries: list[_Entry]) -> None:
        while entries:
            entry = entries.pop()
            entries += entry.children.values()
            self._give_back(entry)

    def _give_back(self, entry: _Entry) -> None:
        self._used[entry.slot] = False
        heapq.heappush(self._free, entry.slot)
