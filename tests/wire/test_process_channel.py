"""One TCP connection: what is said arrives, and whatever else comes ends the connection and nothing more."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, TCPStore

from pearl.config.engine_config import EngineConfig
from pearl.core.messages import DraftPlan, End, Nodes, Verdict
from pearl.drafters.draft_source import DraftSource
from pearl.parallel.drafter_main import TargetGone, serve
from pearl.wire import tcp
from pearl.wire.codec import FRAME, encode, pack
from pearl.wire.process_channel import ProcessChannel

LOCAL = "127.0.0.1"


def pair(silence_s: float = 5.0) -> tuple[ProcessChannel, ProcessChannel]:
    store, made = HashStore(), []
    other = threading.Thread(target=lambda: made.append(ProcessChannel(store, 1, LOCAL, silence_s)))
    other.start()
    first = ProcessChannel(store, 0, LOCAL, silence_s)
    other.join()
    return first, made[0]


@pytest.fixture
def both() -> Iterator[tuple[ProcessChannel, ProcessChannel]]:
    made = pair()
    yield made
    for one in made:
        one._lose("the test is over")
        one.close()


def heard(end: ProcessChannel, seconds: float = 5.0):
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline and not end.lost:
        end.wait(0.1)
        if (message := end.receive()) is not None:
            return message
    return None


def test_messages_of_any_length_arrive_in_their_order(both):
    features = np.arange(3_000_000, dtype=np.int16).reshape(1000, 3000)
    said = [End(1), Verdict(1, 5, DraftPlan(), (1, 2), features), *(Nodes(1, n, n, False) for n in range(2000)), End(2)]
    for here, there in (both, both[::-1]):
        for message in said:
            here.send(message)
        for message in said:
            assert heard(there) == message
        assert here.bytes_sent == there.bytes_received == sum(encode(message).nbytes for message in said)


def test_messages_that_are_said_at_once_travel_together(both):
    said = [End(1), Verdict(2, 5, DraftPlan(), tuple(range(40))), Nodes(3, 1, 1, False)]
    both[0].send(*said)
    assert [heard(both[1]) for _ in said] == said
    assert both[0].bytes_sent == both[1].bytes_received == pack(said).nbytes


def test_beats_do_not_keep_a_message_alive_that_never_ends():
    """A length that was never meant: beats fill it, a few bytes at a time, for ever."""
    first, second = pair(silence_s=0.5)
    words = encode(End(1))
    words[1] = 1 << 20
    first._connection._socket.send(words.tobytes())
    began = time.perf_counter()
    assert heard(second, 30.0) is None and second.lost
    assert time.perf_counter() - began < 30.0 and "silent" in second.reason
    for one in (first, second):
        one.close()


def test_sending_never_waits_for_a_reader(both):
    features = np.zeros((1000, 20_000), np.int16)  # 40 MB, far more than the system's buffers take
    message = Verdict(1, 5, DraftPlan(), (1,), features)
    began = time.perf_counter()
    encode(message).tobytes()
    alone = time.perf_counter() - began
    both[0].send(message, End(1))
    assert time.perf_counter() - began < 5 * alone + 1.0
    assert heard(both[1], 20).features.shape == features.shape and heard(both[1]) == End(1)


def test_a_goodbye_is_no_loss():
    first, second = pair()
    closing = threading.Thread(target=first.close)
    closing.start()
    while not second.lost:
        second.wait(1)
    second.close()
    closing.join(5)
    assert not closing.is_alive() and first.closed_cleanly and second.closed_cleanly


@pytest.mark.parametrize("side", [0, 1])
def test_a_closed_connection_is_noticed_at_once(both, side):
    both[side]._connection._socket.shutdown(socket.SHUT_RDWR)
    began = time.perf_counter()
    both[1 - side].wait(5)
    assert both[1 - side].lost and time.perf_counter() - began < 0.5
    assert both[1 - side].reason == "the connection was closed"
    both[1 - side].send(End(1))  # harmless


GARBAGE = {
    "noise": np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 64).astype(np.int32).tobytes(),
    "zeros": bytes(64),
    "a length that no memory holds": np.array([3, 1 << 27, *[0] * 14], np.int32).tobytes(),
    "a length below none": np.array([3, -5, *[0] * 14], np.int32).tobytes(),
    "no kind": np.array([99, 16, *[0] * 14], np.int32).tobytes(),
    "more than it says": encode(Nodes(1, 1, 1, False)).tobytes() + b"abc" * 30,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_the_connection_and_nothing_more(data):
    here, there = pair(silence_s=0.5)
    there._connection._socket.sendall(data)
    deadline = time.perf_counter() + 5
    while not here.lost and time.perf_counter() < deadline:
        there._connection.more.clear()
        here.wait(0.05)
        here.receive()
    if data != GARBAGE["a length that no memory holds"]:  # beats go into that one; it may take its time
        assert here.lost and here.reason
    here._lose("over")
    for one in (here, there):
        one.close()


def test_a_beat_is_a_sign_of_life_and_silence_is_not(monkeypatch):
    here, there = pair(silence_s=0.5)
    time.sleep(1.5)
    assert not here.lost and not there.lost
    monkeypatch.setattr(there, "_send", lambda message: 0)  # as if it were stopped
    began = time.perf_counter()
    here.wait(5)
    assert here.lost and 0.2 < time.perf_counter() - began < 2 and here.reason == "it was silent for too long"
    for one in (here, there):
        one.close()


def test_who_does_not_know_the_token_is_not_let_in():
    store, made = HashStore(), []
    other = threading.Thread(target=lambda: made.append(ProcessChannel(store, 0, LOCAL)))
    other.start()
    store.wait(["pearl/address"])
    _, port, _ = json.loads(store.get("pearl/address"))
    stranger = socket.create_connection((LOCAL, port))
    stranger.sendall(b"x" * 16)
    right = ProcessChannel(store, 1, LOCAL)
    other.join(5)
    right.send(End(3))
    assert heard(made[0]) == End(3)
    assert stranger.recv(1) == b""
    for one in (made[0], right):
        one._lose("over")
        one.close()


def test_a_rank_that_never_comes_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(tcp, "CONNECT_S", 0.2)
    for rank in (0, 1):
        with pytest.raises(RuntimeError):
            ProcessChannel(HashStore(), rank, LOCAL)


def test_closed_links_leave_no_thread_and_no_socket():
    threads = threading.active_count()
    for _ in range(20):
        here, there = pair()
        there._lose("gone")
        here.wait(2)
        for one in (here, there):
            one.close()
            assert one._connection._socket.fileno() == -1
    assert threading.active_count() == threads


def test_a_frame_is_one_send():
    assert encode(Nodes(1, 1, 1, False)).nbytes == FRAME * 4


class Nothing(DraftSource):
    """A source that never has a guess."""

    def propose(self, text, room):
        return []


@pytest.fixture
def waiting(monkeypatch) -> Iterator[tuple[object, list[str]]]:
    """The store of a drafter that is ready before its target is, and how the drafter has ended."""
    monkeypatch.setattr(tcp, "CONNECT_S", 1.0)
    store, ended = TCPStore(LOCAL, 0, 2, is_master=True, wait_for_workers=False), []
    cpus = sorted(os.sched_getaffinity(0))[:1]
    threads = torch.get_num_threads()

    def draft() -> None:
        try:
            serve(EngineConfig(), cpus, TCPStore(LOCAL, store.port, 2, is_master=False), LOCAL, Nothing, 0)
            ended.append("well")
        except TargetGone:
            ended.append("its target is gone")

    thread = threading.Thread(target=draft)
    thread.start()
    store.wait(["drafter/0"], timedelta(seconds=30))
    yield store, ended
    thread.join(30)
    torch.set_num_threads(threads)


def test_a_drafter_waits_for_a_target_that_is_still_loading(waiting):
    store, ended = waiting
    time.sleep(1.5)  # longer than two that are both there may take to connect
    store.set("features/0", "")
    end = ProcessChannel(store, 0, LOCAL, name="pearl-0")
    assert not ended
    end.close()
    assert end.closed_cleanly


def test_a_drafter_that_nobody_will_ask_for_again_ends_well(waiting):
    store, ended = waiting
    store.set("features/0", "over")
    deadline = time.perf_counter() + 10
    while not ended and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert ended == ["well"]
