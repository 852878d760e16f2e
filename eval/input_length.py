"""Prompts of real text, 128 to 8,000 tokens long: speed of every mode by length.

    python eval/input_length.py --mode ar pearl tree --skip-too-long --max-length 8192

The same as `pearl eval input-length`. scripts/sweep_input_length.sh draws it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands import eval


def main(argv: Sequence[str] | None = None) -> int:
    return eval.main(["input-length", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
