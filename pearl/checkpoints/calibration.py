"""What was measured of a model on this machine once, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from pearl.machine.files import atomic_write, cache_folder


def measured_once(key: dict[str, object], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`measure()`, or what it said the last time on this machine for this `key` and these versions.

    Of processes that ask at the same time one measures and the others wait."""
    versions = [torch.__version__, transformers.__version__, platform.processor(), torch.get_num_threads()]
    name = hashlib.sha256(json.dumps([key, versions, _processor()], sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "rows" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(measure()))
        return json.loads(path.read_text())


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith(("model name", "flags"))][:2]
    return "".join(flags)
