"""Prompts of real text, 128 to 8,000 tokens long: speed of every mode by length.

    python eval/input_length.py --mode ar pearl tree --skip-too-long --max-length 8192

The same as `pearl eval input-length`. scripts/sweep_input_length.sh draws it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.eval import script

main = script("input-length")

if __name__ == "__main__":
    sys.exit(main())
