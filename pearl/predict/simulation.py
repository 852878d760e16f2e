"""The two role loops in virtual time: what a run would take, had the models said what a script says.

Knows: scripts (what the drafter would guess at each place of a text, and how good that is), and what forwards and
messages cost. Refuses to know: where those figures come from, and how decoding works: `Target`, `Drafter` and
`TreeSource` are the real ones, over models without weights that let time pass, and so are schedule and controller.

Nothing sleeps and nothing is random. One side is not ahead of the other by more than it can't know: the drafter makes
a step only once the target has come to the time at which that step begins, so all that it may hear has been said.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pearl.config.synthetic import SyntheticDraft
from pearl.core import records
from pearl.core.messages import Message
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import Chain, DraftSource
from pearl.drafters.suffix import SuffixIndex
from pearl.drafters.synthetic import SyntheticSource
from pearl.drafters.tree import TreeSource
from pearl.machine.timeline import OFF, Trace
from pearl.models.draft_model import LeavesQuery
from pearl.models.kv_cache.draft_tree_cache import DraftTreeCache
from pearl.models.language_model import TREE_SLOTS, SideRow
from pearl.models.verifier import SequenceQuery
from pearl.predict.beside import ScriptedSource, SourceBeside
from pearl.predict.script import VOCABULARY, Script, Times, token
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.frames import size

LOOKED_UP = 8  # guesses of one search in the text
MATCH = 4  # tokens that an own guess of the drafter is taken to rest on


def simulate(
    schedule: Schedule,
    scripts: Sequence[Script],
    times: Times,
    own: float = 0.0,
    seed: int = 0,
    traces: tuple[Trace, Trace] = (OFF, OFF),
    synthetic: SyntheticDraft | None = None,
    beside: Sequence[SourceBeside] = (),
) -> list[records.GenerationStats]:
    """The records of a run over `scripts`, one after the other, by one target and one drafter.

    `own`: how often the drafter's own guesses, which its forwards carry along, are what its model says then; 0: it
    makes none. `traces`: of the target and of the drafter, in virtual seconds. `synthetic`: drafts in place of what the
    scripts say of the drafter. `beside`: sources in the target's process, as the scripts have them.
    """
    stage = _Stage(times, own, seed)
    wire = _TargetEnd(stage)
    source: DraftSource = _Lookup(stage)
    if synthetic:
        source = SyntheticSource(synthetic, seed, stage.draft)
    elif times.draft_s:
        source = TreeSource(_DraftReader(stage), times.draft_costs, _Own(stage))
    wire.drafter = Drafter(source, wire.peer, wire.peer.clock, traces[1])
    sources = [
        ScriptedSource(one, number, lambda: stage.script, lambda seconds: wire.work(seconds, times.crowding))
        for number, one in enumerate(beside)
    ]
    target = Target(_TargetReader(stage, wire), wire, wire.clock, traces[0], sources=sources)
    return [_text(target, wire, stage, schedule, script) for script in scripts]


def _text(
    target: Target, wire: _TargetEnd, stage: _Stage, schedule: Schedule, script: Script
) -> records.GenerationStats:
    params = SamplingParams(max_new_tokens=len(script.places))
    stopper = Stopper(params, (), lambda tokens: "")
    stage.begin(script)
    before = wire.bytes_sent + wire.peer.bytes_sent
    prompt = [token(position) for position in range(script.prompt)]
    for _ in target.decode(prompt, schedule, params, stopper, reference=tuple(script.tokens)):
        pass
    assert stopper.tokens == script.tokens, "a simulated text is the scripted one"
    assert not (target.draft_stats and target.draft_stats.failed), "a simulated source does not fail"
    return records.GenerationStats(
        mode=schedule.mode,
        prompt_tokens=script.prompt,
        tokens=tuple(stopper.tokens),
        text="",
        finish=stopper.finish or "",
        passes=tuple(target.passes),
        drafter=target.draft_stats,
        bytes_on_wire=wire.bytes_sent + wire.peer.bytes_sent - before,
        peak_memory=0,
    )


class _Stage:
    """What both sides play, the same for all who look at it."""

    def __init__(self, times: Times, own: float, seed: int):
        self.times, self.own = times, own
        self.drafter = _End(times.latency_s)
        self.target_works = False
        self._random = random.Random(seed)

    def begin(self, script: Script) -> None:
        self.script = script
        self.own_right = [self._random.random() < self.own for _ in script.places]

    def draft(self, seconds: float, crowding: float = 0.0) -> None:
        """Passes so many seconds of the drafter's own work. `crowding`: 0: as in `Times`."""
        self.drafter.now += seconds * ((crowding or self.times.crowding) if self.target_works else 1.0)

    def index(self, position: int) -> int:
        """The number of the place at a position of the text; beyond its end the last, as nothing is committed there."""
        return min(position - self.script.prompt, len(self.script.places) - 1)


class _End:
    """One side's clock and its end of the wire: what has been sent is there after the latency."""

    lost = closed_cleanly = False
    reason = ""
    bytes_received = 0

    def __init__(self, latency_s: float):
        self.now = 0.0
        self.inbox: deque[tuple[float, Message]] = deque()  # with the time of arrival
        self.peer = self
        self.bytes_sent = 0
        self._latency_s = latency_s

    def clock(self) -> float:
        return self.now

    def send(self, *messages: Message) -> None:
        self.bytes_sent += size(*messages)
        self.peer.inbox += [(self.now + self._latency_s, message) for message in messages]

    def receive(self) -> Message | None:
        return self.inbox.popleft()[1] if self.inbox and self.inbox[0][0] <= self.now else None

    def wait(self, timeout_s: float | None = None) -> None:
        raise AssertionError("the drafter is stepped, it never waits")

    def abort(self, reason: str) -> None: ...

    def close(self) -> None:
        pass


class _TargetEnd(_End):
    """The target's end, which lets the drafter catch up whenever it looks, waits or works."""

    drafter: Drafter

    def __init__(self, stage: _Stage):
        super().__init__(stage.times.latency_s)
        self._stage = stage
        self.peer = stage.drafter
        self.peer.peer = self
        self._idle = False  # the drafter has nothing to do until it hears something

    def receive(self) -> Message | None:
        while self._step(self.now):
            pass
        return super().receive()

    def wait(self, timeout_s: float | None = None) -> None:
        deadline = math.inf if timeout_s is None else self.now + timeout_s
        while not self.inbox and self._step(deadline):
            pass
        soonest = min(self.inbox[0][0] if self.inbox else math.inf, deadline)
        assert soonest < math.inf, "the target waits for a message that nobody will send"
        self.now = max(self.now, soonest)

    def work(self, seconds: float, crowding: float) -> None:
        """Passes so many seconds of the target's own work, `crowding` times as many while the drafter works."""
        self._stage.target_works = True
        left = seconds
        while left > 0:
            while self._step(self.now):
                pass
            drafting = self.peer.now > self.now
            pace = crowding if drafting else 1.0
            until = self.peer.now if drafting else self._next_word()
            if until - self.now >= left * pace:
                self.now += left * pace
                break
            left -= (until - self.now) / pace
            self.now = until
        self._stage.target_works = False

    def _next_word(self) -> float:
        """When the drafter, which has nothing to do, hears something."""
        return self.peer.inbox[0][0] if self.peer.inbox else math.inf

    def _step(self, until: float) -> bool:
        """Lets the drafter make one step, if it can begin it by `until`. Returns whether it did."""
        begins = max(self.peer.now, self._next_word()) if self._idle else self.peer.now
        if begins > until:
            return False
        self.peer.now = begins
        self._idle = not self.drafter.step()
        return True


class _TargetReader:
    """A `TargetModel` that says what the script says."""

    verifies_trees, max_sequences, batched_buckets, gives_features = True, 1, None, False

    def __init__(self, stage: _Stage, wire: _TargetEnd):
        self.buckets = stage.times.buckets
        self.max_length = 1 << 20
        self._stage, self._wire = stage, wire
        self._fresh = True

    def forget(self, but: Sequence[int] = (), batch_slot: int = 0) -> int:
        self._fresh = True
        return 0

    def restore(self, tokens: Sequence[int], batch_slot: int = 0) -> int:
        return 0

    def read(self, tokens: Sequence[int], keep: int, side_rows: Sequence[SideRow] = (), batch_slot: int = 0) -> Tensor:
        stage, times = self._stage, self._stage.times
        rows = keep + len(side_rows)
        if self._fresh:
            self._wire.work(stage.script.prefill_s, times.prompt_crowding)
        else:
            paths = times.path_s * _paths(keep, [parent for parent, _ in side_rows])
            self._wire.work(times.pass_s[self.buckets.pad(rows) - 1] + paths, times.crowding)
        self._fresh = False
        positions = list(range(len(tokens) - keep, len(tokens)))
        for parent, _ in side_rows:
            positions.append(positions[parent] + 1)
        logits = torch.zeros(rows, VOCABULARY)
        logits[range(rows), [token(position + 1) for position in positions]] = 1.0
        return logits

    def read_together(self, queries: Sequence[SequenceQuery]) -> list[Tensor]:
        return [self.read(one.tokens, one.keep, one.side_rows) for one in queries]

    def prepare(self, query: SequenceQuery) -> None:
        return None

    def features(self, rows: Sequence[int], batch_slot: int = 0) -> None:
        return None


def _paths(chain: int, parents: Sequence[int]) -> int:
    """How many paths the side rows beside a chain make; see `trie.path_numbers`."""
    ends = set[int]()
    for row, parent in enumerate(parents, chain):
        ends = {*(ends - {parent}), row}
    return len(ends)


class _DraftReader:
    """A drafter's model. It counts the rows that a forward reads, as the real one would, and says what the script says
    of their places."""

    max_sequences = 1
    overtaken: Callable[[], bool] | None = None  # never asked: what would overtake it is yet to come

    def __init__(self, stage: _Stage):
        self.max_length = 1 << 20
        self._stage = stage
        self.forget(batch_slot=0)

    def forget(self, *, batch_slot: int) -> None:
        self._cached: list[int] = []
        self._leaves: DraftTreeCache | None = None

    def read(self, tokens: Sequence[int], keep: int) -> Tensor:
        assert keep == 1, "a chain is drafted one token after the other"
        tokens = list(tokens)
        known = min(len(self._cached), len(tokens))
        while self._cached[:known] != tokens[:known]:  # they part near their ends
            known -= 1
        self._work(max(1, len(tokens) - known), fresh=not self._cached)
        self._cached = tokens
        return self._after([len(tokens)])

    def read_leaves_together(self, queries: Sequence[LeavesQuery]) -> list[Tensor]:
        return [self._read_leaves(one.tokens, one.paths) for one in queries]

    def end(self, *, batch_slot: int) -> None:
        """A simulated text is never gone on with."""

    def _read_leaves(self, text: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Tensor:
        fresh, script = self._leaves is None, self._stage.script
        self._leaves = self._leaves or DraftTreeCache(script.prompt + len(script.places) + TREE_SLOTS)
        self._work(len(self._leaves.plan(list(text), paths).nodes), fresh)
        return self._after([len(text) + len(path) for path in paths])

    def _after(self, positions: Sequence[int]) -> Tensor:
        return self._stage.script.drafted[[self._stage.index(position) for position in positions]]

    def _work(self, rows: int, fresh: bool) -> None:
        stage, times = self._stage, self._stage.times
        if fresh:
            stage.draft(stage.script.draft_prefill_s, times.prompt_crowding)
        else:
            stage.draft(times.draft(rows))


class _Lookup(DraftSource):
    """A source without a model: at some places it knows, at once, a few tokens that may follow."""

    def __init__(self, stage: _Stage):
        self._stage = stage

    def propose(self, text: Sequence[int], room: int) -> Chain:
        return [(guess, ()) for guess in self._found(len(text), min(room, LOOKED_UP))]

    def _found(self, first: int, most: int) -> Iterator[int]:
        script = self._stage.script
        for position in range(first, min(first + most, script.prompt + len(script.places))):
            place = script.places[position - script.prompt]
            if place is None:
                return
            yield token(position, place.choice(0))


class _Own(SuffixIndex):
    """The drafter's own guesses: right, in its model's opinion, as often as the script has it."""

    def __init__(self, stage: _Stage):
        super().__init__()
        self._stage = stage

    def begin(self, batch_slot: int, prediction: Sequence[int] = ()) -> None:
        pass

    def place(self, batch_slot: int, tokens: Sequence[int], path: Sequence[int] = ()) -> Any:
        """The position, and how many guesses may follow."""
        return len(tokens) + len(path), MATCH if self._stage.own else 0

    def next(self, spot: Any) -> tuple[int, int, Any] | None:
        position, left = spot
        return (self._guess(position), MATCH, (position + 1, left - 1)) if left else None

    def _guess(self, position: int) -> int:
        index = self._stage.index(position)
        place = self._stage.script.places[index]
        right = place is not None and self._stage.own_right[index]
        return token(position, place.choice(0) if place and right else VOCABULARY - 1)
