"""A rank of a tensor-parallel target other than the first: loads its shard, and does what rank 0 says.

One that rank 0 has started is this module, run as a program; one that a launcher has started is in `work` too.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from pearl.checkpoints.preflight import Preflight, preflight
from pearl.checkpoints.targets import load_shard
from pearl.config.inputs import brief
from pearl.core.token_buckets import CannotBranch
from pearl.errors import PearlError
from pearl.machine import cores
from pearl.models.tensor_parallel import ordered_sum
from pearl.models.tensor_parallel.commands import Shutdown, TokenDeltas, decode
from pearl.parallel.child import TargetGone, guarded, received
from pearl.parallel.process_groups import ProcessGroups, RankLost, is_lost
from pearl.parallel.tensor_parallel import FAILED, MET, START_S
from pearl.parallel.world import LOCAL


def work(
    check: Callable[[], Preflight],
    rank: int,
    cpus: Sequence[int],
    store: dist.Store,
    host: str | None,
    deadline_s: float,
    gpu: int,
) -> None:
    """Loads its shard and makes the calls that rank 0 says, until it ends the run. `check`: makes the preflight.
    `cpus`: to keep to; none: it stays where it is. `gpu`: of this rank, where there are some.

    Raises `TargetGone` if rank 0 is, or whatever went wrong here, of which rank 0 then knows.
    """
    if cpus:
        cores.pin(list(cpus))
        torch.set_num_threads(len(cpus))
    groups = None
    try:
        with _told(store, rank):
            checked = check()
            store.set(f"here-{rank}", "")
            store.wait([MET], timedelta(seconds=START_S))
            groups = ProcessGroups(store, rank, checked.config.tensor_parallel_size, deadline_s, host, gpu)
            shard = load_shard(checked)
            store.set(f"loaded-{rank}", "")
        deltas = TokenDeltas()
        while not isinstance(command := decode(groups.commands.receive(), deltas), Shutdown):
            with _told(store, rank), contextlib.suppress(CannotBranch), ordered_sum.in_order():
                command.run(shard)
    except RankLost as lost:
        raise TargetGone(f"another one ({lost})") from None
    finally:
        if groups:
            groups.close()


@contextlib.contextmanager
def _told(store: dist.Store, rank: int) -> Iterator[None]:
    """What goes wrong in here is told to rank 0, unless it is that rank 0, or another one, is gone."""
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise TargetGone(f"another one ({brief(error)})") from None
        reason = str(error) if isinstance(error, PearlError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            store.set(FAILED, f"Rank {rank} of the target failed, and the run is over: {brief(reason, 500)}")
        raise


def main() -> int:
    spec = received("rank")
    ranks = spec.config.tensor_parallel_size
    store = dist.TCPStore(LOCAL, spec.port, ranks, is_master=False)

    def check() -> Preflight:
        return preflight(spec.config, ("target",), ranks, spec.number)

    cpus = spec.cpus if spec.config.pins else []
    run = partial(work, check, spec.number, cpus, store, LOCAL, spec.deadline_s, spec.number)
    return guarded(f"rank {spec.number} of the target", run)


if __name__ == "__main__":
    sys.exit(main())
