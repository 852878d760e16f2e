"""SPEED-Bench: NVIDIA's prompts for measuring speculative decoding, by category and entropy tier.

    accelerate launch --config_file configs/accelerate/two_gpus.yaml eval/speed_bench.py --mode ar pearl tree
    python eval/speed_bench.py --data data/speed/qualitative/test.parquet --share 0.1
    python eval/speed_bench.py --data throughput_8k --max-length 16384

The same as `pearl eval speed-bench`: prints a table, writes samples.jsonl, passes.jsonl and summary.json into --output,
and into speed_bench/ what its own framework writes of a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.commands.eval import script

main = script("speed-bench")

if __name__ == "__main__":
    sys.exit(main())
