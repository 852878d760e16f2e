"""HumanEval while the drafter is killed in the middle: is every text there and the same, and how fast is it then?

    python tests/tools/killed.py --max-draft-restarts 0      killed for good: what is left must be as fast as `ar`
    python tests/tools/killed.py                         it comes back

Exit code 1 if a text differs, a problem is missing, or, without a drafter, the speed is below 0.97 x `ar`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MODES = ("ar", "pearl")


def drafter_of(pid: int) -> int:
    """The process that a target has started."""
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if "pearl.parallel.drafter_main" in child.cmdline():
                return child.pid
    raise SystemExit("there is no drafter")


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--limit", type=int, default=12, help="problems")
    made.add_argument("--after", type=int, default=4, help="problems that are finished before it is killed")
    made.add_argument("--max-new-tokens", type=int, default=64)
    made.add_argument("--max-draft-restarts", type=int, default=3)
    found = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "eval" / "humaneval.py"), "--no-score", "--mode", *MODES]
        for name in ("limit", "max_new_tokens", "max_draft_restarts"):
            command += [f"--{name.replace('_', '-')}", str(getattr(found, name))]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        run = subprocess.Popen([*command, "--output", str(output)], env={**os.environ, "PYTHONPATH": path})
        samples = output / "samples.jsonl"
        while run.poll() is None and (not samples.exists() or _rounds(samples) < found.after):
            time.sleep(0.05)
        time.sleep(0.4)  # in the middle of the next problem
        os.kill(drafter_of(run.pid), signal.SIGKILL)
        if run.wait():
            return 1
        lines = [json.loads(line) for line in (output / "passes.jsonl").read_text().splitlines()]
        texts = [json.loads(line) for line in samples.read_text().splitlines()]
        summary = json.loads((output / "summary.json").read_text())
    order = list(dict.fromkeys(line["task_id"] for line in texts))
    same = sum(len({tuple(line["tokens"]) for line in texts if line["task_id"] == task}) == 1 for task in order)
    events = [event["kind"] for event in summary["events"]]
    print(f"{len(order)} of {found.limit} problems finished, {same} with the same text in both modes; events {events}")
    parts = {"before": order[: found.after], "after": order[found.after + 1 :]}
    ratio = 0.0
    for part, tasks in parts.items():
        speed: dict[str, float] = {}
        for mode in MODES:
            some = [line for line in lines if line["mode"] == mode and line["task_id"] in tasks]
            speed[mode] = sum(line["committed"] for line in some) / sum(line["seconds"] for line in some)
        ratio = speed["pearl"] / speed["ar"]
        print(f"{part}: ar {speed['ar']:.2f} tokens/s, pearl {speed['pearl']:.2f}, {ratio:.3f} x ar")
    alone = found.max_draft_restarts == 0 and ratio < 0.97
    return int(alone or not len(order) == same == found.limit)


def _rounds(samples: Path) -> int:
    counts: defaultdict[str, int] = defaultdict(int)
    for line in samples.read_bytes().split(b"\n")[:-1]:
        counts[json.loads(line)["task_id"]] += 1
    return sum(count == len(MODES) for count in counts.values())


if __name__ == "__main__":
    sys.exit(main())
