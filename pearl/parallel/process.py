"""Two processes: rank 0 is the target, rank 1 the drafter. How they are started, find each other, and end.

Neither outlives the other: a drafter that we started ends with its target, however that ends; under a launcher both end
with it. A drafter that is lost is started anew where it is ours.

Under `accelerate launch` or `torchrun` with two processes both run the user's script, and the environment says who is
who. A process that is alone (plain `python`, a notebook, or `accelerate launch --num_processes 2` on a machine without
GPUs, which starts only one) starts the drafter itself: `python -m pearl.parallel.process`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from pearl.config.engine_config import NGRAM, ROLES, START_TIMEOUT_S, EngineConfig
from pearl.config.inputs import brief
from pearl.errors import Unreachable, UsageError
from pearl.machine import cores

_ORDERS = "PEARL_DRAFTER"  # what a started drafter finds in its environment
LOCAL = "127.0.0.1"
_READY, _KEY = "ready", "drafter"
_LANE = "features"  # from where the target sends them, which it says when it is there itself
_OVER = "over"  # in place of that: there is no further connection
_END_S = 2.0  # that a drafter which has said goodbye may take to end
_GONE = "gone: "  # before a reason that may be another one the next time


class TargetGone(Exception):
    """The target has ended or can't be reached any more, and has not said goodbye."""


@dataclass(frozen=True)
class World:
    """This process among those that a launcher started; alone if there is none.

    2 R processes are R replicas, each a target and its drafter: ranks 0 and 1 are the first.
    """

    rank: int  # within the replica
    size: int
    replica: int = 0
    replicas: int = 1
    neighbour: int = 0  # this replica among those of its machine,
    neighbours: int = 1  # and how many they are
    apart: bool = False  # target and drafter are on two machines
    shard: int = 0  # of a target over several ranks, this one,
    shards: int = 1  # how many they are,
    shards_here: int = 1  # and how many of them are on this machine

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose models this machine holds for this replica."""
        return (ROLES[self.rank],) if self.apart else ROLES

    @staticmethod
    def here(tensor: int = 1) -> World:
        """`tensor`: over how many ranks the target is spread. They come first, then the drafter; no replicas then."""
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if size == 1:
            return World(0, 1, shards=tensor, shards_here=tensor)
        local, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if tensor > 1:
            if size != 1 + tensor:
                raise UsageError(
                    f"The launcher started {size} processes, but a target over {tensor} ranks and its drafter are "
                    f"{1 + tensor}: use --num_processes {1 + tensor} (a target over several ranks has no replicas)."
                )
            first = rank - local
            targets = max(0, min(tensor, first + here) - first)
            apart = targets in (0, here)
            return World(int(rank == tensor), 2, apart=apart, shard=rank % tensor, shards=tensor, shards_here=targets)
        if size % 2:
            raise UsageError(
                f"The launcher started {size} processes, but one target and one drafter are two: use "
                "--num_processes 2, or 2 R for R replicas; a target over several GPUs is one process with "
                f"--target-device cuda:0,cuda:1, or {size - 1} with --tensor-parallel-size {size - 1}."
            )
        return World(rank % 2, 2, rank // 2, size // 2, local // 2, max(1, here // 2), apart=here == 1)


def shares(config: EngineConfig, two: bool) -> tuple[list[int], list[int]]:
    """The CPUs of the target and of the drafter; of two processes each gets its own."""
    there = cores.available()
    target, draft = cores.split(there, drafter_works=config.draft != NGRAM) if two else (there, there)
    if config.target_cores:
        target = cores.parse(config.target_cores)
    if config.draft_cores:
        draft = cores.parse(config.draft_cores)
    return target, draft


class DrafterProcess:
    """The drafter process as the target knows it: started where no launcher has done so, reached, and ended.

    `reach` may be called from a thread of its own; everything else is for the thread of the engine.
    """

    def __init__(self, config: EngineConfig, world: World, cpus: list[int], features_from: str = ""):
        """Starts the drafter where no launcher has done so. `features_from`: the device from which features go to it
        over a lane; empty: they ride on the verdicts."""
        import torch.distributed as dist

        self._config, self._cpus, self._features_from = config, cpus, features_from
        self._child: Child | None = None
        self._closing = threading.Event()
        self._reached = -1  # the last connection that was asked for
        self._launched = world.size == 2
        if self._launched:
            self._store, self._host = _rendezvous(config)
            return
        self._host = LOCAL
        self._store = dist.TCPStore(LOCAL, 0, 2, is_master=True, wait_for_workers=False)
        self._start(0)

    @property
    def pid(self) -> int | None:
        """Of a drafter that we started."""
        return self._child.pid if self._child else None

    @property
    def stopped(self) -> bool:
        """Whether a signal holds a drafter that we started, so that it hears nothing."""
        return self._child is not None and is_stopped(self._child.pid)

    def reach(self, number: int) -> Any:
        """The drafter's connection `number`. Where the drafter is ours, each but the first is to one started anew.

        Raises `UsageError` with its reason if it can't start, `Unreachable` if it is gone or does not come.
        """
        from pearl.wire.process_channel import ProcessChannel

        self._store.set(f"{_LANE}/{number}", self._features_from)
        self._reached = number
        if number and not self._launched:
            self._end_child()
            self._start(number)
        said = self._await_word(number)
        if said != _READY and (number or said.startswith(_GONE)):  # it could start once, so it may again
            raise Unreachable(said.removeprefix(_GONE))
        if said != _READY:
            raise UsageError(said)
        try:
            return ProcessChannel(
                self._store,
                rank=0,
                host=self._host,
                silence_s=self._config.heartbeat_timeout_s,
                name=f"pearl-{number}",
                lane=_lane(self._store, number, 0, self._features_from, self._host),
            )
        except RuntimeError as error:
            raise Unreachable(f"it was ready, but did not connect: {str(error)[:200]}") from None

    def give_up(self) -> None:
        """Ends what is left of a drafter that is ours and will not be started again; a launcher's is let go."""
        if self._child:
            self._end_child()
        self._let_go()

    def close(self, stuck: bool = False) -> None:
        """Ends the drafter if it is ours. `stuck`: it has not heard a goodbye, so it is not waited for."""
        self._closing.set()
        if self._child:
            self._end_child(patience_s=0.0 if stuck else _END_S)
        self._let_go()

    def _let_go(self) -> None:
        """Tells a launcher's drafter that waits for its next connection that there will be none: it ends well, as
        otherwise the launcher would end the target too."""
        for number in range(self._reached + 1, self._config.max_draft_restarts + 2) if self._launched else ():
            with contextlib.suppress(RuntimeError):  # the launcher is gone
                self._store.set(f"{_LANE}/{number}", _OVER)

    def _start(self, number: int) -> None:
        orders = {
            "config": self._config.to_json(),
            "port": self._store.port,
            "cpus": self._cpus,
            "number": number,
        }
        self._child = spawn(orders)
        if self._closing.is_set():  # while it was being started
            self._end_child()

    def _end_child(self, patience_s: float = 0.0) -> None:
        assert self._child, "only one that we started is ours to end"
        end(self._child, patience_s)

    def _await_word(self, number: int) -> str:
        """What the drafter says when it has loaded its model, or can't."""
        key, waited_since, stopped_since = f"{_KEY}/{number}", time.perf_counter(), None
        while not self._store.check([key]):
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
            stopped_since = (stopped_since or now) if self._child and is_stopped(self._child.pid) else None
            if stopped_since and now - stopped_since > self._config.draft_timeout_s:
                raise Unreachable("its process is stopped")
            if now - waited_since > self._config.start_timeout_s:
                raise Unreachable(f"it was not ready after {self._config.start_timeout_s:g} s (start_timeout_s)")
            time.sleep(0.01)
        return self._store.get(key).decode()


class Child(Protocol):
    """A process that we started; `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def spawn(orders: dict[str, Any]) -> Child:
    """Starts a drafter with these orders as a program of its own."""
    return start("pearl.parallel.process", _ORDERS, {**orders, "parent": os.getpid()})


def start(module: str, name: str, orders: dict[str, Any], **more: str) -> subprocess.Popen:
    """Starts a module of ours as a program, with as many threads as its orders have `cpus`. It finds the orders in the
    environment under `name`, and `more` beside them."""
    threads = {limit: str(len(orders["cpus"])) for limit in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    found = {**threads, **more, name: json.dumps(orders), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-m", module], env={**os.environ, **found}, stdin=subprocess.DEVNULL)


def end(child: Child, patience_s: float) -> None:
    """Waits so long for the end of a process that we started, then kills it."""
    try:
        child.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is held by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def follow(parent: int, role: str, whose: str) -> None:
    """From now on this process ends, with one line and exit code 1, when its parent has ended, however that came."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.25)
        print(f"pearl: {whose} (process {parent}) has ended, so the {role} ends too.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="pearl-follow", daemon=True).start()


def follow_launcher(role: str) -> None:
    """The same, for a process that torchrun or accelerate launch has started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow(os.getppid(), role, "the launcher")


def serve(
    config: EngineConfig,
    cpus: list[int],
    port: int | None = None,
    number: int = 0,
    make: Callable[[EngineConfig], Any] | None = None,
) -> None:
    """The drafter's process: loads its source, says that it is ready, and drafts until the target says goodbye.

    `port`: of the target's store on this machine, and `number` of the connection to make there; None: a launcher's
    environment says where the ranks meet. A launched drafter whose connection breaks makes another one, as nobody
    starts it again. `make`: the source of a config, by default with its model loaded. Raises `TargetGone`.
    """
    cores.pin(cpus)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(len(cpus))
    if port is None:
        follow_launcher("drafter")
        store, host = _rendezvous(config)
    else:
        store, host = dist.TCPStore(LOCAL, port, 2, is_master=False), LOCAL
    try:
        source = (make or draft_source)(config)
    except (MemoryError, torch.OutOfMemoryError) as error:
        store.set(f"{_KEY}/{number}", f"{_GONE}it has too little memory: {brief(error)}")
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        store.set(f"{_KEY}/{number}", f"The drafter could not start: {reason}")
        raise
    from pearl.roles.drafter import Drafter
    from pearl.wire.process_channel import ProcessChannel

    while True:
        try:
            store.set(f"{_KEY}/{number}", _READY)
            wanted = _word(store, f"{_LANE}/{number}", config.start_timeout_s)  # the target may still be loading
            if wanted == _OVER:
                return
            lane = _lane(store, number, 1, wanted and source.device, host)
            link = ProcessChannel(
                store, rank=1, host=host, silence_s=config.heartbeat_timeout_s, name=f"pearl-{number}", lane=lane
            )
        except RuntimeError as error:
            raise TargetGone(f"{str(error)[:200]}") from None
        try:
            Drafter(source, link, trace=drafter_trace(config)).run()
        except Exception:  # whatever it is: where a launcher started us, ending would end the target too
            if port is not None:
                raise
            traceback.print_exc()
        link.close()
        if link.farewell:
            return
        if port is not None:
            raise TargetGone(link.reason)
        number += 1


def _lane(store: Any, number: int, rank: int, device: Any, host: str | None):
    """For the features of connection `number`, if they leave from, or go to, a device."""
    if not device:
        return None
    import torch
    import torch.distributed as dist

    from pearl.wire.feature_transport import FeatureTransport

    return FeatureTransport.open(dist.PrefixStore(f"{_LANE}-{number}", store), rank, torch.device(device), host)


def _word(store: Any, key: str, timeout_s: float) -> str:
    """Raises `RuntimeError` if it is not said in time."""
    store.wait([key], timedelta(seconds=timeout_s))
    return store.get(key).decode()


def draft_source(config: EngineConfig):
    """The source that a config names, with its model loaded."""
    from pearl.drafters.ngram import NgramSource

    if config.draft == NGRAM:
        return NgramSource()
    from pearl.checkpoints.drafters import load_draft, load_feature_drafter
    from pearl.checkpoints.preflight import AHEAD, preflight
    from pearl.drafters.tree import TreeSource

    world = World.here(config.tensor_parallel_size)
    checked = preflight(config, world.roles, world.shards_here)
    if config.feature_folder:
        from pearl.drafters.feature.source import FeatureSource

        return FeatureSource(load_feature_drafter(checked), config.tree_top_k)
    model, costs = load_draft(checked, AHEAD)
    return TreeSource(model, costs.seconds, several=costs.several)


def drafter_trace(config: EngineConfig):
    from pearl.core.timeline import OFF, Trace

    return Trace("drafter", Path(config.trace).absolute()) if config.trace else OFF


def launchers_store(timeout_s: float = START_TIMEOUT_S):
    """Where all processes of a launcher meet. Raises `UsageError` if they don't within `timeout_s`."""
    import torch.distributed as dist

    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise UsageError(
            f"Rank {os.environ.get('RANK', '?')} met nobody at {where} within {timeout_s:g} s (--start-timeout-s): the "
            "other process was not started or has ended, MASTER_ADDR and MASTER_PORT differ between the two, another "
            f"program holds the port, or a firewall is between them ({brief(error, 120)})."
        ) from None
    return store


def _rendezvous(config: EngineConfig):
    return meeting(f"replica-{World.here(config.tensor_parallel_size).replica}", config.start_timeout_s)


def meeting(name: str, timeout_s: float = START_TIMEOUT_S):
    """The store of some of a launcher's processes, and the address at which each of them listens; None: any of its."""
    import torch.distributed as dist

    host = os.environ.get("MASTER_ADDR", LOCAL)
    return dist.PrefixStore(name, launchers_store(timeout_s)), LOCAL if host in (LOCAL, "localhost") else None


def main() -> int:
    orders = json.loads(os.environ[_ORDERS])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the target, which ends this process
    try:
        follow(orders["parent"], "drafter", "the target")
        serve(EngineConfig.from_json(orders["config"]), orders["cpus"], orders["port"], orders["number"])
    except UsageError:
        return 2  # the target has the sentence and prints it
    except TargetGone as gone:
        print(f"pearl: the drafter has lost its target ({gone}) and ends.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: all is said and saved, and to take torch apart takes a second
