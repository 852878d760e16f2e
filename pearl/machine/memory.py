"""How much memory a process has used at most, in main memory or on its GPUs."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def reset_peak() -> None:
    """Starts a new peak, where the system allows it; elsewhere a peak is that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if cuda := _cuda():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def peak() -> int:
    """Bytes: on the GPUs if this process has used any, else resident in main memory."""
    cuda = _cuda()
    on_gpus = sum(map(cuda.max_memory_allocated, range(cuda.device_count()))) if cuda else 0
    if on_gpus:
        return on_gpus
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process: some sandboxes say no more


def _cuda():  # torch.cuda, if this process has opened it
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
