"""Every test runs on one core, in seconds, and finds the same examples each time.

`pytest --hypothesis-profile=search` looks for new ones, for eighty times as long; `quick` takes a third of them.
"""

import os
import signal
from collections.abc import Iterator

# Two tests run side by side: threads that wait by spinning would stop the other
os.environ["OMP_WAIT_POLICY"] = "passive"

import forks
import pytest
import tiny
import torch
from hypothesis import settings

torch.set_num_threads(1)
forks.plant()  # while there is one thread
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it

settings.register_profile("pearl", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=20)
settings.register_profile("search", deadline=None, max_examples=5000, print_blob=True)
settings.load_profile("pearl")

LONG = (  # files with the longest tests: they come first, so that no worker of two ends with one
    "repository/test_scripts.py",
    "training/test_toy_pipeline.py",
    "commands/test_bench.py",
    "engine/test_engine.py",
    "engine/test_processors.py",
    "engine/test_side_by_side.py",
    "parallel/test_ways_to_start.py",
    "parallel/test_tensor_parallel_lost.py",
    "parallel/test_faults.py",
    "roles/test_distribution.py",
    "roles/test_transformers_parity.py",
    "models/test_architectures.py",
    "evaluation/test_main.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = "/".join(item.path.parts[-2:])
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=place)


@pytest.fixture(scope="session")
def door(tmp_path_factory) -> Iterator[forks.Door]:
    """Where commands are forked that would import torch and transformers otherwise."""
    door = forks.Door(tmp_path_factory.mktemp("door") / "socket")
    yield door
    door.close()


@pytest.fixture(scope="session")
def forking(tmp_path_factory, door) -> str:
    """A PATH with which scripts of bash fork what would import torch."""
    return f"{door.programs(tmp_path_factory.mktemp('bin'))}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """The folders of a tiny target and of a draft model that is often right."""
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def own_cache(cache_folder):
    """Row plans of models that will be gone are gone with them; the same tiny models are measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache_folder)
        yield
