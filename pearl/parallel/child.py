"""Processes that this one starts: what they are told, and who ends with whom.

No child outlives its parent, however that ends. Ctrl-C is the parent's affair, which ends its children.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import psutil

from pearl.config.engine_config import EngineConfig
from pearl.errors import CheckpointError, UsageError
from pearl.machine import logs
from pearl.machine.parent import end_with_parent

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """What a started process is told."""

    config: EngineConfig
    port: int  # of the parent's store
    cpus: list[int]
    number: int = 0  # of the drafter's connection, or the rank within the target
    deadline_s: float = 0.0  # without a word from the parent, after which it is taken for dead; 0: the config's
    parent: int = field(default_factory=os.getpid)
    log_level: int = field(default_factory=logs.level)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSpec:
        values = json.loads(text)
        return WorkerSpec(EngineConfig(**values.pop("config")), **values)


def start(module: str, spec: WorkerSpec, **environment: str) -> subprocess.Popen:
    """Starts a module of ours as a program, with as many threads as it has CPUs."""
    threads = {limit: str(len(spec.cpus)) for limit in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    told = {**threads, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", module, spec.to_json()]
    return subprocess.Popen(command, env={**os.environ, **told}, stdin=subprocess.DEVNULL)


def received(role: str) -> WorkerSpec:
    """In the started process: what it is told. From now on it ends when its parent does."""
    spec = WorkerSpec.from_json(sys.argv[1])
    logs.write_lines(spec.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(spec.parent, "the target", role)
    return spec


class TargetGone(Exception):
    """The processes that this one works for have ended or can't be reached any more, and have not said goodbye. The
    message says who, and why."""


def guarded(role: str, run: Callable[[], None]) -> int:
    """The exit code of a process that works for a target. What a user can put right the target says, who is told."""
    try:
        run()
    except TargetGone as gone:
        _log.warning("the %s has lost %s and ends.", role, gone)
        return 1
    except (UsageError, CheckpointError):
        return 2
    return 0


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
