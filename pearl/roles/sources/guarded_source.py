"""A draft source that may fail: the sequences go on without it, and the run says so."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from pearl.core.messages import Features
from pearl.drafters.draft_source import DraftSource, counters
from pearl.machine.logs import FailureLog
from pearl.machine.timeline import Trace
from pearl.roles.batch_limit import BatchLimit
from pearl.roles.drafted_sequence import DraftedSequence
from pearl.wire.channel import Clock

_log = logging.getLogger(__name__)
Found = TypeVar("Found")


class GuardedSource:
    """Counts what its source does for each sequence; after a failure it is not asked for that sequence again."""

    def __init__(self, source: DraftSource, clock: Clock, trace: Trace):
        self._source, self._clock, self._trace = source, clock, trace
        self._limit = BatchLimit("draft")
        self._failures = FailureLog(_log)
        self.spans: deque[float] = deque(maxlen=2 * 64)  # of a sequence that is timed: see `Nodes`

    def begin(self, sequence: DraftedSequence, continues: bool) -> None:
        try:
            start = sequence.start
            self._source.begin(sequence.batch_slot, start.params, continues)
            if start.reference:
                self._source.expect(sequence.batch_slot, start.prompt, start.reference)
        except Exception:
            self._fail([sequence])

    def observe(self, sequence: DraftedSequence, features: Features) -> None:
        if not sequence.stats.failed:
            try:
                self._source.observe(features, sequence.batch_slot)
            except Exception:
                self._fail([sequence])

    def end(self, sequence: DraftedSequence) -> None:
        try:
            self._source.end(sequence.batch_slot)
        except Exception:
            self._fail([sequence])

    def ask(
        self, sequences: Sequence[DraftedSequence], draft: Callable[[Sequence[DraftedSequence]], list[Found]]
    ) -> dict[DraftedSequence, Found | None]:
        """What the source finds for each sequence; None where it raised."""
        if not sequences:
            return {}

        def counted(some: Sequence[DraftedSequence]) -> list[Found | None]:
            began, before = self._clock(), counters(self._source)
            try:
                found = draft(some)
                assert len(found) == len(some), "a source answers each query"
                return list(found)
            except torch.OutOfMemoryError:
                if len(some) > 1:
                    raise
                self._fail(some)
            except Exception:
                self._fail(some)
            finally:
                self._count(some, began, before)
            return [None] * len(some)

        return dict(zip(sequences, self._limit.run(sequences, counted), strict=True))

    def _count(self, sequences: Sequence[DraftedSequence], began: float, before: dict[str, int]) -> None:
        """A forward that several share counts once, for the first; its time in equal parts."""
        ended = self._clock()
        more = {name: now - before[name] for name, now in counters(self._source).items()}
        sequences[0].count(**more)
        if sequences[0].start.timed:
            self.spans += began, ended
        for sequence in sequences:
            each = (ended - began) / len(sequences)
            sequence.count(busy_s=each, overtaken_s=each if more["overtaken"] else 0.0)
            at = {"sequence": sequence.start.sequence_id, "position": sequence.trie.root.position}
            self._trace.span("draft", began, ended, rows=max(1, more["rows"]), **at)

    def _fail(self, sequences: Sequence[DraftedSequence]) -> None:
        self._failures.tell("the draft source failed; the target goes on alone there.")
        for sequence in sequences:
            sequence.stats = replace(sequence.stats, failed=True)
