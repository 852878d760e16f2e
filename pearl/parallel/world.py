"""Which of a launcher's processes this is, and how these find each other.

Under `accelerate launch` or `torchrun` all ranks run the user's script, and accelerate says who is who. A process
that is alone (plain `python`, a notebook, or `accelerate launch --num_processes 2` on a machine without GPUs, which
starts only one) starts the others itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from pearl.config.engine_config import ROLES, START_TIMEOUT_S
from pearl.config.inputs import brief
from pearl.errors import UsageError, WorkerLostError
from pearl.machine import launcher
from pearl.machine.launcher import Processes

LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class World:
    """This process among those that a launcher started; alone if there is none.

    2 R processes are R replicas, each a target and its drafter: ranks 0 and 1 are the first.
    """

    rank: int  # within the replica: 0 is the target, 1 the drafter
    size: int
    replica: int = 0
    replicas: int = 1
    local_replica: int = 0  # among those of its machine
    local_replicas: int = 1
    two_hosts: bool = False  # target and drafter are on two machines
    tp_rank: int = 0  # of a target over several ranks
    tp_size: int = 1
    local_tp_size: int = 1  # how many of them are on this machine
    here: Processes = field(default_factory=Processes)

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose models this machine holds for this replica."""
        return (ROLES[self.rank],) if self.two_hosts else ROLES

    @staticmethod
    def join(tensor: int = 1, timeout_s: float = START_TIMEOUT_S) -> World:
        """Meets the launcher's other processes, if there are some. `tensor`: as for `of`."""
        return World.of(launcher.join(timeout_s), tensor)

    @staticmethod
    def of(here: Processes, tensor: int = 1) -> World:
        """`tensor`: over how many ranks the target is spread. They come first, then the drafter; no replicas then."""
        rank, size, local, on_this = here.rank, here.size, here.local_rank, here.local_size
        if size == 1:
            return World(0, 1, tp_size=tensor, local_tp_size=tensor, here=here)
        if tensor > 1:
            if size != 1 + tensor:
                raise UsageError(
                    f"The launcher started {size} processes, but a target over {tensor} ranks and its drafter are "
                    f"{1 + tensor}: use --num_processes {1 + tensor} (a target over several ranks has no replicas)."
                )
            first = rank - local
            targets = max(0, min(tensor, first + on_this) - first)
            two_hosts = targets in (0, on_this)
            return World(
                rank=int(rank == tensor),
                size=2,
                two_hosts=two_hosts,
                tp_rank=rank % tensor,
                tp_size=tensor,
                local_tp_size=targets,
                here=here,
            )
        if size % 2:
            raise UsageError(
                f"The launcher started {size} processes, but one target and one drafter are two: use "
                "--num_processes 2, or 2 R for R replicas; a target over several GPUs is one process with "
                f"--target-device cuda:0,cuda:1, or {size - 1} with --tensor-parallel-size {size - 1}."
            )
        return World(
            rank=rank % 2,
            size=2,
            replica=rank // 2,
            replicas=size // 2,
            local_replica=local // 2,
            local_replicas=max(1, on_this // 2),
            two_hosts=on_this == 1,
            here=here,
        )


def meeting(name: str, world: World) -> tuple[dist.Store, str | None]:
    """The store of some of a launcher's processes, and the address at which each of them listens; None: any of its."""
    here = world.here
    return dist.PrefixStore(name, launcher.store()), LOCAL if here.local_size == here.size else None


def own_store(size: int) -> dist.TCPStore:
    """A store for this process and those that it starts."""
    return dist.TCPStore(LOCAL, 0, size, is_master=True, wait_for_workers=False)


def await_key(store: dist.Store, key: str, check: Callable[[], None] = lambda: None, every_s: float = 0.01) -> str:
    """What somebody sets in a store. `check` is called while nobody has, and ends the wait by raising. Raises
    `WorkerLostError` if the process that serves the store is gone."""
    try:
        while not store.check([key]):
            check()
            time.sleep(every_s)
        return store.get(key).decode()
    except WorkerLostError:  # of `check`
        raise
    except RuntimeError as error:
        raise WorkerLostError(f"The process that holds the store of all is gone ({brief(error, 120)}).") from None
