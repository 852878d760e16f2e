"""The same as `pearl judge`, from a checkout that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.results.judge import main

if __name__ == "__main__":
    sys.exit(main())
