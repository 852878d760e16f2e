"""The channel between two processes: one TCP connection, whose address the ranks find in the launcher's store.

Not gloo: a message of a length that it did not expect ends *its own* process there (a check in a C++ thread, met by
`tests/parallel/test_faults.py`), and a drafter must not be able to end its target. A socket gives errors instead,
wakes up as soon as the other side is gone, and is as fast. Two ranks may share one GPU, and 64 bytes gain nothing
from its path.

A thread of its own receives and hands over through a deque and an event. Another one sends a beat now and then, so that
silence means something: a side that hears nothing for `silence_s` takes the other one for dead, as if it had closed the
connection. That thread also sends what the system would not take at once, so `send` never waits.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import select
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np

from pearl.config.engine_config import SILENCE_S
from pearl.config.inputs import brief
from pearl.core.features import DeviceFeatures
from pearl.core.messages import Beat, Close, Garbage, Message, SentSeparately, Verdict
from pearl.machine.launcher import LaunchEnv
from pearl.wire.codec import FRAME, length, pack, unpack
from pearl.wire.feature_transport import FeatureTransport

_BEATS = 5  # in the time of a silence
_CONNECT_S = 20.0  # that both sides, who know that the other is there, may take to connect
_GOODBYE_S = 2.0  # that an answer to a goodbye is waited for
_WORD = 4  # bytes
_TOKEN = 16  # bytes, by which the right process is told from whoever else finds the port


class ProcessChannel:
    """One end of the pair of ranks (0 target, 1 drafter).

    `silence_s`: how long waiting for any message or beat may take. `host`: where rank 0 is to be reached, by default
    the address of this machine that the launcher's address is reached from. `name`: both ends give the same; a new
    connection over the same store needs a new one. `lane`: for features that lie on a device, which goes with the
    connection. Raises RuntimeError if the other rank does not come.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        host: str | None = None,
        silence_s: float = SILENCE_S,
        name: str = "pearl",
        lane: FeatureTransport | None = None,
    ):
        self._silence_s, self._lane = silence_s, lane
        try:
            self._socket = (_accepted if rank == 0 else _connected)(store, host, f"{name}/address")
        except OSError as error:
            raise RuntimeError(f"the other rank did not connect ({error})") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._store = store  # rank 0 serves it: it must live as long as the drafter
        self._inbox: deque[Message] = deque()
        self._left: deque[memoryview] = deque()  # to send, what the system has not taken yet
        self._turn = threading.Lock()  # of sending
        self._more = threading.Event()  # something is left to send
        self._arrived = threading.Event()
        self._gone = threading.Event()
        self.farewell = False  # the other side has said goodbye
        self.reason = ""  # why it is lost, if it did not
        self.bytes_sent = self.bytes_received = 0
        sys.setswitchinterval(0.0005)  # the receiver gets its turn soon after a message comes
        self._receiver = threading.Thread(target=self._receive_all, name="pearl-receiver", daemon=True)
        self._receiver.start()
        self._heart = threading.Thread(target=self._beat, name="pearl-heart", daemon=True)
        self._heart.start()

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
        self._heart.join(patience_s)
        self._socket.close()

    def _send(self, *messages: Message) -> int:
        """Bytes."""
        data = memoryview(pack(messages).tobytes())
        with self._turn:
            if self._gone.is_set() and not isinstance(messages[0], Close):
                return 0
            try:
                taken = 0 if self._left else self._socket.send(data)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                self._lose(_brief(error))
                return 0
            if taken < len(data):
                self._left.append(data[taken:])
                self._more.set()
        return len(data)

    def _beat(self) -> None:
        """Sends what is left, and a beat where nothing is."""
        try:
            while not self._gone.is_set():
                if not self._more.wait(self._silence_s / _BEATS):
                    self._send(Beat())
                    continue
                if not select.select([], [self._socket], [], self._silence_s)[1]:
                    raise TimeoutError
                with self._turn:
                    self._send_some()
        except (OSError, ValueError) as error:  # ValueError: the socket is closed
            self._lose(_brief(error))

    def _send_some(self) -> None:
        """Of what is left, as much as the system takes."""
        while self._left:
            try:
                rest = self._left[0][self._socket.send(self._left[0]) :]
            except BlockingIOError:
                return
            if rest:
                self._left[0] = rest
            else:
                self._left.popleft()
        self._more.clear()

    def _receive_all(self) -> None:
        try:
            while True:
                frame = self._words(FRAME)
                rest = length(frame) - FRAME
                whole_by = time.perf_counter() + self._silence_s  # else beats could fill what was never meant
                messages = unpack(np.concatenate([frame, self._words(rest, whole_by)]) if rest else frame)
                if isinstance(messages[-1], Close):
                    self.farewell = True
                    self._end("goodbye")  # and the connection stays, for the answer
                    return
                if not isinstance(messages[0], Beat):
                    self.bytes_received += (FRAME + rest) * _WORD
                    self._inbox += map(self._taken_over, messages)
                    self._arrived.set()
        except Garbage as error:
            self._lose(f"it sent what can't be read: {error}")
        except (OSError, ValueError) as error:
            self._lose(_brief(error))
        except MemoryError:
            self._lose("it sent a message that memory does not suffice for")
        except RuntimeError as error:
            self._lose(f"features could not be received: {brief(error, 120)}")

    def _handed_over(self, message: Message) -> Message:
        """Features that lie on a device go over the lane, or else become bits of the message."""
        if not isinstance(message, Verdict) or not isinstance(message.features, DeviceFeatures):
            return message
        if self._lane is None:
            return replace(message, features=message.features.bits())
        if not self._gone.is_set():
            self._lane.send(message.features.rows)
            self.bytes_sent += message.features.nbytes
        return replace(message, features=SentSeparately(message.features.shape))

    def _taken_over(self, message: Message) -> Message:
        if not isinstance(message, Verdict) or not isinstance(message.features, SentSeparately):
            return message
        if self._lane is None:
            raise Garbage("features on a way that there is not")
        features = self._lane.receive(*message.features.shape)
        self.bytes_received += features.nbytes
        return replace(message, features=features)

    def _words(self, count: int, whole_by: float = math.inf) -> np.ndarray:
        """int32 [count]. `whole_by`: the moment when all must be there."""
        data = bytearray()
        while missing := count * _WORD - len(data):
            patience = min(self._silence_s, whole_by - time.perf_counter())
            if patience <= 0 or not select.select([self._socket], [], [], patience)[0]:
                raise TimeoutError
            try:
                some = self._socket.recv(min(missing, 1 << 20))  # memory is taken as it comes, whatever length is named
            except BlockingIOError:
                continue
            if not some:
                raise ConnectionError
            data += some
        return np.frombuffer(bytes(data), np.int32)

    def _end(self, reason: str) -> None:
        if not self._gone.is_set():
            self.reason = reason
        self._gone.set()
        self._arrived.set()
        self._more.set()

    def _lose(self, reason: str) -> None:
        self._end(reason)
        with contextlib.suppress(OSError):  # it was closed already
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the other thread, and tells the other side
        if self._lane:
            self._lane.close()


def _accepted(store: Any, host: str | None, key: str) -> socket.socket:
    """Rank 0's: waits for who knows the token."""
    token = secrets.token_bytes(_TOKEN)
    deadline = time.perf_counter() + _CONNECT_S
    with socket.create_server((host or "", 0)) as server:
        store.set(key, json.dumps([host or _address(), server.getsockname()[1], token.hex()]))
        while (left := deadline - time.perf_counter()) > 0:
            server.settimeout(left)
            made, _ = server.accept()
            made.settimeout(left)
            try:
                if secrets.compare_digest(made.recv(_TOKEN, socket.MSG_WAITALL), token):
                    return made
            except OSError:
                pass  # somebody else's
            made.close()
    raise TimeoutError("nobody came")


def _connected(store: Any, _: str | None, key: str) -> socket.socket:
    store.wait([key], timedelta(seconds=_CONNECT_S))
    host, port, token = json.loads(store.get(key))
    made = socket.create_connection((host, port), timeout=_CONNECT_S)
    made.sendall(bytes.fromhex(token))
    return made


def _address() -> str:
    """Of this machine, as the machine that holds the launcher's address sees it."""
    env = LaunchEnv.read()
    family, _, _, _, where = socket.getaddrinfo(env.host, env.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as towards:
        towards.connect(where)  # sends nothing
        return towards.getsockname()[0]


def _brief(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it was silent for too long"
    return "the connection was closed"
