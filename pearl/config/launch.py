"""What `accelerate launch` was asked for and does not do: without --multi_gpu it starts one process, silently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import psutil

from pearl.machine import launcher


def note() -> str:
    """A sentence for whoever asked a launcher for several processes and got one; nothing to say otherwise."""
    if launcher.started() > 1:
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
