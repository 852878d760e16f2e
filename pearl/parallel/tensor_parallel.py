"""The processes of a tensor-parallel target: how they find each other, hear of the next call, and end.

Ranks 0 to N-1 are the target, and the drafter, which is no part of their group, is the last rank of the launcher. Rank
0 is the target that everything else knows. The others load their shards and then do what rank 0 says
(`pearl.models.tensor_parallel.commands`), until it says that the run is over or is gone. What they say of themselves
is only when they are ready, and why they failed; that goes through the store where all have met.

Calls travel over gloo, on CPU tensors, one message to each rank; the sums within a forward go over nccl between GPUs.
Nobody waits for ever: who hears nothing for `deadline_s`, not even that rank 0 is alive, ends.
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from pearl.checkpoints.preflight import Preflight, preflight
from pearl.checkpoints.targets import load_shard
from pearl.config.engine_config import EngineConfig
from pearl.config.inputs import brief
from pearl.core.token_buckets import CannotBranch
from pearl.errors import UsageError
from pearl.machine import cores
from pearl.models.tensor_parallel import ordered_sum
from pearl.models.tensor_parallel.commands import Call, End, Texts, Wait, decode
from pearl.parallel.process import LOCAL, World, end, meeting, start
from pearl.wire.feature_transport import gloo_group

DEADLINE_S = 300.0  # without a word from another rank, after which it is taken for dead
START_S = 3600.0  # that a rank may take to load its shard, which may have to be fetched first
_ORDERS = "PEARL_RANK"  # what a started rank finds in its environment
_FRAME = 64  # words of a call's first message; the rest, if there is one, is the second
_TAG = 0
_IN_FLIGHT = 1 << 10  # messages that may be under way; a stuck rank holds up rank 0 only after that many
_MEETING = "target"  # where the ranks that a launcher has started find each other
_MET, _FAILED = "met", "failed"


class Lost(Exception):
    """Another rank is gone or says nothing; the message says which way."""


class Line:
    """The way for calls, from rank 0 to each of the others. One end of it."""

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float, host: str | None):
        """Returns when all ranks have come. `host`: the address to listen at; None: by the machine's name."""
        self.rank, self.size = rank, size
        self._group = gloo_group(dist.PrefixStore("calls", store), rank, size, deadline_s, host)
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()  # keeps the tensors alive until they have left

    def send(self, words: Sequence[int]) -> None:
        """To all other ranks, which `receive` it. Raises `RuntimeError` where one is gone."""
        frame = torch.zeros(_FRAME, dtype=torch.int32)
        made = torch.tensor([len(words), *words], dtype=torch.int32)
        frame[: len(made)] = made[:_FRAME]
        for part in (frame, made[_FRAME:]):
            if len(part):
                for rank in range(1, self.size):
                    self._sending.append((self._group.send([part], rank, _TAG), part))
        while len(self._sending) > _IN_FLIGHT:
            self._sending.popleft()[0].wait()

    def receive(self) -> list[int]:
        """What rank 0 has sent. Raises `RuntimeError` if it is gone, or has sent nothing for the deadline."""
        frame = self._receive_words(_FRAME)
        count = int(frame[0])
        words = frame[1 : 1 + count].tolist()
        return words + (self._receive_words(count - len(words)).tolist() if count > len(words) else [])

    def _receive_words(self, count: int) -> torch.Tensor:
        words = torch.empty(count, dtype=torch.int32)
        self._group.recv([words], 0, _TAG).wait()
        return words

    def close(self) -> None:
        """Lets go of the other ranks: whoever still waits for this one hears that it is gone."""
        for work, _ in self._sending:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=5))
        self._sending.clear()
        del self._group


class Group:
    """One rank's connections to the others: a line for calls, and the default process group for the sums."""

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float, host: str | None):
        backend, device = "gloo", None
        if torch.cuda.is_available():
            backend, device = "nccl", torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("sums", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=deadline_s),
            device_id=device,
        )
        try:
            self.line = Line(store, rank, size, deadline_s, host)
        except RuntimeError:
            dist.destroy_process_group()
            raise

    def close(self) -> None:
        self.line.close()
        dist.destroy_process_group()


class TensorParallelWorkers:
    """The other ranks, as rank 0 has them: started where no launcher has done so, told what to do, and ended."""

    def __init__(self, config: EngineConfig, world: World, shares: Sequence[Sequence[int]]):
        """`shares`: the CPUs of each rank of the target on this machine. Raises `UsageError`."""
        if dist.is_initialized():
            raise UsageError(
                "This process has a torch.distributed process group already, and a target over several ranks needs "
                "its own: run one such engine at a time, in a program that makes no group."
            )
        self.size = config.tensor_parallel_size
        self._deadline_s, self._texts = DEADLINE_S, Texts()
        self._group: Group | None = None
        self._children: list[subprocess.Popen] = []
        self._saying, self._said_at = threading.Lock(), time.monotonic()
        self._over = threading.Event()
        if world.size > 1:
            self._store, self._host = meeting(_MEETING)
            return
        self._store, self._host = dist.TCPStore(LOCAL, 0, self.size, is_master=True, wait_for_workers=False), LOCAL
        for rank in range(1, self.size):
            orders = {
                "config": config.to_json(),
                "port": self._store.port,
                "rank": rank,
                "cpus": list(shares[rank]),
                "deadline_s": self._deadline_s,
            }
            # transformers takes the GPU that LOCAL_RANK names
            self._children.append(start("pearl.parallel.tensor_parallel", _ORDERS, orders, LOCAL_RANK=str(rank)))

    @property
    def pids(self) -> list[int]:
        """Of the ranks that we started."""
        return [child.pid for child in self._children]

    def gather(self) -> None:
        """Waits until all ranks are there and connected. Raises `UsageError` with its reason if one could not come."""
        self._await("here")
        self._store.set(_MET, "")
        try:
            self._group = Group(self._store, 0, self.size, self._deadline_s, self._host)
        except RuntimeError as error:
            raise self.blamed(error) from error
        threading.Thread(target=self._keep_awake, name="pearl-ranks", daemon=True).start()

    def settle(self) -> None:
        """Waits until all ranks have loaded their shards. Raises `UsageError` with its reason if one could not."""
        self._await("loaded")

    def say(self, call: Call) -> None:
        with self._saying:
            assert self._group, "nobody has come yet, or all have left"
            self._group.line.send(call.words(self._texts))
            self._said_at = time.monotonic()

    def blamed(self, error: Exception) -> Exception:
        """What to raise for an error in a call: the sentence of the rank that failed, or the error itself."""
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return error
        for _ in range(20):  # its word may come after its end
            if reason := self._reason():
                return UsageError(reason)
            time.sleep(0.1)
        if _is_gone(error):
            return UsageError(
                f"A rank of the target is gone, or has said nothing for {self._deadline_s:g} s, and the run is over "
                f"({brief(error)})."
            )
        return error

    def close(self) -> None:
        """Ends the other ranks. Never raises: it may be called because one of them has failed."""
        self._over.set()
        if self._group:
            with contextlib.suppress(RuntimeError):
                self.say(End())
            with self._saying:
                self._group.close()
                self._group = None
            patience_s = 10.0
        else:
            patience_s = 0.0  # nobody has heard anything that could make it end
        for child in self._children:
            end(child, patience_s)
        self._children.clear()

    def _await(self, what: str) -> None:
        began = time.monotonic()
        left = [f"{what}-{rank}" for rank in range(1, self.size)]
        while left:
            if self._store.check([left[0]]):
                left.pop(0)
                continue
            if reason := self._reason():
                raise UsageError(reason)
            if time.monotonic() - began > START_S:
                raise UsageError(f"Not all ranks of the target were {what} within {START_S:g} s: see their messages.")
            time.sleep(0.01)

    def _reason(self) -> str:
        """Why a rank has failed, as far as it is known."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILED]):
                return self._store.get(_FAILED).decode()
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
                self.say(Wait())
            except (RuntimeError, AssertionError):
                return  # the next call meets it too, or the run is over


def follow(
    config: EngineConfig,
    checked: Preflight,
    rank: int,
    cpus: Sequence[int],
    store: dist.Store,
    host: str | None,
    deadline_s: float,
) -> None:
    """A rank other than the first: loads its shard and makes the calls that rank 0 says, until it ends the run.

    Raises `Lost` if rank 0 is gone, or whatever went wrong here, of which rank 0 then knows.
    """
    cores.pin(list(cpus))
    torch.set_num_threads(len(cpus))
    group = None
    try:
        with _told(store, rank):
            store.set(f"here-{rank}", "")
            store.wait([_MET], timedelta(seconds=START_S))
            group = Group(store, rank, config.tensor_parallel_size, deadline_s, host)
            shard = load_shard(checked)
            store.set(f"loaded-{rank}", "")
        texts = Texts()
        for words in _calls(group):
            call = decode(words, texts)
            if isinstance(call, End):
                return
            with _told(store, rank), contextlib.suppress(CannotBranch), ordered_sum.in_order():
                call.on(shard)
    finally:
        if group:
            group.close()


def _calls(group: Group) -> Iterator[list[int]]:
    while True:
        try:
            yield group.line.receive()
        except RuntimeError as error:  # gloo's word for a closed connection, and for silence
            raise Lost(brief(error)) from None


@contextlib.contextmanager
def _told(store: dist.Store, rank: int) -> Iterator[None]:
    """What goes wrong in here is told to rank 0, unless it is that rank 0, or another one, is gone."""
    try:
        yield
    except Exception as error:
        if _is_gone(error):
            raise Lost(brief(error)) from None
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            said = f"Rank {rank} of the target failed, and the run is over: {brief(reason, 500)}"
            store.set(_FAILED, said)
        raise


def _is_gone(error: Exception) -> bool:
    """Whether it is what a rank sees of the end of another one."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def launched(config: EngineConfig, world: World, checked: Preflight, cpus: Sequence[int]) -> None:
    """The life of a rank that a launcher has started. Raises `SystemExit`."""
    store, host = meeting(_MEETING)
    raise SystemExit(_live(world.shard, lambda: follow(config, checked, world.shard, cpus, store, host, DEADLINE_S)))


def _live(rank: int, run: Callable[[], None]) -> int:
    try:
        run()
    except Lost as lost:
        print(f"pearl: rank {rank} of the target has lost another one ({lost}) and ends.", file=sys.stderr)
        return 1
    except UsageError as error:
        print(f"error: rank {rank} of the target: {error}", file=sys.stderr)
        return 2
    return 0


def deal(cpus: Sequence[int], parts: int) -> list[list[int]]:
    """These CPUs for so many ranks on one machine, neighbours together; too few are shared by all."""
    if len(cpus) < parts:
        return [list(cpus)] * parts
    ends = [len(cpus) * part // parts for part in range(parts + 1)]
    return [list(cpus[first:last]) for first, last in pairwise(ends)]


def main() -> int:
    orders: dict[str, Any] = json.loads(os.environ[_ORDERS])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to rank 0, which ends this process
    config, rank = EngineConfig.from_json(orders["config"]), orders["rank"]
    store = dist.TCPStore(LOCAL, orders["port"], config.tensor_parallel_size, is_master=False)

    def run() -> None:
        with _told(store, rank):
            checked = preflight(config, ("target",), config.tensor_parallel_size)
        follow(config, checked, rank, orders["cpus"], store, LOCAL, orders["deadline_s"])

    return _live(rank, run)


if __name__ == "__main__":
    sys.exit(main())
