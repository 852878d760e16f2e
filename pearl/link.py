"""The channel between two processes: torch.distributed point-to-point messages over gloo.

A thread of its own receives, because gloo's `irecv(...).is_completed()` never becomes true; it hands messages over
through a deque and an event. Control messages are CPU tensors and go over gloo on every machine: two ranks may share
one GPU (nccl refuses that), and 64 bytes gain nothing from a GPU's path.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from pearl.messages import FRAME, Close, Message, decode, encode, length

_FOREVER = timedelta(
    days=365
)  # a silent peer is no error: it may be in a long prefill. A dead one closes the connection
_TAG = 0
_IN_FLIGHT = 1 << 13  # sends that may be under way; a stuck peer holds up the sender only after that many


class Link:
    """One end of the pair of ranks (0 target, 1 drafter)."""

    def __init__(self, store: dist.Store, rank: int, host: str | None = None):
        options = dist.ProcessGroupGloo._Options()
        options._timeout = _FOREVER
        options._devices = [
            dist.ProcessGroupGloo.create_device(hostname=host)
            if host
            else dist.ProcessGroupGloo.create_default_device()
        ]
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("pearl", store), rank, 2, options)
        self._store = store  # rank 0 serves it: it must live as long as the group
        self._peer = 1 - rank
        self._inbox: deque[Message] = deque()
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()  # keeps the tensors alive until they have left
        self._arrived = threading.Event()
        self._gone = False
        self.bytes_sent = self.bytes_received = 0
        sys.setswitchinterval(0.0005)  # the receiver gets its turn soon after a message comes
        self._receiver = threading.Thread(target=self._receive_all, name="pearl-receiver", daemon=True)
        self._receiver.start()

    @property
    def lost(self) -> bool:
        return self._gone and not self._inbox

    def send(self, message: Message) -> None:
        words = torch.from_numpy(encode(message))
        try:
            for part in (words[:FRAME], words[FRAME:]):
                if len(part):
                    self._sending.append((self._group.send([part], self._peer, _TAG), part))
                    self.bytes_sent += part.nbytes
            while len(self._sending) > _IN_FLIGHT:
                self._sending.popleft()[0].wait()
        except RuntimeError:  # gloo's word for a closed connection
            self._lose()

    def receive(self) -> Message | None:
        return self._inbox.popleft() if self._inbox else None

    def wait(self, timeout_s: float | None = None) -> None:
        deadline = None if timeout_s is None else time.perf_counter() + timeout_s
        while not self._inbox and not self._gone:
            self._arrived.clear()
            if self._inbox or self._gone:  # it came between the test and the clear
                return
            left = None if deadline is None else deadline - time.perf_counter()
            if left is not None and left <= 0:
                return
            self._arrived.wait(left)

    def close(self) -> None:
        """Says goodbye; the other side answers likewise, which ends both receivers."""
        self.send(Close())
        self._receiver.join(timeout=10)

    def _receive_all(self) -> None:
        try:
            while True:
                frame = self._receive_words(FRAME)
                rest = length(frame.numpy()) - FRAME
                words = torch.cat([frame, self._receive_words(rest)]) if rest else frame
                message = decode(words.numpy())
                if isinstance(message, Close):
                    break
                self._inbox.append(message)
                self._arrived.set()
        except RuntimeError:
            pass  # the connection is closed: the same news as a goodbye
        self._lose()

    def _receive_words(self, count: int) -> torch.Tensor:
        words = torch.empty(count, dtype=torch.int32)
        self._group.recv([words], self._peer, _TAG).wait()
        self.bytes_received += words.nbytes
        return words

    def _lose(self) -> None:
        self._gone = True
        self._arrived.set()
