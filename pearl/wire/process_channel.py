"""The channel between two processes: messages, signs of life and a goodbye over one connection.

A thread of its own receives and hands over through a deque and an event. Another one sends a beat now and then, so that
silence means something: a side that hears nothing for `silence_s` takes the other one for dead, as if it had closed the
connection. That thread also lets go of what has left, so `send` never waits.

Knows: when the other side counts as gone, and which features go beside the messages. Refuses to know: groups and frames
(`connection`), and what a message is for.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch.distributed as dist

from pearl.config.engine_config import SILENCE_S
from pearl.config.inputs import brief
from pearl.core.messages import Beat, Close, MalformedMessage, Message, Nodes, SentSeparately, Verdict
from pearl.machine.device_features import DeviceFeatures
from pearl.wire.channel import Clock
from pearl.wire.codec import length, pack, unpack
from pearl.wire.connection import FrameConnection
from pearl.wire.feature_transport import FeatureTransport
from pearl.wire.frames import FEATURES, MESSAGES, bits_of, count_words, frame_bytes, words_of
from pearl.wire.peer_clock import PeerClock

_BEATS = 5  # in the time of a silence
_FIRST_BEAT_S = 0.05  # the pause before the first one, doubled until it is the usual: clocks are compared early
_GOODBYE_S = 2.0  # that an answer to a goodbye is waited for
_open: weakref.WeakSet[ProcessChannel] = weakref.WeakSet()


@atexit.register  # at import, so that it comes after those who close their channels at the end of the program
def _end_open_channels() -> None:
    """No thread may be in gloo's hands when the interpreter ends: it could not come back."""
    for channel in list(_open):
        channel._end_threads()


os.register_at_fork(after_in_child=_open.clear)  # they are the parent's, and so is what gloo knows of them


class ProcessChannel:
    """One end of the pair of ranks (0 target, 1 drafter).

    `silence_s`: how long waiting for any message or beat may take. `host`: see `gloo_group`. `name`: both ends give the
    same; a new connection over the same store needs a new one. `transport`: for features that lie on a device, which
    goes with the connection. `clock`: this side's, which the other one's is compared with. Raises RuntimeError if the
    other rank does not come.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        host: str | None = None,
        silence_s: float = SILENCE_S,
        name: str = "pearl",
        transport: FeatureTransport | None = None,
        clock: Clock = time.perf_counter,
    ):
        self._silence_s, self._transport = silence_s, transport
        self._connection = FrameConnection(dist.PrefixStore(name, store), rank, host)
        self._store = store  # rank 0 serves it: it must live as long as the drafter
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()  # None: it is over
        self._next: Message | None = None  # out of the inbox, and not received yet
        self._gone, self.peer_clock = threading.Event(), PeerClock(clock)
        self.closed_cleanly, self.reason = False, ""
        self.bytes_sent = self.bytes_received = 0
        self._receiver = threading.Thread(target=self._receive_all, name="pearl-receiver", daemon=True)
        self._receiver.start()
        self._heartbeat = threading.Thread(target=self._send_beats, name="pearl-heartbeat", daemon=True)
        self._heartbeat.start()
        _open.add(self)

    @property
    def lost(self) -> bool:
        return self._gone.is_set() and not self._peek()

    def send(self, *messages: Message) -> None:
        self.bytes_sent += self._send(*messages)

    def receive(self) -> Message | None:
        message, self._next = self._next or self._peek(), None
        return message

    def wait(self, timeout_s: float | None = None) -> None:
        if self._peek() is None and not self._gone.is_set():
            with contextlib.suppress(Empty):
                self._next = self._inbox.get(timeout=None if timeout_s is None else max(timeout_s, 0.0))

    def _peek(self) -> Message | None:
        """The next message, which stays."""
        while self._next is None and not self._inbox.empty():
            self._next = self._inbox.get_nowait()
        return self._next

    def close(self, patience_s: float = _GOODBYE_S) -> None:
        """Says goodbye; the other side answers likewise, which ends both receivers. One that is in a long forward finds
        the goodbye later."""
        deadline = time.perf_counter() + patience_s
        self._send(Close())
        self._receiver.join(patience_s)
        if self.closed_cleanly:  # our goodbye leaves before the connection ends
            self._heartbeat.join(patience_s)
            if not self._heartbeat.is_alive():
                with contextlib.suppress(OSError):
                    self._connection.release(deadline - time.perf_counter())
        self._lose("closed here")
        self._end_threads()
        _open.discard(self)
        self._connection.close()

    def _end_threads(self) -> None:
        self._lose("the program ends")
        for thread in (self._receiver, self._heartbeat):
            thread.join(_GOODBYE_S)

    def abort(self, reason: str) -> None:
        """Ends the connection for both sides, from any thread, without a goodbye."""
        self._lose(reason)

    def _send(self, *messages: Message) -> int:
        """Bytes. After the other side's goodbye only our own still goes out."""
        if self._gone.is_set() and not isinstance(messages[0], Close):
            return 0
        try:
            beside = 0
            if any(isinstance(message, Verdict) and message.features is not None for message in messages):
                messages = tuple(map(self._handed_over, messages))
                beside = sum(map(self._send_features, messages))
            return beside + self._connection.send(pack(messages))
        except (OSError, RuntimeError) as error:
            self._lose(_why(error, "sent"))
        return 0

    def _send_beats(self) -> None:
        """Beats, where nothing much is under way, and lets go of what has left."""
        hurry, usual = self._connection.hurry, self._silence_s / _BEATS
        pause = min(_FIRST_BEAT_S, usual)
        try:
            while not self._gone.is_set():
                if not hurry.wait(pause):
                    self._send(self.peer_clock.beat())
                    pause = min(2 * pause, usual)
                hurry.clear()
                self._connection.release(2 * self._silence_s)  # the receiver finds out earlier what silence is
                if self._transport:
                    self._transport.release(2 * self._silence_s)
        except (OSError, RuntimeError) as error:
            self._lose(_why(error, "sent"))

    def _receive_all(self) -> None:
        try:
            while True:
                words = self._connection.receive(self._silence_s)
                if (count := length(words)) > len(words):
                    words = self._connection.receive_words(count, self._silence_s, MESSAGES, words)
                messages = unpack(words[:count])
                if isinstance(messages[-1], Close):
                    self.closed_cleanly = True
                    self._end("goodbye")  # and the connection stays, for the answer
                    return
                if isinstance(messages[0], Beat):
                    self.peer_clock.hear(messages[0])
                    continue
                self.bytes_received += frame_bytes(count)
                for message in messages:
                    self._inbox.put(self._completed(message))
        except (MalformedMessage, MemoryError, OSError, RuntimeError) as error:
            self._lose(_why(error, "received"))

    def _handed_over(self, message: Message) -> Message:
        """Features that lie on a device, for which there is no transport, go through the host."""
        if self._transport or not isinstance(message, Verdict) or not isinstance(message.features, DeviceFeatures):
            return message
        return replace(message, features=message.features.bits())

    def _send_features(self, message: Message) -> int:
        """Bytes. The message itself only says how many rows they are, and which way they come."""
        if not isinstance(message, Verdict) or message.features is None:
            return 0
        if isinstance(message.features, np.ndarray):
            return self._connection.send(words_of(message.features), FEATURES)
        if self._transport and isinstance(message.features, DeviceFeatures):
            self._transport.send(message.features.rows)
            return message.features.nbytes
        return 0

    def _completed(self, message: Message) -> Message:
        """With what came another way, and times by the clock of this side."""
        if isinstance(message, Nodes) and message.spans and (ahead_s := self.peer_clock.ahead_s()):
            return replace(message, spans=tuple(moment - ahead_s for moment in message.spans))
        return self._with_features(message) if isinstance(message, Verdict) else message

    def _with_features(self, message: Verdict) -> Verdict:
        if not isinstance(message.features, SentSeparately):
            return message
        shape = message.features.shape
        if message.features.direct:
            if self._transport is None:
                raise MalformedMessage("features on a way that there is not")
            features: Any = self._transport.receive(*shape)
            self.bytes_received += features.nbytes
        else:
            words = self._connection.receive_words(count_words(shape), self._silence_s, FEATURES)
            features = bits_of(words, shape)
            self.bytes_received += frame_bytes(len(words), FEATURES)
        return replace(message, features=features)

    def _end(self, reason: str) -> None:
        if not self._gone.is_set():
            self.reason = reason
        self._gone.set()
        self._inbox.put(None)
        self._connection.hurry.set()

    def _lose(self, reason: str) -> None:
        self._end(reason)
        self._connection.shut()
        if self._transport:
            self._transport.close()


def _why(error: Exception, features: str) -> str:
    """`features`: what should have become of some where it is no error of the connection."""
    if isinstance(error, MalformedMessage):
        return f"it sent what can't be read: {error}"
    if isinstance(error, MemoryError):
        return "it sent a message that memory does not suffice for"
    if isinstance(error, TimeoutError):
        return "it was silent for too long"
    if isinstance(error, OSError):
        return "the connection was closed"
    return f"features could not be {features}: {brief(error, 120)}"
