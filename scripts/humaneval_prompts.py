"""HumanEval's prompts as questions for pearl.training.extract: to test drafters on, never to train them.

    python scripts/humaneval_prompts.py 24 > humaneval.jsonl

GSM8K's test set and MT-bench's questions are read as they are (`--prompts test.jsonl question.jsonl`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.tasks import humaneval


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("scripts/humaneval_prompts.py", about=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=cli.at_least_one, default=None, help="how many; default: all")
    count = parser.parse_args(argv).count
    for problem in humaneval.load()[:count]:
        print(json.dumps({"prompt": humaneval.INSTRUCTION.format(prompt=problem.prompt.strip())}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
