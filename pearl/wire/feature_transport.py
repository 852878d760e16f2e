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
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pearl.config.inputs import brief
from pearl.core.features import DeviceFeatures

OPEN_S = 20.0  # that both sides, who know that the other is there, may take
_TRIED = 64  # numbers of the known row
_TAG = 0
_NEVER_S = 1e6  # an end is noticed by the channel; nccl must not end a process for it


class FeatureTransport:
    """One end: rank 0, the target, sends, and rank 1, the drafter, receives in the same order."""

    def __init__(self, store: dist.Store, rank: int, device: torch.device, host: str | None = None):
        """Returns when both have come. `host`: the address to listen at; None: by the machine's name."""
        self._device, self._ends = device, threading.Lock()
        self._group: Any = (_nccl if device.type == "cuda" else _gloo)(store, rank, host)
        self._sending: deque[tuple[Any, Tensor]] = deque()  # keeps the rows alive until they have left

    @classmethod
    def open(
        cls, store: dist.Store, rank: int, device: torch.device, host: str | None = None
    ) -> FeatureTransport | None:
        """A transport over which a known row has come; None, on both sides, if it did not."""
        known = torch.arange(_TRIED).to(torch.bfloat16)[None]
        transport, whole, why = None, False, "the row that was sent came changed"
        try:
            transport = cls(store, rank, device, host)
            if rank == 0:
                transport.send(known.to(device))
            else:
                whole = transport._arrives(transport.receive(1, _TRIED), known)
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
            print(f"pearl: features go through the host, no transport to the drafter works ({why}).", file=sys.stderr)
        return None

    def send(self, rows: Tensor) -> None:
        """bfloat16 [positions, F]. Raises `RuntimeError` if it is closed or the other side is known to be gone."""
        rows = rows.to(self._device).contiguous()
        with self._open() as group:
            self._sending.append((group.send([rows], 1, _TAG), rows))
        while self._sending and self._sending[0][0].is_completed():
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


def _answer(store: dist.Store) -> bytes:
    try:
        store.wait(["tried"], timedelta(seconds=2 * OPEN_S))
        return store.get("tried")
    except (RuntimeError, ValueError):
        return b""


def gloo_group(store: dist.Store, rank: int, size: int, deadline_s: float, host: str | None) -> Any:
    """A gloo group that is no default one, once all have come. `host`: the address to listen at; None: by the machine's
    name. What is not done after `deadline_s` fails."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=deadline_s)
    options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
    return gloo(store, rank, size, options)


def _gloo(store: dist.Store, rank: int, host: str | None) -> Any:
    return gloo_group(store, rank, 2, OPEN_S, host)


def _nccl(store: dist.Store, rank: int, _: str | None) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=_NEVER_S)
    with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        return dist.ProcessGroupNCCL(store, rank, 2, options)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
