"""GSM8K: grade-school problems, right if the final number is.

    accelerate launch --num_processes 2 eval/gsm8k.py --pair qwen2.5-0.5b-7b --mode ar sd pearl
    python eval/gsm8k.py --limit 10 --data test.jsonl

Prints a table; writes samples.jsonl, passes.jsonl and summary.json into --output (see pearl/results.py).
`--format completion` is the 8-shot chain of thought, `--format chat` asks without examples.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.evaluation import main as evaluation
from pearl.tasks import gsm8k


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    return evaluation.main(gsm8k.SUITE, argv)


if __name__ == "__main__":
    sys.exit(main())
