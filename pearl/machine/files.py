"""Where this project keeps what it computes once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache directory for what this project computes once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pearl"
