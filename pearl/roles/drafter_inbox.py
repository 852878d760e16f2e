"""What the drafter sends, at the target: taken as it comes, and waited for only where that is asked for or pays."""

from __future__ import annotations

from collections.abc import Callable

from pearl.core.control.controller import Controller
from pearl.core.messages import Costs, DraftStats, Nodes
from pearl.core.schedule import Schedule
from pearl.machine.timeline import Trace, flow_id
from pearl.roles.running_batch import RunningBatch
from pearl.roles.sequence import SequenceState
from pearl.roles.watcher import Watcher
from pearl.wire.channel import Channel, Clock
from pearl.wire.drafter_messages import given

STATS_TIMEOUT_S = 60.0  # for the drafter's statistics after the last sequence; it may be in a forward
STATS_PATIENCE_S = 0.5  # for them while others are under way: nobody's finished text waits for a drafter that is busy


class DrafterInbox:
    """`channel`: to the drafter, None while the schedule has none."""

    def __init__(
        self, batch: RunningBatch, take_costs: Callable[[tuple[float, ...]], None], clock: Clock, trace: Trace
    ):
        self._batch, self._take_costs, self._clock, self._trace = batch, take_costs, clock, trace
        self.channel: Channel | None = None
        self.watcher: Watcher | None = None

    def take(self) -> None:
        """Takes what has arrived. What is about a sequence that has ended falls away, but for its statistics."""
        while self.channel and (message := self.channel.receive()) is not None:
            match message:
                case Costs():
                    self._take_costs(message.seconds)
                case Nodes() if message.sequence_id in self._batch.live:
                    if message.guesses:
                        connection, id = given(message.guesses[0].id)
                        first = flow_id(message.sequence_id, id, connection)
                        self._trace.flow("nodes", first, self._clock(), sent=False)
                    self._batch.live[message.sequence_id].add_nodes(message)
                    if watcher := self.watcher:  # another thread may take it away
                        watcher.drafted(message, self._clock())
                case DraftStats():
                    self._batch.take_stats(message)

    def await_guesses(
        self, sequences: list[SequenceState], schedule: Schedule, controller: Controller, patient: bool
    ) -> list[SequenceState]:
        """Takes what has arrived, and waits for as many guesses as the schedule asks for: until one of the sequences
        has them, and if `patient` is false not at all. Returns the sequences that are ready.

        Where it asks for none, waiting for the first one may still pay: the controller says for how long.
        """
        wanted = {one: schedule.guesses_to_wait_for(one.hit, controller.gamma) for one in sequences}
        there, began = {one: one.depth() for one in sequences}, self._clock()
        ready = self._ready(wanted)
        while patient and not ready:
            self._wait()
            ready = self._ready(wanted)
        waited_for = [one for one in ready if wanted[one]]
        if gained := sum(one.depth() - there[one] for one in waited_for):
            controller.record_drafting(gained / len(waited_for), self._clock() - began)
        for one in ready:
            one.wait_budget_s = 0.0
        lacking = [one for one in ready if not (wanted[one] or there[one] or one.exhausted)]
        if patient and lacking and (budget := controller.take_wait_budget(len(lacking))):
            self._await_first(lacking, controller, budget)
        return ready

    def _await_first(self, lacking: list[SequenceState], controller: Controller, budget_s: float) -> None:
        """Waits so long for a first guess of each."""
        for one in lacking:
            one.wait_budget_s = budget_s
        began = self._clock()
        deadline = began + budget_s
        while (left := deadline - self._clock()) > 0 and len(self._ready(dict.fromkeys(lacking, 1))) < len(lacking):
            self._wait(left)
        came = any(one.depth() > 0 or one.exhausted for one in lacking)
        controller.record_wait(came, self._clock() - began)

    def _ready(self, wanted: dict[SequenceState, int]) -> list[SequenceState]:
        """Those of which so many guesses are there, or none can be expected: the drafter is exhausted or lost."""
        assert self.channel, "nothing to wait for without a drafter"
        return [one for one, guesses in wanted.items() if one.depth() >= guesses or one.exhausted or self.channel.lost]

    def _wait(self, timeout_s: float | None = None) -> None:
        assert self.channel, "nothing to wait for without a drafter"
        self.channel.wait(timeout_s)
        self.take()

    def pop_finished(self) -> list[SequenceState]:
        """The sequences that have ended and whose statistics are there, or are not waited for any longer; they are
        forgotten here."""
        hopeless, long_ago = not self.channel or self.channel.lost, self._clock() - STATS_PATIENCE_S
        over = [one for one in self._batch.ended.values() if one.draft_stats or hopeless or one.ended < long_ago]
        for one in over:
            del self._batch.ended[one.sequence_id]
        return over

    def await_stats(self) -> None:
        """Waits for the drafter's statistics; outside all timing. Whose do not come does without."""
        deadline = self._clock() + STATS_TIMEOUT_S
        while self.channel and self._batch.without_stats() and not self.channel.lost:
            if (left := deadline - self._clock()) <= 0:
                break
            self._wait(left)
