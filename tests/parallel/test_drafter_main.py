"""The drafter's process as it meets its target, connection by connection; no process is started."""

import threading

import pytest
from torch.distributed import HashStore

from pearl.config.engine_config import SUFFIX, EngineConfig
from pearl.drafters.suffix import SuffixSource
from pearl.parallel import drafter_main
from pearl.parallel.child import TargetGone
from pearl.parallel.drafter_process import DRAFTER, FEATURES_FROM, OVER, READY


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """In which the target is ready for connection 0, which fails, and wants no further one."""

    def nobody_comes(*_: object) -> None:
        raise RuntimeError("timed out")

    monkeypatch.setattr(drafter_main, "connect", nobody_comes)
    made = HashStore()
    made.set(f"{FEATURES_FROM}/0", "")
    made.set(f"{FEATURES_FROM}/1", OVER)
    return made


def serve(store: HashStore, number: int | None, start_timeout_s: float = 60.0) -> None:
    config = EngineConfig(draft=SUFFIX, pin_cores="off", start_timeout_s=start_timeout_s)
    drafter_main.serve(config, [], store, None, SuffixSource, number)


def test_a_launched_drafter_outlives_a_connection_that_does_not_come_about(store: HashStore):
    serve(store, None)  # ending badly, it would take the target with it
    assert store.get(f"{DRAFTER}/1").decode() == READY


def test_one_whose_target_has_no_text_waits_until_it_has_one(store: HashStore, monkeypatch: pytest.MonkeyPatch):
    """However long that is: ending, it would take the target with it. At first the target has so long to load."""
    monkeypatch.setattr(drafter_main, "_LOOK_S", 0.02)
    store.delete_key(f"{FEATURES_FROM}/1")
    drafter = threading.Thread(target=serve, args=[store, None, 0.1])
    drafter.start()
    drafter.join(1.0)
    assert drafter.is_alive()
    store.set(f"{FEATURES_FROM}/1", OVER)
    drafter.join(10.0)
    assert not drafter.is_alive()

    store.delete_key(f"{FEATURES_FROM}/0")
    with pytest.raises(TargetGone):
        serve(store, None, 0.1)


def test_one_that_its_target_has_started_ends_with_its_only_connection(store: HashStore):
    with pytest.raises(TargetGone, match="timed out"):
        serve(store, 0)
    assert not store.check([f"{DRAFTER}/1"])
