"""Python programs as forks of a process that has imported everything.

To import torch and transformers takes seconds, which every drafter's process and every short command of a test would
pay. A nursery is forked before anything else runs, and forks whatever is asked for; `Forked` is a `subprocess.Popen` of
it, with the same parent, streams, environment and exit code.

    python tests/support/forks.py SOCKET RANKS PROGRAM...      asks one that listens; 2 ranks are started as by torchrun

Not so: an environment variable that a library reads when it is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXECUTABLE = sys.executable
_IMPORTED = (
    "pearl.engine",
    "pearl.evaluation.main",
    "pearl.checkpoints.drafters",
    "pearl.drafters.feature.source",
    "pearl.training.train",
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
)
NAME = "nursery"  # of such a process
_NAME, _SUBREAPER = 15, 36  # PR_SET_NAME, PR_SET_CHILD_SUBREAPER
_RANK = "rank "
_MOST = 1 << 18  # bytes of an order
_door: socket.socket | None = None  # to this process's nursery
_turn = threading.Lock()


def plant(everything: bool = False) -> None:
    """Forks the nursery of this process. From here on the processes that pearl starts are forks, or `everything` is, as
    what the launchers of torch and accelerate start."""
    global _door
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST)
    if not os.fork():
        _nursery(theirs)
    theirs.close()
    _door = ours
    if everything:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler as torchs

        subprocess.Popen = torchs.Popen = Forked  # type: ignore[misc]
        return
    from pearl.parallel import child

    child.subprocess = FORKING  # type: ignore[assignment]


class Forked(subprocess.Popen):
    """Of `python -m MODULE ...`, `python -c CODE ...` or `python FILE ...`; anything else is started as ever."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if _door is None or isinstance(args, str | bytes) or not _forkable([*map(str, args)]) or rest[1] or rest[3]:
            super()._execute_child(args, *rest)
            return
        cwd, env, pipes, start_new_session = rest[4], rest[5], rest[9:15], rest[20]  # of Python 3.11 to 3.14
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        order = {
            "command": [str(word) for word in args[1:] if word != "-u"],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "session": bool(start_new_session),
        }
        streams = [p2cread if p2cread >= 0 else 0, c2pwrite if c2pwrite >= 0 else 1, errwrite if errwrite >= 0 else 2]
        with _turn:
            # what the nursery's fork leaves behind becomes our own child
            ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
            socket.send_fds(_door, [json.dumps(order).encode()], streams)
            self.pid = int(_door.recv(64))
            ctypes.CDLL(None).prctl(_SUBREAPER, 0, 0, 0, 0)
        self._child_created = True
        self._close_pipe_fds(*pipes)


FORKING = types.SimpleNamespace(**vars(subprocess) | {"Popen": Forked})  # in the place of a module's `subprocess`


def _forkable(words: list[str]) -> bool:
    options = [word for word in words[1:2] if word.startswith("-")]
    return words[0] == EXECUTABLE and len(words) > 1 and options in ([], ["-m"], ["-c"], ["-u"])


def run(command: Sequence[str | Path], timeout: float = 600, **options: Any) -> subprocess.CompletedProcess:
    """What a forked program has said, and its code."""
    with Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as program:
        try:
            said = program.communicate(timeout=timeout)
        except BaseException:
            program.kill()
            raise
    return subprocess.CompletedProcess(command, program.returncode, *said)


def _nursery(door: socket.socket) -> None:
    """Serves the process that it was forked from until that ends, and holds nothing of it open."""
    with contextlib.suppress(BaseException):
        _call_me(NAME)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _only([door.fileno()])
        parent, imported = os.getppid(), False
        while True:
            words, streams, _, _ = socket.recv_fds(door, _MOST, 3)
            if not words:
                break
            if not imported:
                imported = True
                for name in _IMPORTED:
                    importlib.import_module(name)
            there, here = os.pipe()
            if not (middle := os.fork()):
                if pid := os.fork():
                    os.write(here, str(pid).encode())
                    os._exit(0)
                while os.getppid() != parent:
                    time.sleep(0.001)
                _become(json.loads(words), streams)
            os.waitpid(middle, 0)
            door.send(os.read(there, 64))
            for file in (there, here, *streams):
                os.close(file)
    os._exit(0)


def _call_me(name: str) -> None:
    ctypes.CDLL(None).prctl(_NAME, name.encode(), 0, 0, 0)


def ranks_of(launcher: int) -> dict[str, Any]:
    """The processes, of psutil, that a forked launcher has started."""
    import psutil

    children = psutil.Process(launcher).children()
    return {one.name().removeprefix(_RANK): one for one in children if one.name().startswith(_RANK)}


def _only(files: list[int]) -> None:
    """Closes all others, but for the streams, which lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    for file in map(int, os.listdir("/proc/self/fd")):
        if file > 2 and file not in files:
            with contextlib.suppress(OSError):
                os.close(file)


def _become(order: dict[str, Any], streams: list[int]) -> None:
    """Runs a program, in a fork that does nothing else."""
    code = 1
    with contextlib.suppress(BaseException):
        import torch

        # torch makes its pool of threads anew when it is first asked after a fork; of two threads that ask at once one
        # would find none
        torch.set_num_threads(torch.get_num_threads())
        if order["session"]:
            os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for file in map(int, os.listdir("/proc/self/fd")):
            if file > 2:
                with contextlib.suppress(OSError):
                    os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.resetwarnings()
        for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):  # as Python does
            warnings.simplefilter("ignore", quiet)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["environment"])
        _call_me(_RANK + os.environ["RANK"] if "RANK" in os.environ else "python")
        sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "rw"[i > 0], closefd=False) for i in range(3))
        if not order["command"][1].startswith("pearl.parallel."):  # which starts none
            plant(everything=True)
        code = _run(order["command"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run(command: list[str]) -> int:
    """The exit code of a program."""
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.modules.pop(command[1], None)
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        elif command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1


class Door:
    """Where commands of this machine, which need not be of this process, ask for forks of it."""

    def __init__(self, address: Path):
        self.address = address
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(address))
        self._listening.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def command(self, ranks: int) -> list[str]:
        return [EXECUTABLE, "-S", __file__, str(self.address), str(ranks)]

    def programs(self, folder: Path) -> Path:
        """Puts `python`, `python3`, `accelerate` and `pearl` there, for a PATH: what they run is forked, but for
        `python -`."""
        forked = shlex.join(self.command(1))
        python = [f'[ "$1" = - ] || exec {forked} "$@"', f'exec {EXECUTABLE} "$@"']
        for name, lines in {
            "python": python,
            "python3": python,
            "accelerate": [f'exec {forked} -m accelerate.commands.accelerate_cli "$@"'],
            "pearl": [f'exec {forked} -m pearl "$@"'],
        }.items():
            (folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
            (folder / name).chmod(0o755)
        return folder

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                asked, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=[asked], daemon=True).start()

    def _answer(self, asked: socket.socket) -> None:
        with asked, socket.socket() as free:
            words, streams, _, _ = socket.recv_fds(asked, _MOST, 3)
            order = json.loads(words)
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            ranks = [
                Forked(
                    [EXECUTABLE, *order["command"]],
                    cwd=order["cwd"],
                    env=order["environment"] | (_as_rank(rank, order["ranks"], port) if order["ranks"] > 1 else {}),
                    stdin=streams[0],
                    stdout=streams[1],
                    stderr=streams[2],
                )
                for rank in range(order["ranks"])
            ]
            for stream in streams:
                os.close(stream)
            threading.Thread(target=_end_with, args=[asked, ranks], daemon=True).start()
            with contextlib.suppress(OSError):  # who asked may be gone
                asked.sendall(bytes([max(rank.wait() & 255 for rank in ranks)]))
                asked.shutdown(socket.SHUT_RDWR)


def _end_with(asked: socket.socket, ranks: list[Forked]) -> None:
    """Whoever kills a command means the program, which is no child of it here."""
    with contextlib.suppress(OSError):
        asked.recv(1)  # until it is gone
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()


def _as_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def ask(address: str, ranks: int, command: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(address)
        order = {"command": command, "cwd": str(Path.cwd()), "environment": dict(os.environ), "ranks": ranks}
        socket.send_fds(door, [json.dumps(order).encode()], [0, 1, 2])
        return door.recv(1)[0]


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
