"""Programs that use pearl, run as a person would run them, but for the time that it takes to import torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import forks

ROOT = Path(__file__).resolve().parents[2]


def start(
    folder: Path, script: str, *words: str, launcher: tuple[str, ...] = (), forked: bool = True, **environment: str
) -> subprocess.Popen:
    """A script, run in `folder` on one thread and in a session of its own. What a forked one starts is forked too."""
    (folder / "script.py").write_text(script)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return (forks.Forked if forked else subprocess.Popen)(
        [sys.executable, *launcher, "script.py", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def torchrun(*options: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", *(options or ("--standalone", "--nproc_per_node", "2")))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def printed_by(machines: Sequence[subprocess.Popen]) -> list[str]:
    """What the launchers of several machines, which are this one, have printed. All must end well."""
    try:
        said = [machine.communicate(timeout=200) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0] * len(machines), "".join(errors for _, errors in said)
    return [printed for printed, _ in said]
