"""The connections between the ranks of a tensor-parallel target.

Commands travel over gloo, on CPU tensors, one message to each rank; the sums within a forward go over nccl between
GPUs. Nobody waits for ever: who hears nothing for `deadline_s` is told that the others are gone.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pearl.config.inputs import brief
from pearl.wire.groups import gloo_group

_FRAME = 64  # words of a command's first message; the rest, if there is one, is the second
_TAG = 0
_IN_FLIGHT = 1 << 10  # messages that may be under way; a stuck rank holds up rank 0 only after that many


class RankLost(Exception):
    """Another rank is gone or says nothing; the message says which way."""


class CommandBroadcast:
    """Rank 0 tells the others what to do. One end of it."""

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float, host: str | None):
        """Returns when all ranks have come. `host`: see `gloo_group`."""
        self.rank, self.size = rank, size
        self._group = gloo_group(dist.PrefixStore("calls", store), rank, size, deadline_s, host)
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()  # keeps the tensors alive until they have left

    def send(self, words: Sequence[int]) -> None:
        """To all other ranks, which `receive` it. Raises `RuntimeError` where one is gone."""
        frame = torch.zeros(_FRAME, dtype=torch.int32)
        made = torch.tensor([len(words), *words], dtype=torch.int32)
        frame[: len(made)] = made[:_FRAME]
        for part in (frame, made[_FRAME:]):
            if len(part):
                for rank in range(1, self.size):
                    self._sending.append((self._group.send([part], rank, _TAG), part))
        while len(self._sending) > _IN_FLIGHT:
            self._sending.popleft()[0].wait()

    def receive(self) -> list[int]:
        """What rank 0 has sent. Raises `RankLost` if it is gone, or has sent nothing for the deadline."""
        try:
            frame = self._receive_words(_FRAME)
            count = int(frame[0])
            words = frame[1 : 1 + count].tolist()
            return words + (self._receive_words(count - len(words)).tolist() if count > len(words) else [])
        except RuntimeError as error:  # gloo's word for a closed connection, and for silence
            raise RankLost(brief(error)) from None

    def _receive_words(self, count: int) -> torch.Tensor:
        words = torch.empty(count, dtype=torch.int32)
        self._group.recv([words], 0, _TAG).wait()
        return words

    def close(self) -> None:
        """Lets go of the other ranks: whoever still waits for this one hears that it is gone."""
        for work, _ in self._sending:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=5))
        self._sending.clear()
        del self._group


class ProcessGroups:
    """One rank's connections to the others: for commands, and the default process group for the sums."""

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float, host: str | None, gpu: int):
        """`gpu`: of this rank, where there are some."""
        backend, device = "gloo", None
        if torch.cuda.is_available():
            backend, device = "nccl", torch.device("cuda", gpu)
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("sums", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=deadline_s),
            device_id=device,
        )
        try:
            self.commands = CommandBroadcast(store, rank, size, deadline_s, host)
        except RuntimeError:
            dist.destroy_process_group()
            raise

    def close(self) -> None:
        self.commands.close()
        dist.destroy_process_group()


def is_lost(error: Exception) -> bool:
    """Whether it is what a rank sees of the end of another one. gloo has no error of its own: what fails within the
    sums of a forward, which transformers and DTensor ask for, is a plain `RuntimeError` that names its source file."""
    return isinstance(error, RankLost | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
