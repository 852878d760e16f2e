"""The other ranks of a tensor-parallel target as rank 0 has them: started, told what to do, and ended.

Ranks 0 to N-1 are the target, and the drafter, which is no part of their group, is the last rank of the launcher. Rank
0 is the target that everything else knows. The others load their shards and then do what rank 0 says
(`pearl.models.tensor_parallel.commands`), until it says that the run is over or is gone. What they say of themselves
is only when they are ready, and why they failed; that goes through the store where all have met.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from pearl.config.engine_config import EngineConfig
from pearl.config.inputs import brief
from pearl.errors import UsageError, WorkerLostError
from pearl.machine import launcher
from pearl.models.tensor_parallel.commands import Command, KeepAlive, Shutdown, TokenDeltas
from pearl.parallel.child import WorkerSpec, end, start
from pearl.parallel.process_groups import ProcessGroups, is_lost
from pearl.parallel.world import LOCAL, World, await_key, meeting, own_store

RANK_TIMEOUT_S = 300.0  # without a word from another rank, after which it is taken for dead
START_S = 3600.0  # that a rank may take to load its shard, which may have to be fetched first
MEETING = "target"  # where the ranks that a launcher has started find each other
MET, FAILED = "met", "failed"  # keys of the store


class TensorParallelWorkers:
    """Every wait for the others ends, at the latest with a sentence."""

    def __init__(self, config: EngineConfig, world: World, shares: Sequence[Sequence[int]]):
        """Starts them where no launcher has done so. `shares`: the CPUs of each rank of the target on this machine.
        Raises `UsageError`."""
        launcher.give_way()  # transformers spreads a model over the default group, in which the drafter has no part
        if dist.is_initialized():
            raise UsageError(
                "This process has a torch.distributed process group already, and a target over several ranks needs "
                "its own: run one such engine at a time, in a program that makes no group."
            )
        self.size, self._gpu = config.tensor_parallel_size, world.here.local_rank
        self._deadline_s, self._deltas = RANK_TIMEOUT_S, TokenDeltas()
        self._groups: ProcessGroups | None = None
        self._children: list[subprocess.Popen] = []
        self._saying, self._said_at = threading.Lock(), time.monotonic()
        self._over = threading.Event()
        if world.size > 1:
            self._store, self._host = meeting(MEETING, world)
            return
        self._store, self._host = own_store(self.size), LOCAL
        for rank in range(1, self.size):
            spec = WorkerSpec(config, self._store.port, list(shares[rank]), rank, self._deadline_s)
            # transformers takes the GPU that LOCAL_RANK names
            self._children.append(start("pearl.parallel.tensor_parallel_main", spec, LOCAL_RANK=str(rank)))

    @property
    def pids(self) -> list[int]:
        """Of the ranks that we started."""
        return [child.pid for child in self._children]

    def gather(self) -> None:
        """Waits until all ranks are there and connected. Raises `WorkerLostError`, with the reason if one could not."""
        self._await("here")
        self._store.set(MET, "")
        try:
            self._groups = ProcessGroups(self._store, 0, self.size, self._deadline_s, self._host, self._gpu)
        except RuntimeError as error:
            raise self.cause_of(error) from error
        threading.Thread(target=self._keep_awake, name="pearl-ranks", daemon=True).start()

    def await_loaded(self) -> None:
        """Waits until all ranks have loaded their shards. Raises `WorkerLostError` with its reason if one could not."""
        self._await("loaded")

    def say(self, command: Command) -> None:
        with self._saying:
            assert self._groups, "nobody has come yet, or all have left"
            self._groups.commands.send(command.words(self._deltas))
            self._said_at = time.monotonic()

    def cause_of(self, error: Exception) -> Exception:
        """What to raise for an error in a call: the sentence of the rank that failed, or the error itself."""
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return error
        for _ in range(20):  # its word may come after its end
            if reason := self._reason():
                return WorkerLostError(reason)
            time.sleep(0.1)
        if is_lost(error):
            return WorkerLostError(
                f"A rank of the target is gone, or has said nothing for {self._deadline_s:g} s, and the run is over "
                f"({brief(error)})."
            )
        return error

    def close(self) -> None:
        """Ends the other ranks. Never raises: it may be called because one of them has failed."""
        self._over.set()
        patience_s = 0.0  # nobody has heard anything that could make it end
        if self._groups:
            with contextlib.suppress(RuntimeError):
                self.say(Shutdown())
            self.let_go()
            patience_s = 10.0
        for child in self._children:
            end(child, patience_s)
        self._children.clear()

    def let_go(self) -> None:
        """Closes the connections to the other ranks, as the end of this process would."""
        with self._saying:
            if self._groups:
                self._groups.close()
            self._groups = None

    def _await(self, what: str) -> None:
        deadline = time.monotonic() + START_S

        def check() -> None:
            if reason := self._reason():
                raise WorkerLostError(reason)
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"Not all ranks of the target were {what} within {START_S:g} s: see their messages."
                )

        for rank in range(1, self.size):
            await_key(self._store, f"{what}-{rank}", check)

    def _reason(self) -> str:
        """Why a rank has failed, as far as it is known."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([FAILED]):
                return self._store.get(FAILED).decode()
        ended = [(child.poll(), rank) for rank, child in enumerate(self._children, 1)]
        for code, rank in sorted((code, rank) for code, rank in ended if code):  # the killed before their mourners
            how = f"signal {-code}" if code < 0 else f"code {code}"
            return (
                f"Rank {rank} of the target ended with {how}, and the run is over: too little memory is the usual "
                "reason."
            )
        return ""

    def _keep_awake(self) -> None:
        """While rank 0 has nothing to say, it says that it is there."""
        while not self._over.wait(self._deadline_s / 8):
            if time.monotonic() - self._said_at < self._deadline_s / 4:
                continue
            try:
                self.say(KeepAlive())
            except (RuntimeError, AssertionError):
                return  # the next call meets it too, or the run is over
