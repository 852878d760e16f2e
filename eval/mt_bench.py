"""MT-bench: 80 questions in two turns; the second turn's prompt goes on from the first answer.

    accelerate launch --num_processes 2 eval/mt_bench.py --pair qwen2.5-0.5b-7b --mode ar sd pearl
    python eval/mt_bench.py --share 0.1 --data question.jsonl

Writes what eval/humaneval.py writes, and each mode's answers to model_answer/ in the format of
FastChat's llm_judge. eval/judge.py judges them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.evaluation import main as evaluation
from pearl.tasks import mt_bench


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    return evaluation.main(mt_bench.SUITE, argv)


if __name__ == "__main__":
    sys.exit(main())
