"""The channel between two processes: messages, signs of life and a goodbye over one connection.

A thread of its own receives and hands over through a deque and an event. Another one sends a beat now and then, so that
silence means something: a side that hears nothing for `silence_s` takes the other one for dead, as if it had closed the
connection. That thread also sends what the system would not take at once, so `send` never waits.

Knows: when the other side counts as gone, and which features go beside the messages. Refuses to know: sockets (`tcp`),
and what a message is for.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from pearl.config.engine_config import SILENCE_S
from pearl.config.inputs import brief
from pearl.core.features import DeviceFeatures
from pearl.core.messages import Beat, Close, Garbage, Message, SentSeparately, Verdict
from pearl.wire.codec import FRAME, length, pack, unpack
from pearl.wire.feature_transport import FeatureTransport
from pearl.wire.tcp import WORD, TcpConnection

_BEATS = 5  # in the time of a silence
_GOODBYE_S = 2.0  # that an answer to a goodbye is waited for
_SWITCH_S = 0.0005  # after which a thread lets others run: the receiver gets its turn soon after a message comes


class ProcessChannel:
    """One end of the pair of ranks (0 target, 1 drafter).

    `silence_s`: how long waiting for any message or beat may take. `host`: see `TcpConnection`. `name`: both ends give
    the same; a new connection over the same store needs a new one. `transport`: for features that lie on a device,
    which goes with the connection. Raises RuntimeError if the other rank does not come.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        host: str | None = None,
        silence_s: float = SILENCE_S,
        name: str = "pearl",
        transport: FeatureTransport | None = None,
    ):
        self._silence_s, self._transport = silence_s, transport
        self._connection = TcpConnection(store, rank, host, f"{name}/address")
        self._store = store  # rank 0 serves it: it must live as long as the drafter
        self._inbox: deque[Message] = deque()
        self._arrived = threading.Event()
        self._gone = threading.Event()
        self.closed_cleanly, self.reason = False, ""
        self.bytes_sent = self.bytes_received = 0
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._receiver = threading.Thread(target=self._receive_all, name="pearl-receiver", daemon=True)
        self._receiver.start()
        self._heartbeat = threading.Thread(target=self._send_beats, name="pearl-heartbeat", daemon=True)
        self._heartbeat.start()

    @property
    def lost(self) -> bool:
        return self._gone.is_set() and not self._inbox

    def send(self, *messages: Message) -> None:
        try:
            ready = [self._handed_over(message) for message in messages]
        except RuntimeError as error:
            self._lose(f"features could not be sent: {brief(error, 120)}")
            return
        self.bytes_sent += self._send(*ready)

    def receive(self) -> Message | None:
        return self._inbox.popleft() if self._inbox else None

    def wait(self, timeout_s: float | None = None) -> None:
        deadline = None if timeout_s is None else time.perf_counter() + timeout_s
        while not self._inbox and not self._gone.is_set():
            self._arrived.clear()
            if self._inbox or self._gone.is_set():  # it came between the test and the clear
                return
            left = None if deadline is None else deadline - time.perf_counter()
            if left is not None and left <= 0:
                return
            self._arrived.wait(left)

    def close(self, patience_s: float = _GOODBYE_S) -> None:
        """Says goodbye; the other side answers likewise, which ends both receivers. One that is in a long forward finds
        the goodbye later."""
        self._send(Close())
        self._receiver.join(patience_s)
        self._lose("closed here")
        self._receiver.join(patience_s)
        self._heartbeat.join(patience_s)
        self._connection.close()
        sys.setswitchinterval(self._switch_s)

    def _send(self, *messages: Message) -> int:
        """Bytes. After the other side's goodbye only our own still goes out."""
        if self._gone.is_set() and not isinstance(messages[0], Close):
            return 0
        words = pack(messages)
        try:
            self._connection.send(words)
        except OSError as error:
            self._lose(_why(error))
            return 0
        return words.nbytes

    def _send_beats(self) -> None:
        """Sends what is left, and a beat where nothing is."""
        try:
            while not self._gone.is_set():
                if self._connection.more.wait(self._silence_s / _BEATS):
                    self._connection.send_rest(self._silence_s)
                else:
                    self._send(Beat())
        except (OSError, ValueError) as error:  # ValueError: the socket is closed
            self._lose(_why(error))

    def _receive_all(self) -> None:
        read = self._connection.read_exact
        try:
            while True:
                frame = read(FRAME, self._silence_s)
                rest = length(frame) - FRAME
                whole_by = time.perf_counter() + self._silence_s  # else beats could fill what was never meant
                messages = unpack(np.concatenate([frame, read(rest, self._silence_s, whole_by)]) if rest else frame)
                if isinstance(messages[-1], Close):
                    self.closed_cleanly = True
                    self._end("goodbye")  # and the connection stays, for the answer
                    return
                if not isinstance(messages[0], Beat):
                    self.bytes_received += (FRAME + rest) * WORD
                    self._inbox += map(self._taken_over, messages)
                    self._arrived.set()
        except Garbage as error:
            self._lose(f"it sent what can't be read: {error}")
        except (OSError, ValueError) as error:
            self._lose(_why(error))
        except MemoryError:
            self._lose("it sent a message that memory does not suffice for")
        except RuntimeError as error:
            self._lose(f"features could not be received: {brief(error, 120)}")

    def _handed_over(self, message: Message) -> Message:
        """Features that lie on a device go over the transport, or else become bits of the message."""
        if not isinstance(message, Verdict) or not isinstance(message.features, DeviceFeatures):
            return message
        if self._transport is None:
            return replace(message, features=message.features.bits())
        if not self._gone.is_set():
            self._transport.send(message.features.rows)
            self.bytes_sent += message.features.nbytes
        return replace(message, features=SentSeparately(message.features.shape))

    def _taken_over(self, message: Message) -> Message:
        if not isinstance(message, Verdict) or not isinstance(message.features, SentSeparately):
            return message
        if self._transport is None:
            raise Garbage("features on a way that there is not")
        features = self._transport.receive(*message.features.shape)
        self.bytes_received += features.nbytes
        return replace(message, features=features)

    def _end(self, reason: str) -> None:
        if not self._gone.is_set():
            self.reason = reason
        self._gone.set()
        self._arrived.set()
        self._connection.more.set()

    def _lose(self, reason: str) -> None:
        self._end(reason)
        self._connection.shut()
        if self._transport:
            self._transport.close()


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it was silent for too long"
    return "the connection was closed"
