"""What this process is, decided before an engine is made: the target, its drafter, or another rank of the target.

`launch` returns to the target alone. The others live in it and leave the program when the target closes; so the same
script runs in all ranks of a launcher, and what comes after it is the target's.
"""

from __future__ import annotations

from functools import partial

from pearl.checkpoints.preflight import Preflight, preflight
from pearl.config.engine_config import EngineConfig
from pearl.core.schedule import Schedule
from pearl.errors import UsageError
from pearl.machine import cores, launcher
from pearl.parallel import drafter_main, tensor_parallel_main
from pearl.parallel.child import guarded
from pearl.parallel.draft_sources import draft_source
from pearl.parallel.replicas import assign_devices
from pearl.parallel.runtime import Layout, Runtime
from pearl.parallel.tensor_parallel import MEETING, RANK_TIMEOUT_S
from pearl.parallel.world import World, meeting


def launch(
    config: EngineConfig, schedule: Schedule, processes: int | None = None, checked: Preflight | None = None
) -> Runtime:
    """`processes`: of the two roles, 1 or 2; None: as many as the schedule needs. `checked`: the preflight of this
    config, if the caller has made it already. Raises `UsageError`; in ranks that are not the target, `SystemExit`."""
    world = World.join(config.tensor_parallel_size, config.start_timeout_s)
    try:
        try:
            layout = arrange(config, schedule, processes, world, checked)
        except UsageError:
            if world.two_hosts or world.rank == world.tp_rank == world.replica == 0:
                raise
            raise SystemExit(2) from None  # the first rank meets the same, and says it
        if world.rank or world.tp_rank:
            raise SystemExit(work(layout))
        return Runtime(layout)
    except BaseException:
        launcher.leave()
        raise


def work(layout: Layout) -> int:
    """What this process does that is not the first of a target: until that closes. Returns its exit code."""
    config, world, checked = layout.checked.config, layout.world, layout.checked
    if world.rank == 1:
        store, host = meeting(f"replica-{world.replica}", world)
        make = partial(draft_source, config, checked)
        draft = partial(drafter_main.serve, config, layout.draft_cpus, store, host, make, agent=world.here.agent)
        return guarded("drafter", draft)
    launcher.give_way()
    store, host = meeting(MEETING, world)
    rank, cpus, gpu = world.tp_rank, layout.target_cpus if config.pins else [], world.here.local_rank
    shard = partial(tensor_parallel_main.work, lambda: checked, rank, cpus, store, host, RANK_TIMEOUT_S, gpu)
    return guarded(f"rank {rank} of the target", shard)


def arrange(
    config: EngineConfig, schedule: Schedule, processes: int | None, world: World, checked: Preflight | None = None
) -> Layout:
    """Who runs where. Raises `UsageError`."""
    processes = count_processes(schedule, processes, world)
    checked = checked or preflight(
        assign_devices(config, world), world.roles, world.local_tp_size, world.here.local_rank
    )
    config = checked.config
    two = processes == 2 or schedule.mode == "ar-all"
    target_cpus, draft_cpus = shares(config, two and not world.two_hosts)
    # neighbours on a machine are neighbours in rank; where the drafter is alone on its own, there is none
    tp_cpus = cores.contiguous_parts(target_cpus, world.local_tp_size) if world.local_tp_size else []
    if tp_cpus:
        target_cpus = tp_cpus[world.tp_rank % len(tp_cpus)]
    return Layout(checked, schedule, world, processes, target_cpus, draft_cpus, tp_cpus)


def count_processes(schedule: Schedule, asked: int | None, world: World) -> int:
    """How many processes an engine has: as many as asked for, or as its schedule needs. Raises `UsageError`."""
    if asked not in (None, 1, 2):
        raise UsageError(f"processes must be 1 or 2, not {asked!r}.")
    if world.size == 2:
        if asked == 1:
            raise UsageError("The launcher started two processes, but processes is 1: use plain python.")
        return 2
    if asked == 1:
        refuse_alone(schedule)
    return asked or (2 if schedule.drafts else 1)


def refuse_alone(schedule: Schedule) -> None:
    """Raises `UsageError` for a schedule that one process can't carry out."""
    if schedule.drafts and (schedule.pre_verify or schedule.post_verify):
        raise UsageError(
            f"{schedule.mode} drafts and verifies at the same time, which takes two processes; sd and ar run in one."
        )


def shares(config: EngineConfig, two: bool) -> tuple[list[int], list[int]]:
    """The CPUs of the target and of the drafter; of two processes each gets its own."""
    there = cores.available()
    target, draft = cores.split(there, drafter_works=config.drafter_works) if two else (there, there)
    if config.target_cores:
        target = cores.parse(config.target_cores)
    if config.draft_cores:
        draft = cores.parse(config.draft_cores)
    return target, draft
