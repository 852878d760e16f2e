"""One TCP connection between two ranks that find each other in the launcher's store: words go in, words come out.

Not gloo: a message of a length that it did not expect ends *its own* process there (a check in a C++ thread, met by
`tests/parallel/test_faults.py`), and a drafter must not be able to end its target. A socket gives errors instead,
wakes up as soon as the other side is gone, and is as fast. Two ranks may share one GPU, and 64 bytes gain nothing
from its path.

Knows: sockets and addresses. Refuses to know: what the words say, and when silence means something.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import select
import socket
import threading
import time
from collections import deque
from datetime import timedelta
from typing import Any

import numpy as np

from pearl.machine.launcher import LaunchEnv
from pearl.wire.codec import Words

CONNECT_S = 20.0  # that both sides, who know that the other is there, may take to connect
WORD = 4  # bytes
_TOKEN = 16  # bytes, by which the right process is told from whoever else finds the port


class TcpConnection:
    """Carries words in their order, both ways, for a thread that sends and one that reads.

    All methods but `close` raise `OSError` once the connection is gone; reading raises `TimeoutError` for silence."""

    def __init__(self, store: Any, rank: int, host: str | None, key: str):
        """Rank 0 listens and leaves its address in the store under `key`. `host`: where it is to be reached; None: at
        the address of this machine that the launcher's is reached from. Raises `RuntimeError` if nobody comes."""
        try:
            self._socket = _accepted(store, host, key) if rank == 0 else _connected(store, key)
        except OSError as error:
            raise RuntimeError(f"the other rank did not connect ({error})") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._left: deque[memoryview] = deque()  # to send, what the system has not taken yet
        self._turn = threading.Lock()  # of sending
        self.more = threading.Event()  # something is left to send

    def send(self, words: Words) -> None:
        """Never waits: what the system does not take at once is left for `send_rest`."""
        with self._turn:
            self._left.append(memoryview(words.tobytes()))
            if len(self._left) == 1:
                self._send_some()
            if self._left:
                self.more.set()

    def send_rest(self, patience_s: float) -> None:
        """Some of what is left, once the system takes it."""
        if not select.select([], [self._socket], [], patience_s)[1]:
            raise TimeoutError
        with self._turn:
            self._send_some()
            if not self._left:
                self.more.clear()

    def read_exact(self, count: int, silence_s: float, whole_by: float = math.inf) -> Words:
        """int32 [count]. `silence_s`: how long nothing may come. `whole_by`: the moment when all must be there."""
        data = bytearray()
        while missing := count * WORD - len(data):
            patience = min(silence_s, whole_by - time.perf_counter())
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

    def shut(self) -> None:
        """Wakes both threads, and tells the other side."""
        with contextlib.suppress(OSError):  # it was closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.more.set()

    def close(self) -> None:
        self._socket.close()

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


def _accepted(store: Any, host: str | None, key: str) -> socket.socket:
    """Rank 0's: waits for who knows the token."""
    token = secrets.token_bytes(_TOKEN)
    deadline = time.perf_counter() + CONNECT_S
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


def _connected(store: Any, key: str) -> socket.socket:
    store.wait([key], timedelta(seconds=CONNECT_S))
    host, port, token = json.loads(store.get(key))
    made = socket.create_connection((host, port), timeout=CONNECT_S)
    made.sendall(bytes.fromhex(token))
    return made


def _address() -> str:
    """Of this machine, as the machine that holds the launcher's address sees it."""
    env = LaunchEnv.read()
    family, _, _, _, where = socket.getaddrinfo(env.host, env.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as towards:
        towards.connect(where)  # sends nothing
        return towards.getsockname()[0]
