"""The steps of a first run on a GPU, one after the other, each in a process of its own (see gpu_first_run.sh).

    machine     versions, devices, how they are connected, the doctor's facts
    texts       both processes on one device: every mode, greedy and seeded, writes what the target alone writes
    default     the same with the default pair, where its weights are installed
    shapes      `pearl bench`: bits, graph against eager, bandwidth, host time, synthetic drafters, predicted pairs

A step that fails or runs out of time is reported, and the next one begins. The table is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTIONS = ["What is seven times eight?", "Tom has 3 apples and buys 4 more. How many has he?"]
MODES = ["ar", "sd", "pearl", "tree"]
FACTS = """
import json, platform, torch, transformers
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    "cuda": torch.version.cuda, "gpus": [{"name": g.name, "gb": round(g.total_memory / 1e9, 1)} for g in gpus],
}))
"""


class FirstRun:
    """Runs steps, and keeps what they have found on disk."""

    def __init__(self, folder: Path, seconds: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._ends = folder, time.monotonic() + seconds
        self.found: dict[str, Any] = {"steps": []}

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()

    def step(self, name: str, command: list[str], most_s: float, after: Any = None) -> bool:
        """Whether it ended well. `after`: what it has found, if it ended well or not."""
        limit = min(most_s, self.left)
        verdict, began = "no time was left", time.monotonic()
        if limit > 5:
            print(f"{name}: at most {limit:.0f} s", flush=True)
            with (self.folder / f"{name}.log").open("w") as log:
                try:
                    code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
                    verdict = "ok" if code == 0 else f"code {code}"
                except subprocess.TimeoutExpired:
                    verdict = f"cut off after {limit:.0f} s"
        self.found["steps"].append(
            {"step": name, "result": verdict, "seconds": round(time.monotonic() - began, 1), "command": command}
        )
        if after:
            try:
                self.found[name] = after()
            except (OSError, ValueError, KeyError, IndexError) as error:
                self.found[name] = {"nothing found": f"{type(error).__name__}: {error}"}
        self.write()
        print(f"{name}: {verdict}", flush=True)
        return verdict == "ok"

    def write(self) -> None:
        (self.folder / "first_run.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (self.folder / "first_run.md").write_text("\n".join(page(self.found)) + "\n")


def page(found: dict[str, Any]) -> Iterator[str]:
    yield "# First run\n\n| step | result | seconds |\n| --- | --- | --- |"
    for one in found["steps"]:
        yield f"| {one['step']} | {one['result']} | {one['seconds']} |"
    if "machine" in found:
        yield f"\n{json.dumps(found['machine'])}"
    for name in ("texts", "texts-seeded", "default", "default-seeded"):
        for mode, one in (found.get(name) or {}).items():
            if isinstance(one, dict):
                same = f"same text {one['identical_to_ar']:.0%}"
                yield f"\n{name}, {mode}: {one['tokens_per_second']:.1f} tokens/s, {same}"
    if "text" in (found.get("shapes") or {}):
        yield f"\n{found['shapes']['text']}"


def pearl(*words: object) -> list[str]:
    return [sys.executable, "-m", "pearl", *map(str, words)]


def figures(folder: Path) -> dict[str, Any]:
    modes = json.loads((folder / "summary.json").read_text())["modes"]
    return {mode: {key: one[key] for key in ("tokens_per_second", "identical_to_ar")} for mode, one in modes.items()}


def same_texts(run: FirstRun, name: str, tokens: int, *models: object) -> None:
    """Both processes on one device, greedy and seeded."""
    data = run.folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": one, "answer": "#### 7"}) + "\n" for one in QUESTIONS))
    for kind, sampling in ((name, []), (f"{name}-seeded", ["--temperature", 1, "--seed", 1])):
        folder = run.folder / kind
        run.step(
            kind,
            pearl(
                *("eval", "gsm8k", "--data", data, *models, "--mode", *MODES, "--max-new-tokens", tokens),
                *("--output", folder, "--resume", *sampling),
            ),
            90,
            lambda folder=folder: figures(folder),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--output", type=Path, default=Path("results/gpu_first_run"))
    options = parser.parse_args()
    run = FirstRun(options.output.absolute(), options.seconds)
    tiny = options.shapes == ["tiny"]

    log = run.folder / "machine.log"
    run.step("machine", [sys.executable, "-c", FACTS], 60, lambda: json.loads(log.read_text().splitlines()[-1]))
    if (run.found["machine"] or {}).get("gpus"):
        run.step("topology", ["nvidia-smi", "topo", "-m"], 20)
    run.step("doctor", pearl("doctor", "--no-models"), 60)
    toy = run.folder / "toy"
    if run.step("toy", [sys.executable, "scripts/toy_target.py", str(toy)], 60):
        same_texts(run, "texts", 12 if tiny else 48, "--target", toy, "--draft", toy, "--max-length", 2048)
    if not os.environ.get("WITHOUT_DEFAULT"):
        same_texts(run, "default", 8 if tiny else 64)
    bench = run.folder / "bench"
    words = ["bench", "--shapes", *options.shapes, "--seconds", max(20, run.left - 40), "--output", bench]
    run.step(
        "shapes",
        pearl(*words, *(("--dtype", "float32") if tiny else ())),
        run.left,
        lambda: {
            **json.loads((bench / "bench.json").read_text()),
            "text": (bench / "bench.md").read_text(),
        },
    )
    print((run.folder / "first_run.md").read_text())
    return 0 if all(one["result"] == "ok" for one in run.found["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
