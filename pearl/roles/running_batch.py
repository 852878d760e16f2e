"""The sequences under way, each in a slot of the caches."""

from __future__ import annotations

import bisect
from dataclasses import replace

from pearl.core.messages import DraftStats
from pearl.core.schedule import Schedule
from pearl.roles.sequence import SequenceRequest, SequenceState


class RunningBatch:
    """Knows who holds which slot. A sequence stays in `ended` until all its statistics are there."""

    def __init__(self) -> None:
        self.live: dict[int, SequenceState] = {}
        self.ended: dict[int, SequenceState] = {}
        self.last: SequenceState | None = None  # that was begun
        self._free: list[int] = []
        self._last_in: dict[int, SequenceState] = {}  # by slot, whether it is over or not
        self._count = 0

    def open(self, slots: int) -> None:
        """A new run; what earlier sequences have left in the slots is still there."""
        self.live, self.ended, self._free = {}, {}, list(range(slots))

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def admit(self, request: SequenceRequest, schedule: Schedule, now: float) -> tuple[SequenceState, int]:
        """Gives a request a slot: that of the sequence which it continues, if nobody else was there since. Returns also
        the number of that sequence, or 0."""
        after = request.after
        there = after and after.batch_slot in self._free and self._last_in.get(after.batch_slot) is after
        if after and not (there and after.passes and not after.error):  # of others not all may have been read
            after = None
        slot = self._free.pop(self._free.index(after.batch_slot) if after else 0)
        self._count += 1
        kept = replace(request, after=None)  # else a talk would keep all its turns
        sequence = self.last = SequenceState(self._count, kept, schedule, slot, now)
        if after:
            sequence.follow(after)
        self.live[sequence.sequence_id] = self._last_in[slot] = sequence
        return sequence, after.sequence_id if after else 0

    def end(self, sequence: SequenceState, now: float) -> None:
        """Its slot is free again."""
        sequence.ended = now
        self.ended[sequence.sequence_id] = self.live.pop(sequence.sequence_id)
        bisect.insort(self._free, sequence.batch_slot)

    def abandon(self) -> list[int]:
        """Nobody reads what is under way any more. Returns the numbers of those sequences."""
        numbers = list(self.live)
        self.ended |= self.live
        self.live = {}
        return numbers

    def take_stats(self, stats: DraftStats) -> None:
        if sequence := self.ended.get(stats.sequence_id):
            sequence.draft_stats = stats

    def without_stats(self) -> list[SequenceState]:
        return [sequence for sequence in self.ended.values() if not sequence.draft_stats]
