"""How much energy the machine has used, where it tells: processor packages by RAPL, GPUs by NVML.

All that runs on the machine counts, idle devices too. Nothing here is an estimate, and nothing is a part of what was
asked for: where a device that is in use does not tell, or not to this user, there is no figure. Processors that only
serve GPUs count where they tell; `counted` names what is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
Counters = dict[str, Callable[[], float]]  # by name; of all its like together, or none


class EnergyMeter:
    """Joules since it was made."""

    def __init__(self, in_use: Collection[str], powercap: Path = POWERCAP):
        """`in_use`: kinds of devices, `cpu` and `cuda`; of none nothing is told."""
        of = {"cpu": _packages(powercap), "cuda": _gpus()} if in_use else {}
        known = all(of.get(kind) for kind in in_use)
        self._counters = {name: one for some in of.values() for name, one in some.items()} if known else {}

    @property
    def counted(self) -> list[str]:
        """What the figures are of; empty if the machine does not tell what was asked for."""
        return list(self._counters)

    def joules(self) -> float | None:
        """None: the machine does not tell, or no longer."""
        try:
            return sum(counter() for counter in self._counters.values()) if self._counters else None
        except (OSError, ValueError):
            return None


def _packages(powercap: Path) -> Counters:
    """A package holds its cores and its graphics, so these zones below it are no further energy; `psys` holds the
    packages. Zones of AMD's processors have Intel's names."""
    found: Counters = {}
    for zone in sorted(powercap.glob("*-rapl:*")) if powercap.is_dir() else []:
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith("package"):
                found[name] = _Wrapping(zone)
        except (OSError, ValueError):  # not to this user
            return {}
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


def _gpus() -> Counters:
    """Of NVML, where this process uses GPUs and its package is there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        began = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]
    except Exception:  # no such package, no such driver, a GPU that does not count
        return {}

    def joules() -> float:
        try:
            return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles), -sum(began)) / 1e3
        except pynvml.NVMLError as error:  # no OSError
            raise OSError(str(error)) from error

    return {f"{len(handles)} GPU{'s' * (len(handles) > 1)}": joules} if handles else {}
