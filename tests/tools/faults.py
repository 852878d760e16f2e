"""Drafters that something happens to: what, and when, is drawn by a seeded generator.

A drafter under test is forked from a nursery, a process that has loaded torch and the draft model once; so a new one is
there within milliseconds. It is told by SIGUSR1, wherever its main thread is just then, what is to happen to it.

    python tests/tools/faults.py --count 1000            so many faults, one after the other; exit code 1 if one cost
    anything
    python tests/tools/faults.py --count 48 --default    the same on the default pair
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from pearl.config.engine_config import DRAFT, EMBEDDED
from pearl.core.params import SamplingParams
from pearl.engine import Engine
from pearl.machine.parent import end_with_parent
from pearl.parallel.child import WorkerSpec

KINDS = ("kill", "stop", "pause", "exit", "exception", "memory", "garbage", "nonsense", "broken", "late")
MODES = ("pearl", "sd", "pearl-no-pre", "pearl-no-post", "tree")
PROMPTS = ("def the(thing):\n", "in the beginning", "the thing in the thing in the thing in", "x " * 40)
SILENCE_S = 2.0
SLACK_S = 0.5  # that a busy machine may add to a wait
PAUSE_S = 0.6  # of a stopped or late drafter; longer than the deadline, shorter than a silence


OPTIONS: dict[str, Any] = dict(dtype="float32", max_length=300, max_draft_restarts=1000, heartbeat_timeout_s=SILENCE_S)


@dataclass(frozen=True)
class Fault:
    """`moment`: seconds after the text was begun, or tokens of it. `starting`: it meets the drafter that comes next."""

    kind: str
    mode: str
    gamma: int | str
    prompt: str
    params: SamplingParams
    after_s: float | None
    after_tokens: int
    starting: bool

    @staticmethod
    def drawn(rng: random.Random) -> Fault:
        params = SamplingParams(
            max_new_tokens=rng.randint(4, 40),
            ignore_eos=True,
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(99),
        )
        after_s = rng.choice([None, rng.uniform(0, 0.03)])  # by the clock: also while the prompt is read
        return Fault(
            rng.choice(KINDS),
            rng.choice(MODES),
            rng.choice(["auto", 3]),
            rng.choice(PROMPTS),
            params,
            after_s,
            rng.randrange(params.max_new_tokens),
            rng.random() < 0.1,
        )


class Forked:
    """A process that the nursery has forked, as `subprocess.Popen` would show it; the kernel buries it."""

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        return None if psutil.pid_exists(self.pid) else -signal.SIGKILL

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.perf_counter() + (60 if timeout is None else timeout)
        while self.poll() is None:
            if time.perf_counter() >= deadline:
                raise subprocess.TimeoutExpired("drafter", timeout or 60)
            time.sleep(0.002)
        return -signal.SIGKILL


class Nursery:
    """`start` stands in for `pearl.parallel.child.start`, for any thread. All it has forked is in `pids`."""

    def __init__(self, pair: tuple[str, str], folder: Path, dtype: str = "float32"):
        self.fault = folder / "fault"
        path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "nursery", *pair, dtype, str(self.fault)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=os.open(folder / "drafters.log", os.O_WRONLY | os.O_CREAT, 0o600),
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.pids: list[int] = []
        self.first = self.next = ""  # what is to happen to an engine's first one, or a later one, while it starts
        self._turn = threading.Lock()  # an engine that was closed may still be starting a drafter beside a new engine
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def start(self, _: str, spec: WorkerSpec) -> Forked:
        assert self._process.stdin and self._process.stdout
        with self._turn:
            if spec.number:
                fault, self.next = self.next, ""
            else:
                fault, self.first = self.first, ""
            self._process.stdin.write(json.dumps({"spec": spec.to_json(), "fault": fault}) + "\n")
            self._process.stdin.flush()
            pid = int(self._process.stdout.readline())
            self.pids.append(pid)
        return Forked(pid)

    def strike(self, pid: int, kind: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            if kind in ("kill", "stop", "pause"):
                os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
                if kind == "pause":
                    threading.Timer(PAUSE_S, lambda: _go_on(pid)).start()
            else:
                self.fault.write_text(kind)
                os.kill(pid, signal.SIGUSR1)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


class Pace:
    """A thread that notes for how long this process did not run: a machine with other work makes everybody wait, and
    what is tested is how long we wait of our own accord."""

    TICK_S = 0.02

    def __enter__(self) -> Pace:
        self.stalled_s, self._ended = 0.0, threading.Event()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._tick)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.ran_s = time.perf_counter() - self._began - self.stalled_s

    def _tick(self) -> None:
        before = time.perf_counter()
        while not self._ended.wait(self.TICK_S):
            now = time.perf_counter()
            if now - before > 3 * self.TICK_S:
                self.stalled_s += now - before - self.TICK_S
            before = now


@dataclass
class Outcome:
    """What a fault came to. `pause_s`: the longest that the target waited before a pass; `pass_s`: its longest pass;
    `stalled_s`: how long the machine let nobody run."""

    fault: Fault
    same: bool
    pause_s: float
    pass_s: float
    stalled_s: float

    @property
    def wait_s(self) -> float:
        """Beyond a pass."""
        return self.pause_s - self.pass_s - self.stalled_s


def suffer(engine: Engine, nursery: Nursery, fault: Fault) -> Outcome:
    """Writes a text while something happens to the drafter."""
    alone = engine.generate(fault.prompt, fault.params, mode="ar").tokens
    wait_until_back(engine)
    pid = engine.runtime.drafter_pid
    assert pid
    kind = fault.kind
    if fault.starting:
        nursery.next, kind = kind, "kill"
    with Pace() as pace:
        stream = engine.stream(fault.prompt, fault.params, mode=fault.mode, gamma=fault.gamma)
        timer = None
        if fault.after_s is not None:
            timer = threading.Timer(fault.after_s, lambda: nursery.strike(pid, kind))
            timer.start()
        said = []
        for token in stream:
            if timer is None and len(said) == fault.after_tokens:
                nursery.strike(pid, kind)
            said.append(token)
        if timer:
            timer.join()
    passes = engine.runtime.target.passes
    pause, longest = max(p.waited_s for p in passes), max(p.forward_s for p in passes)
    return Outcome(fault, said == alone, pause, longest, pace.stalled_s)


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    files: int
    threads: int
    children: int
    memory_mb: float

    @staticmethod
    def of(pid: int | None = None) -> Footprint:
        one = psutil.Process(pid)
        return Footprint(one.num_fds(), one.num_threads(), len(one.children()), one.memory_info().rss / 1e6)

    def grown_since(self, before: Footprint) -> tuple[int, int, int, float]:
        counts = self.files - before.files, self.threads - before.threads, self.children - before.children
        return (*counts, round(self.memory_mb - before.memory_mb, 1))


def write_many(engine: Engine, texts: int, tokens: int) -> int:
    """Texts in every mode in turn, some of them side by side where there are places. Returns their passes."""
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    modes, passes = ("ar", *MODES), 0
    for number in range(0, texts, engine.model.max_sequences):
        prompts = [[5 + (number + place) % 90, 7, 9] for place in range(engine.model.max_sequences)]
        for text in engine.generate(prompts, params, mode=modes[number % len(modes)]):
            passes += len(text.stats.passes)
    target = engine.runtime.target
    assert (
        not target._batch.live and not target._batch.ended and len(target._batch._last_in) <= engine.model.max_sequences
    ), "a place is not free"
    return passes


def wait_until_back(engine: Engine, seconds: float = 60.0) -> None:
    """Until there is a drafter that is not late. Only time in which this process runs counts."""
    before = time.perf_counter()
    while engine.runtime.target.channel.lost:
        time.sleep(0.005)
        now = time.perf_counter()
        seconds, before = seconds - min(now - before, 0.1), now
        assert seconds > 0, f"no drafter came back: {engine.events[-5:]}"


# The nursery


def _child(spec: WorkerSpec, at_start: str, source: Any, fault: Path) -> None:
    import numpy as np
    from torch.distributed import TCPStore

    from pearl.core.messages import Guess, Nodes
    from pearl.parallel import drafter_main
    from pearl.parallel.world import LOCAL

    made: list[Any] = []
    connect = drafter_main.connect

    def connecting(*arguments: Any) -> Any:
        made.append(connect(*arguments))
        return made[-1]

    drafter_main.connect = connecting
    rng = random.Random(os.getpid())

    def happen(kind: str) -> None:
        if kind == "exit":
            os._exit(3)
        if kind == "exception":
            raise RuntimeError("something broke in the drafter")
        if kind == "memory":
            raise MemoryError("no memory left")
        if kind == "late":
            time.sleep(PAUSE_S)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ("stop", "pause"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "broken":
            for name in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                        os.close(int(name))
        if not made:
            return
        if kind == "garbage":
            count = rng.choice([16, 16, 16, 5, 40])  # words, in one frame or in several
            words = np.array([rng.randrange(-(1 << 31), 1 << 31) for _ in range(count)], np.int32)
            words[: rng.choice([0, 1])] = rng.randrange(9)
            words[1 : rng.choice([1, 2])] = rng.choice([count, 3, 20, 1 << 20])
            made[-1]._connection.send(words)
        if kind == "nonsense":
            guess = Guess(rng.randrange(99), rng.randrange(99), rng.choice([-1, 1 << 30]), (), rng.choice([0.0, 5.0]))
            for sequence in range(500):  # one of them may be under way
                made[-1]._send(Nodes(sequence, 0, rng.choice([-1, 5, 1 << 20]), False, (guess,)))

    def struck(*_: object) -> None:
        happen(fault.read_text())

    signal.signal(signal.SIGUSR1, struck)

    def make() -> Any:
        happen(at_start)
        return source

    end_with_parent(os.getppid(), "the nursery", "drafter")
    store = TCPStore(LOCAL, spec.port, 2, is_master=False)
    try:
        drafter_main.serve(spec.config, spec.cpus, store, LOCAL, make, spec.number)
    except drafter_main.TargetGone:
        os._exit(1)


def survived(outcome: Outcome, deadline_s: float) -> bool:
    return outcome.same and outcome.wait_s <= deadline_s + SLACK_S


def nursery() -> None:
    import torch

    from pearl.config.engine_config import EngineConfig
    from pearl.parallel.draft_sources import draft_source

    torch.set_num_threads(1)
    target, draft, dtype, fault = sys.argv[2:]
    source = draft_source(EngineConfig(target, draft, dtype=dtype, max_length=OPTIONS["max_length"]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                told = json.loads(line)
                _child(WorkerSpec.from_json(told["spec"]), told["fault"], source, Path(fault))
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)


def _long(engine: Engine) -> None:
    write_many(engine, 40, 60)
    pids = {"target": os.getpid(), "drafter": engine.runtime.drafter_pid}
    before = {role: Footprint.of(pid) for role, pid in pids.items()}
    texts = passes = 0
    while texts < 200 or passes < 10_000:
        passes += write_many(engine, 20, 60)
        texts += 20
    print(f"{texts} texts, {passes} passes")
    for role, pid in pids.items():
        files, threads, children, memory = Footprint.of(pid).grown_since(before[role])
        print(f"{role}: {files:+d} files, {threads:+d} threads, {children:+d} processes, {memory:+.1f} MB")


def main() -> int:
    """Many faults on a tiny pair, and what they came to."""
    import tempfile

    import tiny

    from pearl.parallel import drafter_process
    from pearl.wire import reconnecting_channel

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=1000)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--default", action="store_true", help="on the default pair, not on a tiny one")
    made.add_argument("--long", action="store_true", help="no fault: what 200 texts and 10,000 passes leave behind")
    found = made.parse_args()
    reconnecting_channel.BACK_OFF_S = 0.0
    rng, bad, pauses = random.Random(found.seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        pair = (EMBEDDED, DRAFT) if found.default else tiny.save_pair(Path(folder))
        dtype = "bfloat16" if found.default else "float32"
        drafters = Nursery(pair, Path(folder), dtype)
        drafter_process.start = drafters.start
        with Engine.from_pretrained(*pair, **{**OPTIONS, "dtype": dtype}) as engine:
            if found.long:
                _long(engine)
                found.count = 0
            for number in range(found.count):
                outcome = suffer(engine, drafters, Fault.drawn(rng))
                pauses.append(outcome.wait_s)
                if not survived(outcome, engine.runtime.config.draft_timeout_s):
                    bad += 1
                    print(f"fault {number}: {outcome}", flush=True)
            kinds = Counter(event.kind for event in engine.events)
        drafters.close()
        if found.long:
            return 0
        left = [pid for pid in drafters.pids if Forked(pid).poll() is None]
    pauses.sort()
    half, most = (max(0.0, pauses[round(part * (len(pauses) - 1))]) for part in (0.5, 0.99))
    waits = f"half below {half:.3f} s, 99 % below {most:.3f} s, longest {pauses[-1]:.3f} s"
    print(
        f"{found.count} faults, seed {found.seed}: {bad} cost a token or a long wait, {len(left)} orphans; "
        f"waits beyond a pass: {waits}; events {dict(kinds)}"
    )
    return bool(bad or left)


if __name__ == "__main__":
    sys.exit(nursery() if sys.argv[1:2] == ["nursery"] else main())
