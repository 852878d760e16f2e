"""HumanEval: decode its 164 problems in several modes at once and score what comes out.

    accelerate launch --config_file configs/accelerate/two_gpus.yaml eval/humaneval.py --mode ar pearl tree
    python eval/humaneval.py --limit 10

The same as `pearl eval humaneval`: prints a table, writes samples.jsonl, passes.jsonl and summary.json into --output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands import eval


def main(argv: Sequence[str] | None = None) -> int:
    return eval.main(["humaneval", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
