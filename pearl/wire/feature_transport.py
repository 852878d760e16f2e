"""Stream-ordered transfers of features from the target's device to the drafter's, beside the channel of the tokens.

A verdict then only says how many rows are on their way. A transfer is queued after the kernels that produce the rows
and before those that consume them, over a communicator and a stream of its own: neither host waits, and a late row
delays a draft, never a token. Between GPUs it is nccl; over gloo, on CPUs, the same code is tested.

A transport belongs to one connection and ends with it. When it is made, a known row is sent over it; unless that
arrives in time and whole, features travel in the verdicts, through the host, as between two processes on CPUs.

Knows: two devices and a group of two. Refuses to know: which texts the rows belong to.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pearl.config.inputs import brief
from pearl.machine.device_features import DeviceFeatures
from pearl.wire.groups import gloo_group, nccl_group

_log = logging.getLogger(__name__)
_Made = TypeVar("_Made")
OPEN_S = 20.0  # that both sides, who know that the other is there, may take
_TRIED = 64  # numbers of the known row
_TAG = 0


class FeatureTransport:
    """One end: rank 0, the target, sends, and rank 1, the drafter, receives in the same order."""

    def __init__(self, store: dist.Store, rank: int, device: torch.device, host: str | None = None):
        """Returns when both have come. `host`: see `gloo_group`."""
        self._device, self._ends = device, threading.Lock()
        on_gpu = device.type == "cuda"
        self._group: Any = nccl_group(store, rank, 2) if on_gpu else gloo_group(store, rank, 2, OPEN_S, host)
        self._sending: deque[tuple[Any, Tensor]] = deque()  # keeps the rows alive until they have left

    @classmethod
    def open(
        cls, store: dist.Store, rank: int, device: torch.device, host: str | None = None
    ) -> FeatureTransport | None:
        """A transport over which a known row has come; None, on both sides, if it did not."""
        known = torch.arange(_TRIED).to(torch.bfloat16)[None]
        transport, whole, why = None, False, "the row that was sent came changed"
        try:
            transport, coming = _within(OPEN_S, lambda: cls._tried(store, rank, device, host, known))
            whole = coming is not None and transport._arrives(coming, known)
        except RuntimeError as error:
            why = brief(error)
        if rank == 0:
            whole = transport is not None and _answer(store) == b"whole"
        else:
            store.set("tried", "whole" if whole else "broken")
        if whole:
            return transport
        if transport:
            transport.close()
        if rank == 0:
            _log.warning("features go through the host, no transport to the drafter works (%s).", why)
        return None

    @classmethod
    def _tried(
        cls, store: dist.Store, rank: int, device: torch.device, host: str | None, known: Tensor
    ) -> tuple[FeatureTransport, DeviceFeatures | None]:
        """A transport over which `known` is on its way; at the drafter's end also where it arrives."""
        transport = cls(store, rank, device, host)
        if rank == 0:
            transport.send(known.to(device))
            return transport, None
        return transport, transport.receive(1, _TRIED)

    def send(self, rows: Tensor) -> None:
        """bfloat16 [positions, F]. Raises `RuntimeError` if it is closed or the other side is known to be gone."""
        rows = rows.to(self._device).contiguous()
        with self._open() as group:
            self._sending.append((group.send([rows], 1, _TAG), rows))
        if self._device.type == "cuda":  # of gloo only a wait can tell
            with contextlib.suppress(IndexError):  # all have left, or it was closed meanwhile
                while self._sending[0][0].is_completed():
                    self._sending.popleft()

    def release(self, patience_s: float) -> None:
        """Waits until what was sent before has left, where only a wait can tell. Raises `RuntimeError`."""
        for _ in range(len(self._sending) if self._device.type == "cpu" else 0):
            with contextlib.suppress(IndexError):  # it was closed meanwhile
                self._sending[0][0].wait(timedelta(seconds=patience_s))
                self._sending.popleft()

    def receive(self, rows: int, width: int) -> DeviceFeatures:
        """The next that was sent. Raises `RuntimeError` if the transport is closed."""
        with self._open() as group:
            made = torch.empty(rows, width, dtype=torch.bfloat16, device=self._device)
            return DeviceFeatures(made, group.recv([made], 0, _TAG))

    def close(self) -> None:
        """Whatever is under way does not arrive."""
        with self._ends:
            group, self._group = self._group, None
        if group is None:
            return
        if self._device.type == "cuda":  # else a send that nobody takes would stay on the device for ever
            group.abort()
        self._sending.clear()

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        group = self._group
        if group is None:
            raise RuntimeError("the transport is closed")
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            yield group

    def _arrives(self, coming: DeviceFeatures, known: Tensor) -> bool:
        """Waits for it on the host."""
        deadline = time.perf_counter() + OPEN_S
        while self._device.type == "cuda" and not coming._work.is_completed():
            if time.perf_counter() > deadline:
                return False
            time.sleep(0.001)
        return torch.equal(coming.rows.cpu(), known)


def _within(limit_s: float, make: Callable[[], _Made]) -> _Made:
    """What `make` returns or raises; `RuntimeError` if that takes longer. Then its thread is left alone: nccl makes a
    group with the first row, and waits for a side that has ended meanwhile without a limit of its own."""
    made: Future[_Made] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=run, name="pearl-features", daemon=True).start()
    try:
        return made.result(limit_s)
    except TimeoutError:
        raise RuntimeError(f"it was not there after {limit_s:g} s") from None


def _answer(store: dist.Store) -> bytes:
    try:
        store.wait(["tried"], timedelta(seconds=2 * OPEN_S))
        return store.get("tried")
    except (RuntimeError, ValueError):
        return b""
