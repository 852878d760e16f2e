"""Two processes: rank 0 is the target, rank 1 the drafter. How they are started, find each other, and end.

Under `accelerate launch` or `torchrun` with two processes both run the user's script, and the environment says who is
who. A process that is alone (plain `python`, a notebook, or `accelerate launch --num_processes 2` on a machine without
GPUs, which starts only one) starts the drafter itself: `python -m pearl.process`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pearl import cores
from pearl.config import NGRAM, ROLES, EngineConfig
from pearl.errors import UsageError

_ORDERS = "PEARL_DRAFTER"  # what a started drafter finds in its environment
_LOCAL = "127.0.0.1"
_READY, _KEY = "ready", "drafter"


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

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose models this machine holds for this replica."""
        return (ROLES[self.rank],) if self.apart else ROLES

    @staticmethod
    def here() -> World:
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if size == 1:
            return World(0, 1)
        if size % 2:
            raise UsageError(
                f"The launcher started {size} processes, but one target and one drafter are two: use "
                "--num_processes 2, or 2 R for R replicas (a target over several GPUs is one process with "
                "--target-device cuda:0,cuda:1)."
            )
        local, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
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


class Peer:
    """The drafter process as the target knows it. `link` is open once `connect` has returned."""

    def __init__(self, config: EngineConfig, world: World, cpus: list[int]):
        """Starts the drafter where no launcher has done so."""
        import torch.distributed as dist

        self._child: subprocess.Popen | None = None
        self.link = None
        if world.size == 2:
            self._store, self._host = _rendezvous()
            return
        self._host = _LOCAL
        self._store = dist.TCPStore(_LOCAL, 0, 2, is_master=True, wait_for_workers=False)
        orders = {"config": config.to_json(), "port": self._store.port, "cpus": cpus}
        threads = {name: str(len(cpus)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **threads, _ORDERS: json.dumps(orders), "PYTHONPATH": os.pathsep.join(sys.path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pearl.process"], env=environment, stdin=subprocess.DEVNULL
        )

    @property
    def pid(self) -> int | None:
        """Of a drafter that we started."""
        return self._child.pid if self._child else None

    def connect(self) -> None:
        """Waits until the drafter has loaded its model. Raises `UsageError` with its reason if it could not."""
        from pearl.link import Link

        while not self._store.check([_KEY]):
            if self._child and self._child.poll() is not None:
                raise UsageError(
                    f"The drafter process ended with code {self._child.returncode} before it was ready: "
                    "see its message above; too little memory is the usual reason."
                )
            time.sleep(0.01)
        said = self._store.get(_KEY).decode()
        if said != _READY:
            raise UsageError(said)
        self.link = Link(self._store, rank=0, host=self._host)

    def close(self) -> None:
        if self.link:
            self.link.close()
        if self._child:
            try:
                self._child.wait(timeout=10 if self.link else 0)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()


def serve(config: EngineConfig, cpus: list[int], port: int | None = None) -> None:
    """The drafter's process: loads its source, says that it is ready, and drafts until the target is gone.

    `port`: of the target's store on this machine; None: a launcher's environment says where the ranks meet.
    """
    cores.pin(cpus)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(len(cpus))
    if port is None:
        store, host = _rendezvous()
    else:
        store, host = dist.TCPStore(_LOCAL, port, 2, is_master=False), _LOCAL
    try:
        source = draft_source(config)
    except Exception as error:
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        store.set(_KEY, f"The drafter could not start: {reason}")
        raise
    from pearl.drafter import Drafter
    from pearl.link import Link

    store.set(_KEY, _READY)
    link = Link(store, rank=1, host=host)
    Drafter(source, link, trace=drafter_trace(config)).run()
    link.close()


def draft_source(config: EngineConfig):
    """The source that a config names, with its model loaded."""
    from pearl.schedule import MAX_GAMMA
    from pearl.sources import NgramSource

    if config.draft == NGRAM:
        return NgramSource()
    from pearl.beam import TreeSource
    from pearl.loading import load_draft, load_feature_drafter, preflight

    checked = preflight(config, World.here().roles)
    if config.feature_folder:
        from pearl.feature.source import FeatureSource

        return FeatureSource(load_feature_drafter(checked), config.draft_beam)
    model, costs = load_draft(checked, ahead=2 * MAX_GAMMA + 1)
    return TreeSource(model, costs)


def drafter_trace(config: EngineConfig):
    from pearl.timeline import OFF, Trace

    return Trace("drafter", Path(config.trace).absolute()) if config.trace else OFF


def launchers_store():
    """Where all processes of a launcher meet."""
    import torch.distributed as dist

    store, _, _ = next(iter(dist.rendezvous("env://")))
    return store


def _rendezvous():
    import torch.distributed as dist

    host = os.environ.get("MASTER_ADDR", _LOCAL)
    store = dist.PrefixStore(f"replica-{World.here().replica}", launchers_store())
    return store, _LOCAL if host in (_LOCAL, "localhost") else None


def main() -> int:
    orders = json.loads(os.environ[_ORDERS])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the target, which ends this process
    try:
        serve(EngineConfig.from_json(orders["config"]), orders["cpus"], orders["port"])
    except UsageError:
        return 2  # the target has the sentence and prints it
    return 0


if __name__ == "__main__":
    sys.exit(main())
