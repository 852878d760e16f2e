"""One process group of two: what is said arrives, and whatever else comes ends the connection and nothing more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import psutil
import pytest
import torch
from tiers import tiered
from torch.distributed import HashStore, TCPStore

from pearl.config.engine_config import EngineConfig
from pearl.core.messages import DraftPlan, End, Nodes, SentSeparately, Start, Verdict
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.drafters.draft_source import DraftSource
from pearl.parallel.drafter_main import TargetGone, serve
from pearl.wire import connection
from pearl.wire.codec import encode
from pearl.wire.frames import FEATURES, MESSAGES, size
from pearl.wire.process_channel import ProcessChannel

LOCAL = "127.0.0.1"


def pair(silence_s: float = 5.0, ahead_s: float = 0.0) -> tuple[ProcessChannel, ProcessChannel]:
    """`ahead_s`: of the second's clock."""

    def clock() -> float:
        return time.perf_counter() + ahead_s

    store, made = HashStore(), []
    other = threading.Thread(target=lambda: made.append(ProcessChannel(store, 1, LOCAL, silence_s, clock=clock)))
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
        assert here.bytes_sent == there.bytes_received == sum(map(size, said))


def test_messages_that_are_said_at_once_travel_together(both):
    said = [End(1), Verdict(2, 5, DraftPlan(), tuple(range(40))), Nodes(3, 1, 1, False)]
    both[0].send(*said)
    assert [heard(both[1]) for _ in said] == said
    assert both[0].bytes_sent == both[1].bytes_received == size(*said)


@pytest.mark.parametrize("ahead_s", tiered([0.0, 1e6, -77.5], lambda ahead_s: ahead_s > 0))
def test_times_of_another_machine_arrive_by_the_clock_of_this_one(ahead_s):
    both = pair(ahead_s=ahead_s)
    deadline = time.perf_counter() + 10
    while not all(one.peer_clock._exchanges for one in both):
        assert time.perf_counter() < deadline
        time.sleep(0.01)
    moments = tuple(float(n) for n in range(100, 110))
    both[1].send(Nodes(1, 1, 1, False, (), tuple(moment + ahead_s for moment in moments)))
    found = heard(both[0])
    assert isinstance(found, Nodes)
    off = [there - here for here, there in zip(moments, found.spans, strict=True)]
    assert max(map(abs, off)) < 0.1, "half of what a beat takes, on a machine that is busy"
    assert ahead_s or not any(off), "one clock is one clock, to the bit"
    for one in both:
        one.close()


def test_beats_do_not_keep_a_message_alive_that_never_ends():
    """A length that was never meant: beats fill it, a frame at a time, for ever."""
    first, second = pair(silence_s=0.5)
    words = encode(End(1))
    words[1] = 1 << 20
    first._connection.send(words)
    began = time.perf_counter()
    assert heard(second, 30.0) is None and second.lost
    assert time.perf_counter() - began < 30.0 and "silent" in second.reason
    for one in (first, second):
        one.close()


def test_sending_never_waits_for_a_reader(both):
    features = np.zeros((1000, 20_000), np.int16)  # 40 MB, far more than the system's buffers take
    message = Verdict(1, 5, DraftPlan(), (1,), features)
    began = time.perf_counter()
    both[0].send(message, End(1))
    assert time.perf_counter() - began < 1.0
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
    both[side]._connection.shut()
    began = time.perf_counter()
    both[1 - side].wait(5)
    assert both[1 - side].lost and time.perf_counter() - began < 0.5
    assert both[1 - side].reason == "the connection was closed"
    both[1 - side].send(End(1))  # harmless


def whole(*words: int) -> np.ndarray:
    return np.array([*words, *[0] * (MESSAGES.words - len(words))], np.int32)


GARBAGE = {
    "noise": np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 2 * MESSAGES.words).astype(np.int32),
    "zeros": whole(),
    "a length that no memory holds": whole(3, 1 << 27),
    "a length below none": whole(3, -5),
    "no kind": whole(99, 16),
    "more than it says": np.concatenate([encode(Nodes(1, 1, 1, False)), whole(1, 1, 1)]),
    "features that do not come": encode(Verdict(1, 5, DraftPlan(), (1,), SentSeparately((1000, 1000)))),
}


@pytest.mark.parametrize("words", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_the_connection_and_nothing_more(words):
    here, there = pair(silence_s=0.5)
    before = psutil.Process().memory_info().rss
    there._connection.send(words)
    deadline = time.perf_counter() + 5
    while not here.lost and time.perf_counter() < deadline:
        here.wait(0.05)
        here.receive()
    assert here.lost and here.reason
    assert psutil.Process().memory_info().rss - before < 100e6, "memory for what has not come"
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


def listening() -> set[int]:
    """The ports at which this process listens."""
    return {one.laddr.port for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}


def test_a_stranger_at_the_port_is_not_heard():
    before, store, made = listening(), HashStore(), []
    other = threading.Thread(target=lambda: made.append(ProcessChannel(store, 0, LOCAL)))
    other.start()
    while not (ports := listening() - before):
        time.sleep(0.01)
    strangers = [socket.create_connection((LOCAL, port)) for port in ports for _ in range(3)]
    for stranger, said in zip(strangers, (b"x" * 1000, b"", b"GET / HTTP/1.1"), strict=True):
        stranger.sendall(said)
    right = ProcessChannel(store, 1, LOCAL)
    other.join(5)
    right.send(End(3))
    assert heard(made[0]) == End(3)
    for one in (made[0], right):
        one._lose("over")
        one.close()
    for stranger in strangers:
        stranger.close()


def test_a_rank_that_never_comes_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_S", 0.2)
    for rank in (0, 1):
        with pytest.raises(RuntimeError):
            ProcessChannel(HashStore(), rank, LOCAL)


def test_closed_connections_leave_no_thread_and_no_file():
    def once() -> None:
        here, there = pair()
        there._lose("gone")
        here.wait(2)
        for one in (here, there):
            one.close()

    once()
    process, before = psutil.Process(), (threading.active_count(), psutil.Process().num_fds())
    threads = process.num_threads()
    for _ in range(20):
        once()
    assert (threading.active_count(), process.num_fds()) == before and process.num_threads() <= threads


def test_what_has_left_is_let_go_of(both):
    for number in range(500):
        both[0].send(End(number))
    for number in range(500):
        assert heard(both[1]) == End(number)
    sender, whole_by = both[0]._connection, time.monotonic() + 20
    while sender._sent and time.monotonic() < whole_by:  # by the thread that sends the signs of life, and no other
        sender.hurry.set()
        time.sleep(0.01)
    with sender._turn:
        assert not sender._sent and sender._waiting == 0


def test_who_takes_nothing_costs_no_more_memory_than_agreed(both, monkeypatch):
    monkeypatch.setattr(connection, "_MOST_WAITING", 1 << 16)
    over = threading.Event()

    def receive(*_: object) -> None:
        over.wait(3600)
        raise RuntimeError("the test is over")

    monkeypatch.setattr(both[1]._connection, "receive", receive)
    both[0].send(End(0))
    heard(both[1], 0.2)
    for number in range(2000):
        both[0].send(End(number))
    assert both[0].lost and both[0]._connection._waiting < 1 << 17
    over.set()


class Counted:
    """A group, and all that was posted to it."""

    def __init__(self, group):
        self.group, self.frames = group, []

    def send(self, tensors, rank, tag):
        self.frames.append((tag, *(tensor.numel() for tensor in tensors)))
        return self.group.send(tensors, rank, tag)

    def recv(self, tensors, rank, tag):
        self.frames.append((tag, *(tensor.numel() for tensor in tensors)))
        return self.group.recv(tensors, rank, tag)


def test_every_frame_passes_through_torch_distributed_and_a_lane_has_one_size(monkeypatch):
    groups, real = [], connection.gloo_group

    def counted(*arguments):
        groups.append(Counted(real(*arguments)))
        return groups[-1]

    monkeypatch.setattr(connection, "gloo_group", counted)
    here, there = pair()
    start = Start(1, Schedule.of("pearl"), SamplingParams(seed=3), tuple(range(1000)), DraftPlan())
    verdict = Verdict(1, 5, DraftPlan(), (1, 2), np.ones((3, 5), np.int16))
    said = [start, verdict, Nodes(1, 1, 1, False), End(1)]
    for message in said:
        here.send(message)
    for message in said:
        assert encode(heard(there)).tolist() == encode(message).tolist()
    for end in (here, there):
        end._lose("over")
        end.close()
    frames = [frame for group in groups for frame in group.frames]
    assert {frame for frame in frames if frame[0] < 2} == {tuple(MESSAGES), tuple(FEATURES)}
    sent = sum(4 * words for group in groups[:2] for tag, words in group.frames if tag < 2)
    assert sent >= here.bytes_sent


FORGOTTEN = """
import threading
from torch.distributed import HashStore
from pearl.wire.process_channel import ProcessChannel

store, made = HashStore(), []
other = threading.Thread(target=lambda: made.append(ProcessChannel(store, 1, "127.0.0.1")))
other.start()
made.append(ProcessChannel(store, 0, "127.0.0.1"))
other.join()
print("connected")
"""


def test_a_program_that_forgets_to_close_ends_well():
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", FORGOTTEN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "connected\n", "")
    assert time.perf_counter() - began < 30


class Nothing(DraftSource):
    """A source that never has a guess."""

    def propose(self, text, room):
        return []


REACHING = """
import time
from torch import distributed as dist
from pearl.errors import Unreachable
from pearl.wire import connection, process_channel
from pearl.wire.reconnecting_channel import ReconnectingChannel
connection.CONNECT_S = 2.0
store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)

def reach(number):
    try:
        return process_channel.ProcessChannel(store, 0, "127.0.0.1")  # nobody comes
    except RuntimeError as error:
        raise Unreachable(str(error))

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(3)  # while the interpreter ends, the attempt does too

slow = Slow()
channel = ReconnectingChannel(reach, 10, restarts=0)
time.sleep(0.5)
channel.close()
"""


@pytest.mark.slow
def test_a_program_that_ends_while_it_reaches_for_a_drafter_ends_well():
    done = subprocess.run([sys.executable, "-c", REACHING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr  # torch itself warns of a rank that does not come


@pytest.fixture
def waiting(monkeypatch) -> Iterator[tuple[object, list[str]]]:
    """The store of a drafter that is ready before its target is, and how the drafter has ended."""
    monkeypatch.setattr(connection, "CONNECT_S", 1.0)
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
