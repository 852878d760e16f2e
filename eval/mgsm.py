"""MGSM: the same ten problems in eleven languages, figures language by language.

    accelerate launch --num_processes 2 eval/mgsm.py --pair qwen2.5-0.5b-7b --mode ar sd pearl
    python eval/mgsm.py --share 0.1 --data mgsm.jsonl

Prints a table; writes samples.jsonl, passes.jsonl and summary.json into --output (see pearl/results.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.evaluation import main as evaluation
from pearl.tasks import mgsm


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    return evaluation.main(mgsm.SUITE, argv)


if __name__ == "__main__":
    sys.exit(main())
