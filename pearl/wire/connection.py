"""Two ranks' connection, a gloo group of torch.distributed that is theirs alone: words go in, words come out.

gloo hands a tensor over when a receive of it is posted, and ends the *process* whose receive is too small. So a lane
has one size of frames: every send and every receive on it is of that size, whatever is said, and nobody can be sent
more than it expects. Two ranks may share one GPU, and a few words gain nothing from its path: they are CPU tensors.

A killed or ended rank makes whatever the other one waits for fail at once. A wait that takes longer than it may
closes the connection for both.

Knows: a group, frames and patience. Refuses to know: what the words say, and when silence means something.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pearl.config.inputs import brief
from pearl.wire.codec import Words
from pearl.wire.frames import FEATURES, MESSAGES, Lane, framed
from pearl.wire.groups import gloo_group

CONNECT_S = 20.0  # that both sides, who know that the other is there, may take to connect
_AHEAD = 64  # receives that are posted: so many frames arrive while the reader does something else
_HURRY = 1 << 15  # bytes that may stay after they have left; more are let go of at once
_MOST_WAITING = 1 << 30  # bytes that may wait for a rank that takes none, beside the most that were sent at once
_NEVER = Lane(2, 1)  # on which nobody sends


class FrameConnection:
    """Carries frames in their order, both ways, for threads that send, one that receives, and one that releases.

    All methods but `shut` and `close` raise `OSError` once the connection is gone: `TimeoutError` for silence."""

    def __init__(self, store: dist.Store, rank: int, host: str | None):
        """Ranks 0 and 1 meet in the store. `host`: see `gloo_group`. Raises `RuntimeError` if nobody comes."""
        self._group: Any = gloo_group(store, rank, 2, CONNECT_S, host)
        self._peer = 1 - rank
        self._posted: dict[int, deque[tuple[dist.Work, Words]]] = {MESSAGES.tag: deque(), FEATURES.tag: deque()}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # gloo reads from the tensors until they have left
        self._waiting = self._largest = 0  # their bytes, and the most of one call
        self._turn = threading.Lock()  # of sending, and of the count
        self.hurry = threading.Event()  # there is much to release

    def send(self, words: Words, lane: Lane = MESSAGES) -> int:
        """Never waits. Returns the bytes of its frames, which `release` lets go of."""
        frames = [torch.from_numpy(frame) for frame in framed(words, lane)]
        size = len(frames) * lane.words * 4
        with self._turn:
            if self._waiting > _MOST_WAITING + self._largest:
                raise ConnectionError(f"it has taken nothing of {self._waiting >> 20} MB")
            try:
                for frame in frames:
                    self._sent.append((self._group.send([frame], self._peer, lane.tag), frame))
            except (AttributeError, RuntimeError) as error:  # AttributeError: it is closed
                raise _lost(error) from None
            self._waiting += size
            self._largest = max(self._largest, size)
            if self._waiting > _HURRY:
                self.hurry.set()
        return size

    def release(self, patience_s: float) -> None:
        """Waits until what was sent before has left, and lets go of it. One thread at a time: gloo tells one waiter
        alone that a send has ended."""
        for _ in range(len(self._sent)):
            work, frame = self._sent[0]
            try:
                work.wait(timedelta(seconds=max(patience_s, 0.001)))
            except RuntimeError as error:
                raise _lost(error) from None
            with self._turn:
                self._sent.popleft()
                self._waiting -= frame.nbytes

    def receive(self, patience_s: float, lane: Lane = MESSAGES, expected: int = _AHEAD) -> Words:
        """The next frame. `patience_s`: how long nothing may come. `expected`: frames that will come in any case."""
        posted = self._posted[lane.tag]
        try:
            if len(posted) <= min(expected - 1, _AHEAD // 2):  # many at a time, so most frames find theirs posted
                for _ in range(min(expected, _AHEAD) - len(posted)):
                    frame = torch.zeros(lane.words, dtype=torch.int32)
                    posted.append((self._group.recv([frame], self._peer, lane.tag), frame.numpy()))
            work, words = posted.popleft()
            work.wait(timedelta(seconds=max(patience_s, 0.001)))  # 0 is no limit
        except (AttributeError, RuntimeError) as error:
            raise _lost(error) from None
        return words

    def receive_words(self, count: int, patience_s: float, lane: Lane, first: Words | None = None) -> Words:
        """int32 [count], all of which must come within `patience_s`. `first`: their first frame, if it is there.
        Memory is taken as they come, whatever count is named."""
        whole_by = time.perf_counter() + patience_s
        parts = [np.empty(0, np.int32) if first is None else first]
        for left in range(-(-(count - len(parts[0])) // lane.words), 0, -1):
            expected = _AHEAD if lane is MESSAGES else left  # further messages follow, further features may not
            parts.append(self.receive(whole_by - time.perf_counter(), lane, expected))
        return (np.concatenate(parts) if len(parts) > 1 else parts[0])[:count]

    def shut(self) -> None:
        """Wakes all who wait, and tells the other side. gloo has one way: a wait that takes longer than it may."""
        with contextlib.suppress(AttributeError, RuntimeError):  # it is gone already
            never = torch.zeros(_NEVER.words, dtype=torch.int32)
            self._group.recv([never], self._peer, _NEVER.tag).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        """Once no thread waits for it any more: lets go of everything."""
        self._group = None
        self._sent.clear()
        for posted in self._posted.values():
            posted.clear()


def _lost(error: Exception) -> OSError:
    """gloo has one class for all: its words tell a wait that took too long, this one or another, from an end."""
    late = any(words in str(error) for words in ("Timed out waiting", "Application timeout"))
    return (TimeoutError if late else ConnectionError)(brief(error))
