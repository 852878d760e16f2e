"""Which of a launcher's processes this one is: accelerate says it, and is asked in this module alone.

Under `accelerate launch` (on one machine or several), `torchrun` and plain python alike, `accelerate.PartialState`
knows rank, number and device. Making one joins the launcher's default process group; `join` does so, and `leave` takes
back what it has made. A state, or a group, that the user's program has made before is taken as it is.

torch takes a second to import. What must be known earlier, only which of several processes says a sentence, is read
from the environment, here and nowhere else.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import psutil

from pearl.errors import UsageError

_log = logging.getLogger(__name__)
_SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # what accelerate writes where it lacks


@dataclass(frozen=True)
class Processes:
    """This process among those of the launcher; one that nobody has launched is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    device: str = ""  # the kind that accelerate chooses; empty: not asked
    agent: int = 0  # the process that ends all ranks when one of them ends badly; 0: there is none


_joined: Processes | None = None
_store: Any = None  # of the default group, where all processes meet
_group_is_ours = False


def is_main_process() -> bool:
    """Whether this process is the one that says what all of them meet. No torch."""
    return os.environ.get("RANK", "0") == "0"


def started() -> int:
    """How many processes the launcher has started. No torch."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(timeout_s: float) -> Processes:
    """Asks accelerate, which waits for the other processes where there are some. The first call joins, the others
    repeat what it found. Raises `UsageError` if they don't come within `timeout_s`, or have left already."""
    global _joined, _store, _group_is_ours
    if _joined:
        return _joined
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import get_cpu_distributed_information, parse_flag_from_env

    facts = get_cpu_distributed_information()
    had_group, had_state = dist.is_initialized(), bool(PartialState._shared_state)
    try:
        with _as_before():
            # without a GPU accelerate joins the processes only if it is told that they are to be on the CPU
            on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
            state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        if not had_state:
            PartialState._reset_state()  # half of one would be taken for a whole one
        where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        raise UsageError(
            f"Rank {facts.rank} met nobody at {where} within {timeout_s:g} s (--start-timeout-s): the other process "
            "was not started or has ended, MASTER_ADDR and MASTER_PORT differ between the two, another program holds "
            f"the port, or a firewall is between them ({' '.join(str(error).split())[:120]})."
        ) from None
    if dist.is_initialized() and not had_group:
        _group_is_ours = True
        atexit.register(leave)
    known = state.num_processes > 1  # else a program without a GPU has made it without saying cpu=True
    size = state.num_processes if known else facts.world_size
    if size == 1:
        if said := note():
            _log.warning(said)
        return Processes(device=state.device.type)
    if not dist.is_initialized():
        raise UsageError(
            "The launcher's other processes have left with an engine that was closed: make one engine in a program "
            "that is launched, or start the program with plain python."
        )
    rank, local_rank = (state.process_index, state.local_process_index) if known else (facts.rank, facts.local_rank)
    agent = os.getppid() if dist.is_torchelastic_launched() else 0
    _store = dist.distributed_c10d._get_default_store()
    _joined = Processes(rank, size, max(0, local_rank), facts.local_world_size, state.device.type, agent)
    return _joined


@contextmanager
def _as_before() -> Iterator[None]:
    """accelerate sets the number of threads where OMP_NUM_THREADS is not, says so, and fills in the environment."""
    import torch

    threads, before = torch.get_num_threads(), {name: os.environ.get(name) for name in _SET}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in [name for name, value in before.items() if value is None]:
            os.environ.pop(name, None)


def store() -> Any:
    """Where all processes of the launcher meet, through a connection of its own: one that waits holds up nobody."""
    assert _store is not None, "nobody has launched this process, or it has left"
    return _store.clone()


def give_way() -> None:
    """Ends the default group that `join` has made, in favour of another one. The store stays."""
    global _group_is_ours
    if _group_is_ours:
        import torch.distributed as dist

        _group_is_ours = False
        if dist.is_initialized():
            dist.destroy_process_group()


def leave() -> None:
    """Takes back what `join` has made. Waits for nobody."""
    global _joined, _store
    give_way()
    _joined = _store = None
    atexit.unregister(leave)


def orphaned(processes: Processes) -> bool:
    """Whether the launcher's agent, which would end this process with the others, has ended itself. A microsecond."""
    return processes.agent > 0 and os.getppid() != processes.agent


def note() -> str:
    """A sentence for whoever asked `accelerate launch` for several processes and got one, as without --multi_gpu it
    starts one, silently; nothing to say otherwise."""
    if started() > 1:
        return ""
    try:
        parent = psutil.Process().parent()
        return note_on(parent.cmdline()) if parent else ""
    except psutil.Error:
        return ""


def note_on(launcher: Sequence[str]) -> str:
    """The same for the words of the process that started this one alone.

    Two processes are a target and its drafter: the target starts that itself, as its description says.
    """
    words = [part for word in launcher for part in word.split("=", 1)]
    program = " ".join(words[:4])
    if "accelerate" not in program or "launch" not in program:
        return ""
    asked = next((value for name, value in pairwise(words) if name.endswith("num_processes")), "")
    if not asked.isdigit() or int(asked) <= 2:
        return ""
    return (
        f"accelerate was asked for {asked} processes and started one: this is one pair, without replicas. On GPUs add "
        "--multi_gpu; without GPUs use --config_file configs/accelerate/cpu.yaml, which starts as many as it is told."
    )
