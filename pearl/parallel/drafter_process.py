"""The drafter's process as its target has it: started where no launcher has done so, reached, started anew, and ended.

The two meet in a store. The drafter says there that it is ready, or why not; the target, from where its features will
come; then they connect. Each connection has a number.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time

import torch
import torch.distributed as dist

from pearl.config.engine_config import EngineConfig
from pearl.config.inputs import brief
from pearl.errors import Unreachable, UsageError, WorkerLostError
from pearl.machine import cores, launcher
from pearl.parallel.child import WorkerSpec, end, is_stopped, start
from pearl.parallel.world import LOCAL, World, await_key, meeting, own_store
from pearl.wire.feature_transport import FeatureTransport
from pearl.wire.process_channel import ProcessChannel

# keys: what the drafter says, and the device that its features come from
DRAFTER, FEATURES_FROM = "drafter", "features"
READY = "ready"
GONE = "gone: "  # before a reason that may be another one the next time
OVER = "over"  # in place of a device: there is no further connection
_END_S = 2.0  # that a drafter which has said goodbye may take to end


def connect(
    store: dist.Store, number: int, rank: int, device: str | torch.device, host: str | None, config: EngineConfig
) -> ProcessChannel:
    """One end of connection `number`. `device`: where features leave from or go to; empty: they ride on the verdicts.
    Raises `RuntimeError` if the other end does not come."""
    transport = None
    if device:
        lanes = dist.PrefixStore(f"{FEATURES_FROM}-{number}", store)
        transport = FeatureTransport.open(lanes, rank, torch.device(device), host)
    return ProcessChannel(store, rank, host, config.heartbeat_timeout_s, f"pearl-{number}", transport)


class DrafterProcess:
    """`reach` may be called from a thread of its own; everything else is for the thread of the engine."""

    def __init__(self, config: EngineConfig, world: World, cpus: list[int], features_from: str = ""):
        """Starts the drafter where no launcher has done so. `features_from`: the device from which features go to it
        beside the channel; empty: they ride on the verdicts."""
        self._config, self._cpus, self._features_from = config, cpus, features_from
        self._child: subprocess.Popen | None = None
        self._closing, self._allowed = threading.Event(), cores.available()
        self._reached = -1  # the last connection that was asked for
        self._launched, self._here = world.size == 2, world.here
        if self._launched:
            self._store, self._host = meeting(f"replica-{world.replica}", world)
        else:
            self._store, self._host = own_store(2), LOCAL
            self._start(0)

    @property
    def pid(self) -> int | None:
        """Of a drafter that we started, until it was reaped: then the number may be somebody else's."""
        return self._child.pid if self._child and self._child.poll() is None else None

    @property
    def stopped(self) -> bool:
        """Whether a signal holds a drafter that we started, so that it hears nothing."""
        return self._child is not None and is_stopped(self._child.pid)

    def reach(self, number: int) -> ProcessChannel:
        """The drafter's connection `number`. Where the drafter is ours, each but the first is to one started anew.

        Raises `UsageError` with its reason if it can't start, `Unreachable` if it is gone or does not come.
        """
        self._reached = number
        if number and not self._launched:
            self._end_child()
            self._start(number)
        try:
            self._store.set(f"{FEATURES_FROM}/{number}", self._features_from)
            said = self._await_word(number)
        except (RuntimeError, WorkerLostError) as error:  # the launcher is gone
            raise Unreachable(brief(error)) from None
        if said != READY and (number or said.startswith(GONE)):  # it could start once, so it may again
            raise Unreachable(said.removeprefix(GONE))
        if said != READY:
            raise UsageError(said)
        try:
            return connect(self._store, number, 0, self._features_from, self._host, self._config)
        except RuntimeError as error:
            raise Unreachable(f"it was ready, but did not connect: {brief(error)}") from None

    def give_up(self) -> None:
        """Ends what is left of a drafter that is ours and will not be started again; a launcher's is let go."""
        self._end_child()
        self._let_go()

    def close(self, stuck: bool = False) -> None:
        """Ends the drafter if it is ours. `stuck`: it has not heard a goodbye, so it is not waited for."""
        self._closing.set()
        self._end_child(patience_s=0.0 if stuck else _END_S)
        self._let_go()

    def _let_go(self) -> None:
        """Tells a launcher's drafter that waits for its next connection that there will be none: it ends well, as
        otherwise the launcher would end the target too."""
        if not self._launched or launcher.orphaned(self._here):
            return
        with contextlib.suppress(RuntimeError):  # the launcher has just gone
            for number in range(self._reached + 1, self._config.max_draft_restarts + 2):
                self._store.set(f"{FEATURES_FROM}/{number}", OVER)

    def _start(self, number: int) -> None:
        assert isinstance(self._store, dist.TCPStore)
        spec = WorkerSpec(self._config, self._store.port, self._cpus, number)
        with cores.allowed(self._allowed):  # a thread of the engine's is kept to the target's
            self._child = start("pearl.parallel.drafter_main", spec)
        if self._closing.is_set():  # while it was being started
            self._end_child()

    def _end_child(self, patience_s: float = 0.0) -> None:
        if self._child:
            end(self._child, patience_s)

    def _await_word(self, number: int) -> str:
        """What the drafter says when it has loaded its model, or can't."""
        key, began = f"{DRAFTER}/{number}", time.perf_counter()
        stopped_since: float | None = None

        def check() -> None:
            nonlocal stopped_since
            now = time.perf_counter()
            if self._closing.is_set():
                raise Unreachable("this engine is being closed")
            code = self._child.poll() if self._child else None
            if code is not None and not self._store.check([key]):
                if code < 0 or number:
                    raise Unreachable(f"its process ended with code {code} before it was ready")
                raise UsageError(
                    f"The drafter process ended with code {code} before it was ready: "
                    "see its message above; too little memory is the usual reason."
                )
            stopped_since = (stopped_since or now) if self.stopped else None
            if stopped_since and now - stopped_since > self._config.draft_timeout_s:
                raise Unreachable("its process is stopped")
            if now - began > self._config.start_timeout_s:
                raise Unreachable(f"it was not ready after {self._config.start_timeout_s:g} s (start_timeout_s)")

        return await_key(self._store, key, check)
