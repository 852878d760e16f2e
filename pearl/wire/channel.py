"""Carrying messages between the two sides, in order, without ever making a loop wait that does not want to.

`Channel` is what the role loops see. Here is the one that stays in a process; `process_channel` has the one between
two, `reconnecting_channel` the target's to a drafter that may be lost, and the tests one that delays what it may.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from pearl.core.messages import Message
from pearl.wire.frames import size

Clock = Callable[[], float]  # seconds since some moment: the computer's own, or a simulation's


class Channel(Protocol):
    """One end."""

    closed_cleanly: bool  # the other side has said goodbye
    reason: str  # why the other side is gone; empty while it is there

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_received(self) -> int: ...

    @property
    def lost(self) -> bool:
        """Nothing is to be waited for: the other side is gone, or late, and nothing it sent is left to receive."""

    def send(self, *messages: Message) -> None:
        """They travel together. Never waits for the other side."""

    def receive(self) -> Message | None:
        """The next message that has arrived, in the order of sending, or None. Never waits."""

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when a message is there, the other side is lost, or the time is over."""

    def abort(self, reason: str) -> None:
        """Ends it for both sides without a goodbye: the other side may come again."""

    def close(self) -> None:
        """Says goodbye, if the other side is there."""


class LocalChannel:
    """Two ends in one process. An end that waits lets the other side work instead: `peer_step` is one step of it."""

    def __init__(self, inbox: deque[Message], outbox: deque[Message]):
        self._inbox, self._outbox = inbox, outbox
        self.peer_step: Callable[[], bool] = lambda: False
        self.bytes_sent = 0
        self._peer = self
        self.closed_cleanly, self.reason = False, ""

    @classmethod
    def pair(cls) -> tuple[LocalChannel, LocalChannel]:
        """The first end is of this class."""
        there: deque[Message] = deque()
        back: deque[Message] = deque()
        one, other = cls(back, there), LocalChannel(there, back)
        one._peer, other._peer = other, one
        return one, other

    @property
    def bytes_received(self) -> int:
        return self._peer.bytes_sent

    @property
    def lost(self) -> bool:
        return False

    def send(self, *messages: Message) -> None:
        self.bytes_sent += size(*messages)  # what it would be on the wire
        self._outbox += messages

    def receive(self) -> Message | None:
        return self._inbox.popleft() if self._inbox else None

    def wait(self, timeout_s: float | None = None) -> None:
        while not self._inbox and self.peer_step():
            pass

    def abort(self, reason: str) -> None:
        self._inbox.clear()

    def close(self) -> None:
        self._inbox.clear()
        self.closed_cleanly = True
