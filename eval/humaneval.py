"""HumanEval: decode its 164 problems in several modes at once and score what comes out.

    accelerate launch --config_file configs/accelerate/two_gpus.yaml eval/humaneval.py --mode ar pearl tree
    python eval/humaneval.py --limit 10

The same as `pearl eval humaneval`: prints a table, writes samples.jsonl, passes.jsonl and summary.json into --output.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.eval import script

main = script("humaneval")

if __name__ == "__main__":
    sys.exit(main())
