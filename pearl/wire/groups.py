"""Process groups of torch.distributed that are no default ones: for frames, for features, for a target's ranks.

Each is made over a store in which its ranks meet, beside whatever group a launcher or a caller has made.

Knows: how a group is made, and at which address it listens. Refuses to know: what goes over it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

_NEVER_S = 1e6  # an end is noticed by the channel; nccl must not end a process for it


def gloo_group(store: dist.Store, rank: int, size: int, deadline_s: float, host: str | None) -> Any:
    """Returns once all have come. What is not done after `deadline_s` fails. `host`: the address to listen at; None:
    the one from which this machine reaches the store, else the one of its name. Raises `RuntimeError`."""
    gloo: Any = dist.ProcessGroupGloo  # Any: torch's types lack some of both
    own: Any = store  # a group has a connection to it that is its own: one in which a thread waits serves no other
    options = gloo._Options()
    options._timeout = timedelta(seconds=deadline_s)
    options._threads = 1  # of collectives, which nobody asks for
    host = host or _address(store)
    options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
    return gloo(own.clone(), rank, size, options)


def nccl_group(store: dist.Store, rank: int, size: int) -> Any:
    """The same between GPUs. What is not done waits, for ever."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=_NEVER_S)
    with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        return dist.ProcessGroupNCCL(store, rank, size, options)


def _address(store: dist.Store) -> str | None:
    """This machine's end of this process' own connection to a store on another machine, or on this one."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    for one in psutil.Process().net_connections("tcp"):
        if one.raddr and one.raddr.port == store.port:
            address = ipaddress.ip_address(one.laddr.ip)
            return str(getattr(address, "ipv4_mapped", None) or address)
    return None


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
