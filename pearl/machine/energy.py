"""How much energy the machine has used, where it tells: processor packages by RAPL, GPUs by NVML.

All that runs on the machine counts, idle devices too. Nothing here is an estimate: what a machine does not tell, or not
to this user, is left out, and where it tells nothing there is no figure.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made."""

    def __init__(self, powercap: Path = POWERCAP):
        self._counters = [*_packages(powercap), *_gpus()]

    def __bool__(self) -> bool:
        """The machine tells something."""
        return bool(self._counters)

    def joules(self) -> float | None:
        """None: the machine tells nothing, or no longer."""
        try:
            return sum(counter() for counter in self._counters) if self._counters else None
        except (OSError, ValueError):
            return None


def _packages(powercap: Path) -> list[Callable[[], float]]:
    """A package holds its cores and its graphics, so these zones below it are no further energy; `psys` holds the
    packages. Zones of AMD's processors have Intel's names."""
    found: list[Callable[[], float]] = []
    for zone in sorted(powercap.glob("*-rapl:*")) if powercap.is_dir() else []:
        with contextlib.suppress(OSError, ValueError):
            if (zone / "name").read_text().strip().startswith("package"):
                found.append(_Wrapping(zone))
    return found


class _Wrapping:
    """A counter in microjoules that begins again when it is full."""

    def __init__(self, zone: Path):
        self._file = zone / "energy_uj"
        self._full = int((zone / "max_energy_range_uj").read_text())
        self._last, self._total = self._read(), 0

    def _read(self) -> int:
        return int(self._file.read_text())

    def __call__(self) -> float:
        now = self._read()
        self._total += (now - self._last) % (self._full + 1)
        self._last = now
        return self._total / 1e6


def _gpus() -> list[Callable[[], float]]:
    """Of NVML, where this process uses GPUs and its package is there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        began = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]
    except Exception:  # no such package, no such driver, a GPU that does not count
        return []

    def joules() -> float:
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles), -sum(began)) / 1e3

    return [joules]
