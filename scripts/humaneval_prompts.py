"""HumanEval's prompts as questions for pearl.training.extract: to test drafters on, never to train them.

    python scripts/humaneval_prompts.py 24 > humaneval.jsonl

GSM8K's test set and MT-bench's questions are read as they are (`--prompts test.jsonl question.jsonl`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.tasks import humaneval


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for problem in humaneval.load()[:count]:
        print(json.dumps({"prompt": humaneval.INSTRUCTION.format(prompt=problem.prompt.strip())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
