"""A group listens where the other machine can reach it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from pearl.wire import groups
from pearl.wire.groups import gloo_group

OTHER = ("203.0.113.9", 40000)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)


@pytest.fixture
def connections(monkeypatch):
    """What psutil says of this process, and of the machine: pairs of ends."""

    def are(own: list, every: list) -> None:
        def said(ends: list) -> list:
            return [SimpleNamespace(laddr=address(*here), raddr=there and address(*there)) for here, there in ends]

        process = SimpleNamespace(net_connections=lambda _: said(own))
        seen = SimpleNamespace(Process=lambda: process, net_connections=lambda _: said(every), Error=OSError)
        monkeypatch.setattr(groups, "psutil", seen)

    def address(ip: str, port: int) -> SimpleNamespace:
        return SimpleNamespace(ip=ip, port=port)

    return are


def test_a_machine_listens_where_it_reaches_the_store(store, connections):
    own = (("::ffff:192.0.2.7", 5000), ("::ffff:192.0.2.1", store.port))
    connections([(("192.0.2.7", 22), OTHER), own], [])
    assert groups._address(dist.PrefixStore("a", dist.PrefixStore("b", store))) == "192.0.2.7"
    connections([], [])
    assert groups._address(store) is None and groups._address(HashStore()) is None


def test_a_machine_that_takes_its_own_name_for_the_loopback_listens_where_others_reach_the_store(store, connections):
    own = (("127.0.0.1", 5000), ("127.0.1.1", store.port))
    theirs = (("::ffff:192.0.2.7", store.port), OTHER)
    listening = (("::", store.port), None)
    connections([own], [listening, (own[1], own[0]), theirs])
    assert groups._address(store) == "192.0.2.7"
    connections([own], [listening, (own[1], own[0])])
    assert groups._address(store) == "127.0.0.1", "nobody has come from elsewhere"


def test_the_network_device_that_a_person_names_is_taken(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0,lo")
    with pytest.raises(RuntimeError, match="nowhere0"):
        gloo_group(HashStore(), 0, 2, 5.0, None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    shared, made = HashStore(), []
    other = threading.Thread(target=lambda: made.append(gloo_group(shared, 1, 2, 5.0, None)))
    other.start()
    made.append(gloo_group(shared, 0, 2, 5.0, None))
    other.join()
    assert len(made) == 2
