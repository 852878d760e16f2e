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
    that of GLOO_SOCKET_IFNAME, else the one from which this machine reaches the store, else the one of its name. Raises
    `RuntimeError`."""
    gloo: Any = dist.ProcessGroupGloo  # Any: torch's types lack some of both
    own: Any = store  # a group has a connection to it that is its own: one in which a thread waits serves no other
    options = gloo._Options()
    options._timeout = timedelta(seconds=deadline_s)
    options._threads = 1  # of collectives, which nobody asks for
    options._devices = [_device(store, host)]
    return gloo(own.clone(), rank, size, options)


def nccl_group(store: dist.Store, rank: int, size: int) -> Any:
    """The same between GPUs. What is not done waits, for ever."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=_NEVER_S)
    with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        return dist.ProcessGroupNCCL(store, rank, size, options)


def _device(store: dist.Store, host: str | None) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    if not host and (named := os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]):
        return gloo.create_device(interface=named)
    host = host or _address(store)
    return gloo.create_device(hostname=host) if host else gloo.create_default_device()


def _address(store: dist.Store) -> str | None:
    """This machine's end of this process's own connection to the store. Where that does not leave the machine, as on
    one that takes its own name for the loopback: the address at which others have come to the store."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    mine = psutil.Process().net_connections("tcp")
    own = next((_ip(one.laddr.ip) for one in mine if one.raddr and one.raddr.port == store.port), None)
    if own and own.is_loopback:
        with contextlib.suppress(psutil.Error):
            every = psutil.net_connections("tcp")  # a launcher may serve the store
            came = [_ip(one.laddr.ip) for one in every if one.laddr and one.raddr and one.laddr.port == store.port]
            own = next((address for address in came if not address.is_loopback), own)
    return str(own) if own else None


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(address)
    return getattr(found, "ipv4_mapped", None) or found


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
