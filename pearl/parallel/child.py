"""Processes that this one starts: what they are told, and who ends with whom.

No child outlives its parent, however that ends. Ctrl-C is the parent's affair, which ends its children.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import psutil

from pearl.config.engine_config import EngineConfig
from pearl.machine.launcher import LaunchEnv

_SPEC = "PEARL_WORKER"  # what a started process finds in its environment
_LOOK_S = 0.25


@dataclass(frozen=True)
class WorkerSpec:
    """What a started process is told."""

    config: EngineConfig
    port: int  # of the parent's store
    cpus: list[int]
    number: int = 0  # of the drafter's connection, or the rank within the target
    deadline_s: float = 0.0  # without a word from the parent, after which it is taken for dead; 0: the config's
    parent: int = field(default_factory=os.getpid)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSpec:
        values = json.loads(text)
        return WorkerSpec(EngineConfig(**values.pop("config")), **values)


def start(module: str, spec: WorkerSpec, **environment: str) -> subprocess.Popen:
    """Starts a module of ours as a program, with as many threads as it has CPUs."""
    threads = {limit: str(len(spec.cpus)) for limit in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    told = {**threads, **environment, _SPEC: spec.to_json(), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-m", module], env={**os.environ, **told}, stdin=subprocess.DEVNULL)


def received(role: str) -> WorkerSpec:
    """In the started process: what it is told. From now on it ends when its parent does."""
    spec = WorkerSpec.from_json(os.environ[_SPEC])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(spec.parent, "the target", role)
    return spec


def end(child: subprocess.Popen, patience_s: float) -> None:
    """Waits so long for the end of a process that we started, then kills it."""
    try:
        child.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is held by a signal."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def end_with_parent(parent: int, whose: str, role: str) -> None:
    """Of a process that we started: it ends, with one line and exit code 1, when its parent has ended."""
    _when_orphaned(parent, whose, role, lambda: os._exit(1))


def end_with_launcher(role: str) -> Callable[[], None]:
    """Of a process that torchrun or `accelerate launch` has started: when that has ended, it gets the signal which its
    launcher would have sent. It is the user's process, so what becomes of it then is the user's affair. Returns what
    ends the watch."""
    if not LaunchEnv.read().watched:
        return lambda: None
    return _when_orphaned(os.getppid(), "the launcher", role, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _when_orphaned(parent: int, whose: str, role: str, then: Callable[[], None]) -> Callable[[], None]:
    """By looking now and then. The kernel's own signal (PR_SET_PDEATHSIG) comes when the *thread* that started a child
    ends, and a lost drafter is started anew by a thread that ends."""
    over = threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            if over.wait(_LOOK_S):
                return
        print(f"pearl: {whose} (process {parent}) has ended, so the {role} ends too.", file=sys.stderr, flush=True)
        then()

    threading.Thread(target=watch, name="pearl-parent", daemon=True).start()
    return over.set
