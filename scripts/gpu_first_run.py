"""The steps of a first run on a GPU, one after the other, each in a process of its own (see gpu_first_run.sh).

    machine     versions, devices, how they are connected, the doctor's facts
    texts       both processes on one device: every mode, greedy and seeded, writes what the target alone writes
    default     the same with the default pair, on two devices where there are two; or with one that was carried along
    shapes      `pearl bench`: bits, texts, graph against eager, bandwidth, host time, predicted speed-ups

A step that fails or runs out of time is reported, and the next one begins. The table is written anew while one is under
way, so that a run which is cut off, whatever does it, leaves what it has found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.checkpoints import embedded
from pearl.machine.files import atomic_write

Found = Callable[[], dict[str, Any]]
LOOK_S = 5.0  # between two looks at what a step has found so far
ONE_GPU = ("--target-device", "cuda:0", "--draft-device", "cuda:0")
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
        """`folder`: one of an earlier run is kept under the time at which that ended."""
        if (earlier := folder / "first_run.json").exists():
            ended = time.strftime("%Y%m%d-%H%M%S", time.localtime(earlier.stat().st_mtime))
            folder.rename(folder.with_name(f"{folder.name}-{ended}"))
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._ends = folder, time.monotonic() + seconds
        self.found: dict[str, Any] = {"steps": []}

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()

    def step(self, name: str, command: list[str], most_s: float, after: Found | None = None) -> bool:
        """Whether it ended well. `after`: what it has found, looked at now and then and when it has ended."""
        limit, began = min(most_s, self.left), time.monotonic()
        entry = {"step": name, "result": "no time was left", "seconds": 0.0, "command": command}
        self.found["steps"].append(entry)
        if limit > 5:
            entry["result"] = "under way"  # and so it stays if this process is ended meanwhile
            self.write()
            print(f"{name}: at most {limit:.0f} s", flush=True)
            try:
                for result in self._run(name, command, limit):
                    entry |= {"result": result or entry["result"], "seconds": round(time.monotonic() - began, 1)}
                    self._take_in(name, after)
            except SystemExit:
                self._take_in(name, after)
                raise
        if after and name not in self.found:
            self.found[name] = {"nothing found": entry["result"]}
        self.write()
        print(f"{name}: {entry['result']}", flush=True)
        return entry["result"] == "ok"

    def skip(self, name: str, why: str) -> None:
        """A step that can't be here, which is no failure."""
        self.found["steps"].append({"step": name, "result": f"skipped: {why}", "seconds": 0.0})
        self.write()
        print(f"{name}: skipped: {why}", flush=True)

    def _run(self, name: str, command: list[str], limit: float) -> Iterator[str]:
        """Nothing every few seconds, then how it ended. It ends with this process."""
        ends = time.monotonic() + limit
        with (self.folder / f"{name}.log").open("w") as log:
            try:
                child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            except OSError as error:  # there is no such program
                yield str(error)
                return
            try:
                while (left := ends - time.monotonic()) > 0:
                    try:
                        code = child.wait(min(LOOK_S, left))
                    except subprocess.TimeoutExpired:
                        yield ""
                    else:
                        yield "ok" if code == 0 else f"code {code}"
                        return
            finally:
                child.kill()
                child.wait()
        yield f"cut off after {limit:.0f} s"

    def _take_in(self, name: str, after: Found | None) -> None:
        if after:
            with contextlib.suppress(OSError, ValueError, KeyError, IndexError):  # there is nothing yet, or half of it
                self.found[name] = after()
        self.write()

    def write(self) -> None:
        pages = {"first_run.json": json.dumps(self.found, indent=1), "first_run.md": "\n".join(page(self.found))}
        for file, content in pages.items():
            with atomic_write(self.folder / file) as partial:
                partial.write_text(content + "\n")


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
    """Every mode, greedy and seeded."""
    data = run.folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": one, "answer": "#### 7"}) + "\n" for one in QUESTIONS))
    for kind, sampling in ((name, []), (f"{name}-seeded", ["--temperature", 1, "--seed", 1])):
        folder = run.folder / kind
        run.step(
            kind,
            pearl(
                *("eval", "gsm8k", "--data", data, *models, "--mode", *MODES, "--max-new-tokens", tokens),
                *("--output", folder, *sampling),
            ),
            90,
            lambda folder=folder: figures(folder),
        )


def default_texts(run: FirstRun, tokens: int, portable: Path | None) -> None:
    """With what `scripts/portable_pair.py` packed into `portable`; else with the default pair, where it is."""
    if portable:
        pair = run.folder / "pair"
        if run.step("pair", [sys.executable, "scripts/portable_pair.py", "make", str(portable), str(pair)], 60):
            same_texts(run, "default", tokens, "--target", pair / "target", "--draft", pair / "draft")
    elif embedded.at_hand():
        same_texts(run, "default", tokens)
    else:
        run.skip("default", "the default pair is not here, and --portable names none that was carried along")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--output", type=Path, default=Path("results/gpu_first_run"))
    parser.add_argument("--portable", type=Path, help="what portable_pair.py has packed, if there is no network")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a step ends with it
    run = FirstRun(options.output.absolute(), options.seconds)
    tiny = options.shapes == ["tiny"]

    log = run.folder / "machine.log"
    run.step("machine", [sys.executable, "-c", FACTS], 60, lambda: json.loads(log.read_text().splitlines()[-1]))
    gpus = run.found["machine"].get("gpus")
    if gpus:
        run.step("topology", ["nvidia-smi", "topo", "-m"], 20)
    run.step("doctor", pearl("doctor", "--no-models"), 60)
    toy = run.folder / "toy"
    if run.step("toy", [sys.executable, "scripts/toy_target.py", str(toy)], 60):
        models = ("--target", toy, "--draft", toy, "--max-length", 2048, *(ONE_GPU if gpus else ()))
        same_texts(run, "texts", 12 if tiny else 48, *models)
    if not os.environ.get("WITHOUT_DEFAULT"):
        default_texts(run, 8 if tiny else 64, options.portable)
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
    return 0 if all(one["result"].startswith(("ok", "skipped")) for one in run.found["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
