"""The target's channel to a drafter that may be late, stuck, garbled or gone, and that may come back.

The target never waits for the drafter itself but for this channel, and takes its word when it says *lost*: then it goes
on alone. Lost is what does not answer now, for whatever reason:

    late    nothing came for one pass and `deadline_s` more while the target waited. Not waited for again until it is
            heard again; it has all messages and catches up by itself
    gone    the connection is closed, silent for too long, or carries what no drafter says. A new one is reached for in
            a thread of its own, with growing pauses, a few times; then the texts under way are told anew

A drafter that begins anew is told the texts under way (`replay_log`), and its node ids are made unique
(`drafter_messages`).

Knows: which connection serves, and when it is lost. Refuses to know: processes, groups, models.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pearl.config.engine_config import DEADLINE_S
from pearl.core.messages import DraftStats, End, Message, Start, Verdict
from pearl.errors import UsageError
from pearl.wire.channel import Channel, Clock
from pearl.wire.drafter_messages import fault, offset_ids
from pearl.wire.replay_log import ReplayLog

_log = logging.getLogger(__name__)
BACK_OFF_S = 0.25  # before the first new connection; four times as long before each further one, up to 16 s
_REMEMBERED = 1000  # events
_LAST_ATTEMPT_S = 30.0  # that an attempt which nobody wants any more may take to notice: all its waits are shorter


Reach = Callable[[int], Channel]  # makes connection number n, from 0 on. Raises `Unreachable`, or `UsageError` for good
Run = Callable[[Callable[[], None]], None]  # sets something going beside the caller


@dataclass(frozen=True)
class DrafterEvent:
    """Something that happened to the drafter, `at_s` seconds after the channel was made."""

    at_s: float
    kind: str  # late, heard; failed; lost, back, alone
    what: str


class WaitLimit:
    """How long the target may wait for a drafter: one usual pass, and `deadline_s` more."""

    def __init__(self, deadline_s: float, now: float):
        self._deadline_s, self._since = deadline_s, now  # when the target's last pass began
        self._passes: deque[float] = deque(maxlen=5)  # seconds of the last ones
        self._longest = 0.0  # of those of the texts under way; the first reads the prompt

    def begin(self) -> None:
        """The first of some texts starts."""
        self._longest = 0.0

    def said(self, messages: Sequence[Message], now: float) -> None:
        """The target says `messages`; a verdict or an end among them closes a pass."""
        if any(isinstance(message, Verdict | End) for message in messages):
            self._passes.append(now - self._since)
            self._longest = max(self._longest, now - self._since)
        self._since = now

    def waited(self, now: float) -> None:
        self._since = now

    def seconds(self, under_way: bool) -> float:
        """`under_way`: there are texts. While a report is awaited after the last one, the pass may be the one that read
        its prompt."""
        usual = sorted(self._passes)[(len(self._passes) - 1) // 2] if self._passes else 0.0
        return (usual if under_way else max(usual, self._longest)) + self._deadline_s


class ReconnectingChannel:
    """A `Channel`. Its methods are for the target's thread alone; connections are made beside it."""

    def __init__(
        self,
        reach: Reach,
        vocabulary: int,
        deadline_s: float = DEADLINE_S,
        restarts: int = 3,
        clock: Clock = time.perf_counter,
        run: Run | None = None,
        tell: Callable[[str], None] | None = None,
        give_up: Callable[[], None] = lambda: None,
    ):
        """`vocabulary`: the tokens that a drafter may guess. `restarts`: connections after the first at most. `run`
        and `tell` are by default a thread and a warning. `give_up` is called when no drafter will be
        reached for any more, beside the target."""
        self._reach, self._vocabulary, self._restarts, self._clock = reach, vocabulary, restarts, clock
        self._run, self._tell, self._give_up = run or _beside, tell or _log.warning, give_up
        self._link: Channel | None = None
        self._number = -1  # of the connection
        self._inbox: deque[Message] = deque()
        self._late = False
        self._log = ReplayLog()
        self._began = clock()
        self._limit = WaitLimit(deadline_s, self._began)
        self._sent = self._received = 0  # bytes, by connections that are gone
        self._told: set[str] = set()
        self.events: list[DrafterEvent] = []
        self.closed_cleanly, self.reason = False, ""
        # what the other thread makes, for this one to find
        self._new: deque[tuple[int, Channel]] = deque()
        self._happened: deque[tuple[str, str]] = deque()
        self._refusal: UsageError | None = None
        self._settled = threading.Event()  # the first attempt is over
        self._closing = threading.Event()
        self._run(lambda: self._connect(0, None))

    # As the target sees it

    @property
    def lost(self) -> bool:
        self._poll()
        return not self._inbox and (self._link is None or self._late)

    @property
    def bytes_sent(self) -> int:
        return self._sent + (self._link.bytes_sent if self._link else 0)

    @property
    def bytes_received(self) -> int:
        return self._received + (self._link.bytes_received if self._link else 0)

    def send(self, *messages: Message) -> None:
        self._poll()
        now = self._clock()
        for message in messages:
            self._log.said(message)
            if isinstance(message, Start) and len(self._log) == 1:
                self._limit.begin()
        self._limit.said(messages, now)
        if self._link:
            self._link.send(*messages)

    def receive(self) -> Message | None:
        self._poll()
        return self._inbox.popleft() if self._inbox else None

    def wait(self, timeout_s: float | None = None) -> None:
        """As long as the target may be kept waiting, at most; after that the drafter is late."""
        began, allowed = self._clock(), self._limit.seconds(len(self._log) > 0)
        limit = allowed if timeout_s is None else min(timeout_s, allowed)
        while True:
            self._poll()
            if self._inbox or self._late or not self._link:
                break
            left = began + limit - self._clock()
            if left <= 0:
                if limit == allowed:
                    self._late = True
                    self._event("late", f"the drafter has said nothing for {allowed:.2f} s; it is not waited for")
                break
            self._link.wait(left)
        self._limit.waited(self._clock())

    def abort(self, reason: str) -> None:
        if self._link:
            self._link.abort(reason)

    def close(self) -> None:
        """Ends all attempts to reach the drafter, and says goodbye."""
        self._closing.set()
        for link in (self._link, *(link for _, link in self._new)):
            if link:
                link.close()
                self.closed_cleanly = link.closed_cleanly
        self._link = None
        self._new.clear()

    # As the engine sees it

    def settle(self) -> None:
        """Waits until the drafter is there or has failed to start. Raises `UsageError` if it never can."""
        self._settled.wait()
        if self._refusal:
            raise self._refusal
        self._poll()

    def history(self) -> list[DrafterEvent]:
        """What has happened so far."""
        self._poll()
        return list(self.events)

    # Inside, in the target's thread

    def _poll(self) -> None:
        """Takes what has arrived, and notices what has become of the connection."""
        self._drain_events()
        if not self._link and self._new:
            self._number, self._link = self._new.popleft()
            self._late = False
            for messages in self._log.again():
                self._link.send(*messages)
            if self._number:
                self._event("back", "the drafter is back")
        if self._link:
            self._take(self._link)
        if self._link and self._link.lost:
            self._lose(self._link.reason or "the connection was closed")
            self._drain_events()

    def _drain_events(self) -> None:
        while self._happened:
            self._event(*self._happened.popleft())

    def _take(self, link: Channel) -> None:
        while self._link is link and (message := link.receive()) is not None:
            if wrong := fault(message, self._vocabulary, self._log.roots(message.sequence_id)):
                self._lose(f"it sent what no drafter says: {wrong}")
                return
            if not self._log.heard(message):
                continue  # of a text that is over
            if isinstance(message, DraftStats) and message.failed:
                self._event("failed", "the draft source failed in a text, which the target wrote alone")
            if self._late:
                self._late = False
                self._event("heard", "the drafter is heard again")
            self._inbox.append(offset_ids(message, self._number))

    def _lose(self, reason: str) -> None:
        link, self._link, self._late = self._link, None, False
        assert link, "only a connection can be lost"
        self._sent += link.bytes_sent
        self._received += link.bytes_received
        self._event("lost", f"the drafter is lost ({reason}); the target goes on alone")
        number = self._number + 1
        if not self._closing.is_set():
            self._run(lambda: self._connect(number, link))

    def _event(self, kind: str, what: str) -> None:
        """Each is kept and said; of those that may come often only the first are kept, and one is said."""
        often = kind in ("late", "heard", "failed")  # of the others there are as many as restarts
        if not often or len(self.events) < _REMEMBERED:
            self.events.append(DrafterEvent(round(self._clock() - self._began, 3), kind, what))
        if kind not in self._told:
            self._tell(f"{what}.")
        if often:
            self._told.add(kind)

    # Beside it

    def _connect(self, number: int, dead: Channel | None) -> None:
        """Makes connection `number`, or a later one; leaves it, or the news that there is none, to the target."""
        if dead:
            dead.abort("it is lost")  # not by a goodbye, after which a launcher's drafter would not come again
            dead.close()
        while number <= self._restarts:
            if number and self._closing.wait(BACK_OFF_S * 4.0 ** min(number - 1, 3)):
                break
            try:
                self._new.append((number, self._reach(number)))
                if self._closing.is_set():  # too late to be wanted
                    self._new.pop()[1].close()
                break
            except UsageError as error:
                self._refusal = error
                number = self._restarts
                self._happened.append(("lost", f"the drafter can't start ({error})"))
            except Exception as error:  # `Unreachable`, or what nobody has foreseen: it is tried again all the same
                self._happened.append(("lost", f"the drafter could not be reached ({error}); the target goes on alone"))
            number += 1
            self._settled.set()
        else:
            self._give_up()
            self._happened.append(("alone", "the drafter is not started again; the target goes on alone to the end"))
        self._settled.set()


_attempts: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _beside(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, name="pearl-reach", daemon=True)
    _attempts.add(thread)
    thread.start()


@atexit.register  # at import, so that it comes after those who close their channels at the end of the program
def _await_attempts() -> None:
    """A thread that is in a process group's hands when the interpreter ends would abort the program."""
    for thread in list(_attempts):
        thread.join(_LAST_ATTEMPT_S)
