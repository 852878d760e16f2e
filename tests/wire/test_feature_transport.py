"""Features go from device to device in their order and whole, or through the host; a drafter may be lost meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import HashStore
from trained import drafter_for, save_as_before, save_toy_target, small_target
from transformers import AutoModelForCausalLM

from pearl.core.messages import DraftPlan, End, SentSeparately, Verdict, joined
from pearl.core.params import SamplingParams
from pearl.drafters.feature.source import FeatureSource
from pearl.engine import Engine
from pearl.errors import UsageError
from pearl.machine.device_features import DeviceFeatures
from pearl.wire import feature_transport as lanes
from pearl.wire.codec import decode, encode
from pearl.wire.feature_transport import FeatureTransport
from pearl.wire.frames import size
from pearl.wire.process_channel import ProcessChannel

pytestmark = pytest.mark.usefixtures("own_cache")

LOCAL, CPU = "127.0.0.1", torch.device("cpu")


def both_do(here, there) -> list:
    """What each returns, at the same time."""
    found = [None, None]
    other = threading.Thread(target=lambda: found.__setitem__(1, there()))
    other.start()
    found[0] = here()
    other.join(60)
    return found


def opened() -> list[FeatureTransport | None]:
    store = HashStore()
    return both_do(
        lambda: FeatureTransport.open(store, 0, CPU, LOCAL), lambda: FeatureTransport.open(store, 1, CPU, LOCAL)
    )


def linked(lane: bool = True) -> list[ProcessChannel]:
    store, ends = HashStore(), opened() if lane else [None, None]
    return both_do(
        lambda: ProcessChannel(store, 0, LOCAL, transport=ends[0]),
        lambda: ProcessChannel(store, 1, LOCAL, transport=ends[1]),
    )


def heard(end: ProcessChannel):
    deadline = time.perf_counter() + 10
    while time.perf_counter() < deadline and not end.lost:
        end.wait(0.1)
        if (message := end.receive()) is not None:
            return message
    return None


def rows(count: int, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bits(features) -> torch.Tensor:
    return features.rows if isinstance(features, DeviceFeatures) else torch.from_numpy(features).view(torch.bfloat16)


def test_rows_of_any_number_arrive_in_the_order_in_which_they_left():
    here, there = opened()
    sent = [rows(count, seed=count) for count in (3, 1, 400, 2)]
    for one in sent:
        here.send(one)
    for one in sent:
        assert torch.equal(there.receive(*one.shape).rows, one)
    here.close()
    there.close()


def test_what_is_not_contiguous_arrives_all_the_same():
    here, there = opened()
    here.send(rows(8).T)
    assert torch.equal(there.receive(24, 8).rows, rows(8).T)
    for one in (here, there):
        one.close()


@pytest.mark.parametrize("who", [0, 1])
def test_a_lane_that_changes_the_row_is_not_used_by_either_side(who: int, monkeypatch, caplog):
    name = "send" if who == 0 else "receive"
    real = getattr(FeatureTransport, name)
    if who == 0:
        monkeypatch.setattr(FeatureTransport, name, lambda self, rows: real(self, rows + 1))
    else:
        monkeypatch.setattr(FeatureTransport, name, lambda self, *shape: DeviceFeatures(real(self, *shape).rows + 1))
    assert opened() == [None, None]
    assert "features go through the host" in caplog.text


@pytest.mark.parametrize("broken", [0, 1])
def test_a_side_that_has_no_group_keeps_the_other_from_using_it(broken: int, monkeypatch, caplog):
    real = lanes.gloo_group

    def failing(store, rank, *others):
        if rank == broken:
            raise RuntimeError("no network here")
        return real(store, rank, *others)

    monkeypatch.setattr(lanes, "gloo_group", failing)
    monkeypatch.setattr(lanes, "OPEN_S", 1.0)
    assert opened() == [None, None]
    assert "features go through the host" in caplog.text


def test_nobody_waits_for_a_side_that_never_comes(monkeypatch):
    monkeypatch.setattr(lanes, "OPEN_S", 0.5)
    began = time.perf_counter()
    assert FeatureTransport.open(HashStore(), 0, CPU, LOCAL) is None
    assert time.perf_counter() - began < 10


def test_nobody_waits_for_a_group_that_is_never_made(monkeypatch):
    """nccl has no limit of its own."""
    over = threading.Event()
    monkeypatch.setattr(lanes, "OPEN_S", 0.2)
    monkeypatch.setattr(lanes, "gloo_group", lambda *_: over.wait(60))
    began = time.perf_counter()
    for rank in (0, 1):
        assert FeatureTransport.open(HashStore(), rank, CPU, LOCAL) is None
    assert time.perf_counter() - began < 10
    over.set()


def test_a_closed_lane_takes_nothing_and_gives_nothing():
    for end in opened():
        end.close()
        end.close()
        with pytest.raises(RuntimeError, match="closed"):
            end.send(rows(1))
        with pytest.raises(RuntimeError, match="closed"):
            end.receive(1, 24)


@pytest.mark.parametrize("lane", [True, False])
def test_a_verdict_has_its_features_whichever_way_they_went(lane: bool):
    here, there = linked(lane)
    said = [Verdict(1, 5 + n, DraftPlan(), (1, 2), DeviceFeatures(rows(n + 1, seed=n))) for n in range(5)]
    here.send(End(1), said[0])
    for message in said[1:]:
        here.send(message)
    assert heard(there) == End(1)
    for message in said:
        got = heard(there)
        assert got == message and isinstance(got.features, DeviceFeatures) == lane
        assert torch.equal(bits(got.features), message.features.rows)
    assert here.bytes_sent == there.bytes_received
    for end in (here, there):
        end._lose("the test is over")
        end.close()


def test_a_lost_connection_takes_no_more_features_and_raises_nothing():
    here, there = linked()
    there._lose("gone")
    deadline = time.perf_counter() + 10
    while not here.lost and time.perf_counter() < deadline:
        here.send(Verdict(1, 5, DraftPlan(), (1,), DeviceFeatures(rows(3))))
        time.sleep(0.01)
    assert here.lost
    here.send(Verdict(1, 5, DraftPlan(), (1,), DeviceFeatures(rows(3))))
    for end in (here, there):
        end.close()


def test_a_message_that_names_a_lane_where_there_is_none_ends_the_connection():
    here, there = linked(lane=False)
    here.send(Verdict(1, 5, DraftPlan(), (1,), SentSeparately((3, 24), direct=True)))
    assert heard(there) is None and there.lost and "way" in there.reason
    for end in (here, there):
        end.close()


def test_what_comes_another_way_is_a_shape_in_the_message():
    message = Verdict(1, 5, DraftPlan(), (1, 2, 3), SentSeparately((7, 3456), direct=True))
    assert size(message) == size(End(1)) and decode(encode(message)).features == message.features


def test_pieces_on_a_device_can_be_joined_and_cut():
    whole = rows(9)
    found = joined([DeviceFeatures(whole[:2]), DeviceFeatures(whole[2:3]), DeviceFeatures(whole[3:])])
    assert torch.equal(found[2:5].rows, whole[2:5]) and found.shape == whole.shape and len(found) == 9
    assert np.array_equal(found.bits(), whole.view(torch.int16).numpy())
    assert joined([]) is None


def test_a_source_drafts_the_same_from_either_kind_in_any_pieces():
    drafter = drafter_for(small_target(), (0, 2), 4).requires_grad_(False)
    text, width = [3, 1, 4, 1, 5, 9, 2, 6], 2 * drafter.shape.hidden
    known = rows(len(text) - 1, width)
    for cuts in ((0, 7), (0, 3, 7), (0, 1, 2, 6, 7)):
        found = []
        for kind in (DeviceFeatures, lambda part: part.view(torch.int16).numpy()):
            source = FeatureSource(drafter)
            for first, last in pairwise(cuts):
                source.observe(kind(known[first:last]))
                source.guess(text[: last + 1], [[]])
            found.append(source.guess(text, [[7], []]))
        assert found[0] == found[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, Path]:
    toy = save_toy_target(tmp_path_factory.mktemp("toy") / "target")
    folder = tmp_path_factory.mktemp("drafter")
    save_as_before(drafter_for(AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32), (1, 3)), folder)
    return toy, folder


def test_two_processes_with_a_lane_write_the_targets_text_also_when_the_drafter_dies(pair, monkeypatch):
    toy, folder = pair
    sent, real = [], FeatureTransport.send
    monkeypatch.setattr(FeatureTransport, "send", lambda self, rows: (sent.append(len(rows)), real(self, rows)))
    params = [SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 1.0)]
    options = {"dtype": "float32", "max_length": 300, "feature_transport": "on", "mode": "pearl"}
    with Engine.from_pretrained(toy, f"feature:{folder}", **options) as engine:
        alone = [engine.generate("def f(x):", one, mode="ar").tokens for one in params]
        before = len(sent)
        for mode in ("pearl", "sd", "tree"):
            assert [engine.generate("def f(x):", one, mode=mode).tokens for one in params] == alone
        assert len(sent) > before
        os.kill(engine.runtime.drafter_pid, signal.SIGKILL)
        deadline = time.perf_counter() + 60
        while [event.kind for event in engine.events][-1:] != ["back"] and time.perf_counter() < deadline:
            assert engine.generate("def f(x):", params[0]).tokens == alone[0]
        before = len(sent)
        assert [engine.generate("def f(x):", one).tokens for one in params] == alone
        assert [event.kind for event in engine.events] == ["lost", "back"] and len(sent) > before


def test_a_misspelt_choice_is_refused():
    with pytest.raises(UsageError, match="feature_transport"):
        Engine.from_pretrained(feature_transport="yes")
