"""A launcher of two ranks, as `torchrun` is one; its ranks are forks of a process that has imported everything.

    python tests/support/forks.py --serve SOCKET &
    python tests/support/forks.py SOCKET SCRIPT ARGUMENTS...

To import torch and transformers takes seconds, which a test of many short commands would pay for each rank of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def serve(address: str) -> None:
    sys.path.insert(0, str(ROOT))
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pearl.engine
    import pearl.evaluation.main  # noqa: F401

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        while True:
            asked, _ = door.accept()
            words, streams, _, _ = socket.recv_fds(asked, 1 << 20, 3)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            ranks = [_fork(rank, json.loads(words), streams, port) for rank in range(2)]
            for stream in streams:
                os.close(stream)
            asked.sendall(bytes([max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) & 255 for rank in ranks)]))
            asked.close()


def _fork(rank: int, words: dict, streams: list[int], port: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(words["cwd"])
        os.environ.clear()
        os.environ.update(words["environment"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ.update(LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = words["command"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def ask(address: str, command: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(address)
        words = {"command": command, "cwd": str(Path.cwd()), "environment": dict(os.environ)}
        socket.send_fds(door, [json.dumps(words).encode()], [0, 1, 2])
        return door.recv(1)[0]


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
