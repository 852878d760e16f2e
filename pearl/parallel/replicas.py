"""R replicas, each a target and its drafter, share one plan: who does which part, and when all are done.

Knows the launcher's store and nothing of models. The first replica prepares and gathers; a replica that fails says so
and waits for the others, because a launcher ends every process as soon as one of them ends badly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pearl import errors
from pearl.config.engine_config import EngineConfig
from pearl.errors import PearlError, UsageError, WorkerLostError
from pearl.machine import cores, launcher
from pearl.machine.launcher import Processes
from pearl.parallel.world import World, await_key

_log = logging.getLogger(__name__)
POLL_S = 0.2


class ReplicaGroup:
    """This replica among all of them; one alone needs no store."""

    def __init__(self, world: World):
        self._world = world
        self._name = f"replica-{world.replica}"
        self._store = launcher.store() if world.replicas > 1 else None

    @property
    def first(self) -> bool:
        return self._world.replica == 0

    def of_first(self, name: str, mine: str) -> str:
        """What the first replica has, in all of them, where each would have one of its own."""
        if self._store is None:
            return mine
        if self.first:
            self._store.set(name, mine)
        return self._wait(name)

    def complete(self, find: Callable[[], Sequence[Any]], work: Callable[[list[Any], str], None]) -> dict[str, str]:
        """Shares out what there is to do, and waits until all replicas have done their part.

        `find`: what there is to do, asked in the first replica; JSON must hold it. `work`: does a part of it, every
        R-th piece, under this replica's name, which is empty for one alone. Returns what went wrong in which."""
        todo = self._prepare(find)[self._world.replica :: self._world.replicas]
        if self._store is None:
            work(todo, "")
            return {}
        failure = ""
        try:
            work(todo, self._name)
        except WorkerLostError:
            raise
        except Exception as error:  # whatever it is, the others go on
            _log.exception("%s failed, and the others go on", self._name)
            failure = f"{type(error).__name__}: {error}"
        self._store.set(f"finished-{self._name}", failure)
        names = [f"replica-{n}" for n in range(self._world.replicas)]
        said = {name: self._wait(f"finished-{name}") for name in names}
        failures = {name: failure for name, failure in said.items() if failure}
        for name, reason in failures.items() if self.first else ():
            _log.error("%s failed (%s); what it left is done with --resume.", name, reason)
        return failures

    def _prepare(self, find: Callable[[], Sequence[Any]]) -> list[Any]:
        """What the first replica finds, in all of them. A `PearlError` there is one here too."""
        if self._store is None:
            return list(find())
        if self.first:
            try:
                self._store.set("prepared", json.dumps({"made": find()}))
            except PearlError as error:  # nobody waits for what will not come
                self._store.set("prepared", json.dumps({"refused": [type(error).__name__, str(error)]}))
                raise
        said = json.loads(self._wait("prepared"))
        if "refused" in said:
            name, sentence = said["refused"]
            raise getattr(errors, name)(sentence)
        return said["made"]

    def leave(self) -> None:
        """When the first replica has gathered everything: a launcher ends it as soon as one that failed is gone. It
        goes last, as its process may serve the store."""
        if self._store is None:
            return
        if self.first:
            self._store.set("gathered", "")
        self._wait("gathered")
        self._store.set(f"left-{self._name}", "")
        if self.first:
            for n in range(self._world.replicas):
                self._wait(f"left-replica-{n}")

    def _wait(self, key: str) -> str:
        assert self._store, "one replica waits for nobody"
        return await_key(self._store, key, every_s=POLL_S)


def assign_devices(config: EngineConfig, world: World) -> EngineConfig:
    """The config as the launcher has it: each process on the GPU of its own number, as accelerate deals them, or on
    none; and for one of several replicas on a machine, on its own cores.

    Raises `UsageError` where replicas have too few GPUs, or where devices were named, as they would be everybody's.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and world.here.device == "cpu":
        on_cpu = [name for name in ("target_device", "draft_device") if getattr(config, name) == "auto"]
        return assign_devices(replace(config, **dict.fromkeys(on_cpu, "cpu")), replace(world, here=Processes()))  # type: ignore[arg-type]
    for option, what in (("memory_file", "memory"), ("trace", "timeline")) if world.replicas > 1 else ():
        if getattr(config, option):
            raise UsageError(f"Each replica has a {what} of its own, and one file keeps one: leave {option} out.")
    if world.local_replicas > 1:
        if {config.target_device, config.draft_device} - {"auto", "cpu"} or config.target_cores or config.draft_cores:
            raise UsageError("Replicas on one machine share it out themselves: name no devices and no cores.")
        if config.target_device == "auto" and 0 < gpus < 2 * world.local_replicas:
            raise UsageError(f"{world.local_replicas} replicas need two GPUs each, but this machine has {gpus}.")
    if gpus and config.target_device == config.draft_device == "auto" and world.size == 2 and world.tp_size == 1:
        first = world.here.local_rank if world.two_hosts else 2 * world.local_replica
        other = first if world.two_hosts else first + 1
        placed = replace(config, draft_device=f"cuda:{other % gpus}")
        if world.local_replicas == 1 and first % gpus == 0:  # the first one anyway, or several if it is too small
            return placed
        return replace(placed, target_device=f"cuda:{first % gpus}")
    if world.local_replicas == 1 or not config.pins:
        return config
    mine = cores.share(cores.available(), world.local_replica, world.local_replicas)
    target, draft = cores.split(mine, drafter_works=config.drafter_works)
    return replace(config, target_cores=",".join(map(str, target)), draft_cores=",".join(map(str, draft)))
