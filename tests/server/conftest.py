"""A server of the tiny pair, one a module that has none of its own."""

from __future__ import annotations

import httpx
import pytest
import servers


@pytest.fixture(scope="module")
def engine(pair):
    with servers.engine(*pair) as made:
        yield made


@pytest.fixture(scope="module")
def server(engine):
    with servers.served(engine) as one:
        yield one


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made
