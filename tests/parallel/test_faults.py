"""Whatever happens to the drafter, and whenever: the text is the target's own, and no wait is long.

A hundred faults drawn by a seeded generator, on processes of their own. More of them: python tests/tools/faults.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Collection

import faults
import forks
import psutil
import pytest
from faults import KINDS, OPTIONS, Fault, Footprint, Nursery, Pace
from programs import start, torchrun

from pearl.config.engine_config import DEADLINE_S
from pearl.engine import Engine
from pearl.machine import cores
from pearl.parallel import drafter_process
from pearl.parallel.child import is_stopped
from pearl.wire import reconnecting_channel

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]


@pytest.fixture(scope="module")
def nursery(pair, own_cache, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconnecting_channel, "BACK_OFF_S", 0.0)
        made = Nursery(pair, tmp_path_factory.mktemp("nursery"))
        patch.setattr(drafter_process, "start", made.start)
        yield made
        made.close()


@pytest.fixture(scope="module")
def engine(pair, nursery):
    with Engine.from_pretrained(*pair, **OPTIONS) as made:
        yield made


@pytest.mark.parametrize("seed", range(6))
def test_ten_faults_cost_no_token_and_no_long_wait(engine, nursery, seed):
    rng = random.Random(seed)
    outcomes = [faults.suffer(engine, nursery, Fault.drawn(rng)) for _ in range(10)]
    assert [one for one in outcomes if not faults.survived(one, DEADLINE_S)] == []
    faults.wait_until_back(engine)
    living = [pid for pid in nursery.pids if faults.Forked(pid).poll() is None]
    assert living == [engine.runtime.drafter_pid]


@pytest.mark.parametrize("kind", KINDS)
def test_after_each_kind_of_fault_the_drafter_is_back_and_speculates(engine, nursery, kind):
    faults.wait_until_back(engine)
    nursery.strike(engine.runtime.drafter_pid, kind)
    params = faults.SamplingParams(max_new_tokens=12, ignore_eos=True)
    engine.generate("the", params, mode="pearl")
    faults.wait_until_back(engine)
    alone = engine.generate(faults.PROMPTS[0], params, mode="ar").tokens
    for _ in range(20):  # a stopped one is found out only when it has been silent, and may be going to be replaced
        text = engine.generate(faults.PROMPTS[0], params, mode="sd", gamma=3)
        assert text.tokens == alone
        if sum(p.accepted for p in text.stats.passes):
            return
        faults.wait_until_back(engine)
    pytest.fail("nothing of the drafter's was accepted any more")


@pytest.mark.parametrize("kind", ["kill", "stop", "exception", "garbage"])
def test_an_engine_closes_in_time_whatever_has_just_happened(pair, nursery, kind):
    with Engine.from_pretrained(*pair, **OPTIONS) as made:
        pid = made.runtime.drafter_pid
        made.generate("the", faults.SamplingParams(max_new_tokens=4), mode="pearl")
        nursery.strike(pid, kind)
        with Pace() as pace:
            made.close()
    assert pace.ran_s < 4.5  # 2 s for a goodbye, and what an end takes
    assert faults.Forked(pid).poll() is not None and faults.Forked(nursery.pids[-1]).poll() is not None


@pytest.mark.parametrize("kind", ["kill", "stop", "exit", "memory"])
def test_a_drafter_that_falls_while_it_starts_is_started_again(pair, nursery, kind):
    nursery.first = kind
    with Engine.from_pretrained(*pair, **OPTIONS) as made:
        params = faults.SamplingParams(max_new_tokens=8, ignore_eos=True)
        first = made.generate("the", params, mode="pearl").tokens
        faults.wait_until_back(made)
        assert made.generate("the", params, mode="pearl").tokens == first
        assert [event.kind for event in made.events] == ["lost", "back"]


def test_a_stuck_drafter_that_is_not_started_again_is_ended(pair, nursery):
    with Engine.from_pretrained(*pair, **{**OPTIONS, "max_draft_restarts": 0, "heartbeat_timeout_s": 0.5}) as made:
        pid = made.runtime.drafter_pid
        nursery.strike(pid, "stop")
        params = faults.SamplingParams(max_new_tokens=8)
        alone = made.generate("the", params, mode="ar").tokens
        assert told(made, "alone", 30.0)
        assert gone({pid}, 5.0)
        assert made.generate("the", params, mode="pearl").tokens == alone
        assert [event.kind for event in made.events if event.kind != "late"] == ["lost", "alone"]


# Nothing is left behind


def test_many_texts_and_passes_leave_nothing_behind(engine):
    """python tests/tools/faults.py --long writes 200 texts with 10,000 passes."""
    faults.wait_until_back(engine)
    faults.write_many(engine, 12, 40)
    pids, grown = (os.getpid(), engine.runtime.drafter_pid), []
    for _ in range(3):  # what is left behind by texts is so every time; what something else opens meanwhile is not
        before = [Footprint.of(pid) for pid in pids]
        assert faults.write_many(engine, 36, 40) > 500
        grown.append([Footprint.of(pid).grown_since(was) for pid, was in zip(pids, before, strict=True)])
        if all(max(counts) <= 0 and memory < 8 for *counts, memory in grown[-1]):  # fewer: what was lost earlier
            return
    pytest.fail(f"files, threads, children and MB more, of the target and the drafter: {grown}")


@pytest.mark.skipif(len(cores.available()) < 2, reason="each has a core")
def test_a_drafter_on_cores_that_were_named_is_started_anew(pair, nursery):
    """By a thread of the target's, which is kept to other ones."""
    first, *_, last = cores.available()
    with Engine.from_pretrained(*pair, **OPTIONS, target_cores=str(first), draft_cores=str(last)) as made:
        os.kill(made.runtime.drafter_pid, signal.SIGKILL)
        made.generate("the", faults.SamplingParams(max_new_tokens=8), mode="pearl")
        faults.wait_until_back(made)
        assert os.sched_getaffinity(made.runtime.drafter_pid) == {last}


def test_engines_and_lost_drafters_leave_no_thread_and_no_file(pair, nursery):
    def once() -> None:
        with Engine.from_pretrained(*pair, **OPTIONS) as made:
            for _ in range(3):
                os.kill(made.runtime.drafter_pid, signal.SIGKILL)
                made.generate("the", faults.SamplingParams(max_new_tokens=8), mode="pearl")
                faults.wait_until_back(made)

    once()
    before = Footprint.of()
    for _ in range(2):
        once()
    whole_by = time.monotonic() + 20
    while True:  # an attempt to reach a drafter that has just been killed may be under way, and ends by itself
        files, threads, _, _ = Footprint.of().grown_since(before)
        if files <= 2 and threads <= 0:
            break
        assert time.monotonic() < whole_by, (files, threads)
        time.sleep(0.1)


# The target or the launcher is lost


PROGRAM = """
import os, sys, time
from pearl import Engine, SamplingParams

with Engine.from_pretrained(*sys.argv[1:], dtype="float32", max_length=300) as engine:
    print(os.getpid(), engine.runtime.drafter_pid, flush=True)
    while True:
        engine.generate("the", SamplingParams(max_new_tokens=20, ignore_eos=True))
"""


def descendants(pid: int) -> set[int]:
    """All processes below one, and itself."""
    return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}


def told(engine: Engine, kind: str, seconds: float) -> bool:
    """Whether the engine, which looks for its drafter only when it is asked, knows of such an event in time."""
    deadline = time.perf_counter() + seconds
    while all(event.kind != kind for event in engine.events):
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.05)
    return True


def gone(pids: set[int], seconds: float) -> bool:
    """Whether all end within so many seconds, in which this process runs too. While all are held by a signal, which
    may be somebody else's, time counts a tenth; while some want a core, it is the time that the busiest has one."""
    began, left, used = time.perf_counter(), seconds, work(pids)
    while living := [pid for pid in pids if faults.Forked(pid).poll() is None and not zombie(pid)]:
        time.sleep(0.05)
        now, before, used = time.perf_counter(), used, work(living)
        if all(is_stopped(pid) for pid in living):
            left -= min(now - began, 0.1) * 0.1
        elif any(wants_a_core(pid) for pid in living):
            left -= max(0.0, *(used[pid] - before[pid] for pid in living))
        else:
            left -= min(now - began, 0.1)
        began = now
        if left < 0:
            print("still there:", living)
            return False
    return True


def work(pids: Collection[int]) -> dict[int, float]:
    """Seconds that each has had a core."""
    times = {}
    for pid in pids:
        times[pid] = 0.0
        with contextlib.suppress(psutil.Error):
            times[pid] = sum(psutil.Process(pid).cpu_times()[:2])
    return times


def wants_a_core(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_RUNNING
    return False


def zombie(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_when_the_target_ends_the_drafter_ends_within_five_seconds(pair, tmp_path, how):
    program = start(tmp_path, PROGRAM, *pair)
    target, drafter = map(int, program.stdout.readline().split())
    time.sleep(0.3)
    os.kill(target, how)
    assert gone({target, drafter}, 5.0)
    _, said = program.communicate(timeout=10)
    assert program.returncode != 0
    if how != signal.SIGINT:  # there the target says goodbye
        assert "has ended, so the drafter ends too" in said or "has lost its target" in said


@pytest.mark.parametrize("victim", ["launcher", "target", "drafter"])
def test_under_torchrun_nobody_outlives_the_others(pair, tmp_path, victim):
    program = start(tmp_path, PROGRAM, *pair, launcher=torchrun())
    target = int(program.stdout.readline().split()[0])
    everybody = descendants(program.pid)
    drafter = forks.ranks_of(program.pid)["1"].pid
    os.kill({"launcher": program.pid, "target": target, "drafter": drafter}[victim], signal.SIGKILL)
    assert gone(everybody, 5.0)
    program.communicate(timeout=10)
    assert program.returncode != 0
