"""On which devices the models go, and whether these have room for them.

Knows: what is free on this machine. Refuses to know: how a model gets there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pearl.config.engine_config import EngineConfig
from pearl.config.pairs import BYTES, needed_gb, probe
from pearl.errors import UsageError


@dataclass(frozen=True)
class Placement:
    """The devices of one model."""

    devices: tuple[str, ...]

    @property
    def on_cpu(self) -> bool:
        return self.devices == ("cpu",)

    def device_map(self) -> Any:
        """What transformers' `device_map` takes: all on one device, or layers over several, by their free memory."""
        return {"": self.devices[0]} if len(self.devices) == 1 else "auto"

    def max_memory(self) -> dict[int, int] | None:
        """Bytes by GPU; None: no limit."""
        if len(self.devices) == 1:
            return None
        gpus = [torch.device(d).index or 0 for d in self.devices]
        return {gpu: int(torch.cuda.mem_get_info(gpu)[0] * 0.9) for gpu in gpus}


@dataclass(frozen=True)
class Load:
    """What one model puts on its devices."""

    placed: Placement
    numbers: float | None  # of the whole model; None: not known yet
    kind: str  # of numbers: a dtype, or 8bit or 4bit
    cache_gb: float = 0.0  # keys and values of all texts
    part: float = 1.0  # of the model, that is on this machine

    def gb(self) -> float:
        weights = needed_gb(self.numbers * self.part * BYTES[self.kind] / 1e9) if self.numbers else 0.0
        return weights + self.cache_gb


def place(config: EngineConfig, ranks: int, gpu: int) -> dict[str, Placement]:
    """By role. `ranks`: how many of the target's are on this machine. `gpu`: of this one among them. Raises
    `UsageError`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = 0
    if config.tensor_parallel_size > 1 and gpus:
        if config.target_device == "cpu":
            raise UsageError("A target over several ranks takes the machine's GPUs: CUDA_VISIBLE_DEVICES= hides them.")
        if ranks > gpus:
            raise UsageError(f"{ranks} ranks of the target need {ranks} GPUs on this machine, which has {gpus}.")
        number = min(gpu, gpus - 1)  # the drafter may come after the last GPU
    placed = {
        "target": _devices("target_device", config.target_device, gpus, number),
        "draft": _devices("draft_device", config.draft_device, gpus, gpus - 1),
    }
    for role, dtype in (("target", config.dtype), ("draft", config.draft_dtype or config.dtype)):
        if not placed[role].on_cpu and dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
            raise UsageError(f"The {role}'s GPU has no bfloat16: use --dtype float16 or float32.")
    return placed


def make_room(
    config: EngineConfig, placed: Mapping[str, Placement], loads: Mapping[str, Load], max_sequences: int = 1
) -> dict[str, Placement]:
    """Where all goes, by role. A target that nobody has placed, and that its GPU has no room for, goes over all GPUs
    but the drafter's.

    `loads`: by role; what drafts in the target's process is `beside`. Raises `UsageError` as `check_memory` does."""
    moved = dict(placed)
    if config.target_device == "auto" and config.tensor_parallel_size == 1 and not placed["target"].on_cpu:
        free, drafts = probe().gpus_gb, placed["draft"].devices if "draft" in loads else ()
        others = tuple(name for name in (f"cuda:{gpu}" for gpu in range(len(free))) if name not in drafts)
        if len(others) > 1 and sum(load.gb() for role, load in loads.items() if role != "draft") > free[0]:
            moved["target"] = Placement(others)
    there = [replace(load, placed=moved.get(role, moved["target"])) for role, load in loads.items()]
    check_memory(there, max_sequences)
    return moved


def check_memory(loads: Sequence[Load], max_sequences: int = 1) -> None:
    """Raises `UsageError` where the devices don't have what is known to be needed. `max_sequences`: texts side
    by side."""
    needs: dict[Placement, float] = {}
    for load in loads:
        needs[load.placed] = needs.get(load.placed, 0.0) + load.gb()
    if not any(needs.values()):
        return
    machine = probe()
    for placed, need in [*needs.items(), *_sharing(needs).items()]:
        free = machine.ram_gb
        if not placed.on_cpu:
            free = sum(machine.gpus_gb[torch.device(d).index or 0] for d in placed.devices)
        if need > free:
            where = "in main memory" if placed.on_cpu else f"on {', '.join(placed.devices)}"
            raise UsageError(
                f"The models need about {need:.1f} GB {where}, where {free:.1f} GB are free: choose smaller models, "
                "--load-in 4bit, a shorter max_length, or other devices."
                + (
                    f" {max_sequences} texts side by side are part of it: fewer will do, too."
                    if max_sequences > 1
                    else ""
                )
            )


def _sharing(needs: Mapping[Placement, float]) -> dict[Placement, float]:
    """The same of all devices together that models share: one may be on two GPUs, and another on the second of them."""
    found: dict[Placement, float] = {}
    for placed, need in needs.items():
        for other in [one for one in found if set(one.devices) & set(placed.devices)]:
            placed = Placement(tuple(dict.fromkeys(other.devices + placed.devices)))
            need += found.pop(other)
        found[placed] = need
    return found


def _devices(option: str, text: str, gpus: int, default: int) -> Placement:
    if text == "auto":
        return Placement((f"cuda:{default}",) if gpus else ("cpu",))
    devices = tuple(part.strip() for part in text.split(","))
    for device in devices:
        kind, _, index = device.partition(":")
        if (
            kind not in ("cpu", "cuda")
            or (index and not index.isdigit())
            or (kind == "cpu" and (index or len(devices) > 1))
        ):
            raise UsageError(f"{option} must be cpu, cuda:0, or several GPUs like cuda:0,cuda:1, not {text!r}.")
        if kind == "cuda" and int(index or 0) >= gpus:
            raise UsageError(f"{option} {device} is not there: this machine has {gpus} GPUs; use auto or cpu.")
    return Placement(tuple("cuda:0" if device == "cuda" else device for device in devices))  # one name for one
