"""pearl: parallel speculative decoding. A drafter and a target in two processes, and the target's own text.

The names below load torch when they are first used; `import pearl` alone is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AsyncEngine": "pearl.engine",
    "Engine": "pearl.engine",
    "Generation": "pearl.engine",
    "GenerationHandle": "pearl.engine",
    "GenerationRequest": "pearl.engine",
    "EngineConfig": "pearl.config.engine_config",
    "SamplingParams": "pearl.core.params",
    "Schedule": "pearl.core.schedule",
    "DrafterEvent": "pearl.wire.reconnecting_channel",
    "PearlError": "pearl.errors",
    "UsageError": "pearl.errors",
    "CheckpointError": "pearl.errors",
    "WorkerLostError": "pearl.errors",
    "EngineClosedError": "pearl.errors",
    "StorageError": "pearl.errors",
    "NonFiniteLogits": "pearl.errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pearl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
