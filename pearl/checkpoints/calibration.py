"""What was measured of a model on this machine once, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from pearl.machine.files import cache_folder


def remembered(key: dict[str, object], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`find()`, or what it said the last time on this machine for this `key` and these versions."""
    versions = [torch.__version__, transformers.__version__, platform.processor(), torch.get_num_threads()]
    name = hashlib.sha256(json.dumps([key, versions, _processor()], sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "rows" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = find()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(path)
    return found


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith(("model name", "flags"))][:2]
    return "".join(flags)
