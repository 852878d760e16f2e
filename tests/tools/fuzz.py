"""Input that nobody should write, drawn by a seeded generator, for everything that reads what people write.

python tests/tools/fuzz.py --count 100000        prints what raised anything but a UsageError; exit code 1 if
something did
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from pearl import __main__ as front
from pearl.config import cli
from pearl.config.commands import COMMANDS
from pearl.config.engine_config import EngineConfig
from pearl.config.pairs import load_pair
from pearl.core.messages import MalformedMessage
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.errors import LONGEST, UsageError
from pearl.evaluation import results, score
from pearl.evaluation.eval_config import parser as evaluation_parser
from pearl.evaluation.report import load as read_report
from pearl.machine import cores
from pearl.predict.replay import read_run
from pearl.tasks import gsm8k, humaneval, mgsm, mt_bench, spec_bench
from pearl.training import prompts
from pearl.training.recipes import Recipe, read_recipe
from pearl.wire.codec import unpack

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (gsm8k.BENCHMARK, humaneval.BENCHMARK, mgsm.BENCHMARK, mt_bench.BENCHMARK, spec_bench.BENCHMARK)
}
RECORDS: dict[str, dict[str, Any]] = {  # a line that each data set takes
    "humaneval": {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "", "canonical_solution": ""},
    "gsm8k": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
    "mgsm": {"question": "1 + 1?", "answer_number": 2, "language": "en"},
    "mt_bench": {"question_id": 1, "category": "math", "turns": ["1 + 1?", "and 2 + 2?"]},
    "spec_bench": {"question_id": 1, "category": "math", "turns": ["1 + 1?"]},
    "texts": {"prompt": "write", "text": [1, 2, 3]},
    "prompts": {"prompt": "write", "messages": [{"role": "user", "content": "hello"}]},
}
BEFORE = tuple(f"--{old.replace('_', '-')}" for one in cli.SHARED for old in one.was)
PAIR = dict(name="x", target="a", draft="b", dtype="bfloat16", prompt="chat", target_gb=1.0, draft_gb=0.1)
WORDS = ("", " ", "auto", "ar", "pearl", "tree", "sd:3", "sd:-1", "0", "-1", "1e400", "nan", "inf", "0-3", "3-0", "9-")
WORDS += (
    "smollm2-135m",
    "suffix",
    "feature:",
    "feature:x",
    "cuda:0",
    "cpu",
    "~",
    "~nobody/x",
    "/",
    ".",
    "a/b/c",
    "x.gguf",
)
WORDS += (
    "\x00",
    "a\x00b",
    "\ud800",
    "\u2028",
    "é" * 300,
    "x" * 5000,
    "9" * 5000,
    "*a",
    "&a [*a]",
    "!!python/object:os.system",
)
NUMBERS = (0, 1, -1, 2, 3, 64, 1 << 31, 1 << 63, 1 << 64, -(1 << 80), 10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308)
NUMBERS += (math.nan, math.inf, -math.inf, True, False)


def evil(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return None
    if kind in (1, 2):
        return rng.choice(WORDS)
    if kind in (3, 4):
        return rng.choice(NUMBERS)
    if kind == 5:
        return [evil(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(WORDS): evil(rng, depth + 1) for _ in range(rng.randrange(4))}
    return "".join(chr(rng.randrange(1, 0x2FF)) for _ in range(rng.randrange(40)))


def broken(rng: random.Random, values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping in which something is missing, wrong or too much."""
    made = dict(values)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*values, rng.choice(WORDS), *(key[:-1] for key in values)])
        if rng.random() < 0.2:
            made.pop(name, None)
        else:
            made[name] = evil(rng)
    return made


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A file after something has happened to its bytes."""
    for _ in range(rng.randint(0, 3)):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        junk = rng.choice(
            [b"", b"\xff\xfe", b"\x00", b"\n", b"{", b"[" * 20000, b"9" * 5000, rng.randbytes(8), b"\\ud800"]
        )
        data = rng.choice([data[:at], data[:at] + junk + data[at:], data[:at] + junk + data[end:], data + data[at:end]])
    return data


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_yaml(rng: random.Random, values: Mapping[str, Any]) -> bytes:
    try:
        text = yaml.safe_dump(dict(values), allow_unicode=rng.random() < 0.5)
    except (yaml.YAMLError, UnicodeError, ValueError):
        text = json.dumps(values)
    return text.encode("utf-8", "surrogatepass")


class Fuzz:
    """One input a call, into each reader in turn. `folder` is for files."""

    def __init__(self, seed: int, folder: Path):
        self.rng, self.file, self.folder = random.Random(seed), folder / "file", folder
        self.readers: dict[str, Callable[[], object]] = {
            "sampling": self.sampling,
            "schedule": self.schedule,
            "config": self.config,
            "cores": lambda: cores.parse(str(evil(self.rng))),
            "choose": lambda: cli.choose(self.rng.randrange(9), str(evil(self.rng))),
            "command line": self.command_line,
            "command": self.command,
            "config file": self.config_file,
            "pair": self.pair,
            "recipe": self.recipe,
            "prompts": self.prompts,
            "texts": self.texts,
            "wire": self.wire,
            "run folder": self.run_folder,
            **{name: lambda name=name: self.data(name) for name in BENCHMARKS},
        }

    def write(self, data: bytes) -> str:
        self.file.write_bytes(data)
        return str(self.file)

    def sampling(self) -> object:
        names = [field.name for field in fields(SamplingParams)]
        return SamplingParams(**{self.rng.choice(names): evil(self.rng) for _ in range(self.rng.randint(1, 3))})

    def schedule(self) -> object:
        mode = self.rng.choice(["ar", "sd", "pearl", "tree", "sd:3", evil(self.rng)])
        return Schedule.of(mode, *(self.rng.choice([None, "auto", 3, evil(self.rng)]) for _ in range(4)))

    def config(self) -> object:
        values = {field.name: field.default for field in fields(EngineConfig)}
        return EngineConfig(**broken(self.rng, values))

    def words(self, made: cli.Parser) -> list[str]:
        """A command line: options of the parser, options of before, and what is none, each with a value or two."""
        known = [name for action in made._actions for name in action.option_strings if name not in ("-h", "--help")]
        words = []
        for _ in range(self.rng.randint(1, 4)):
            words += [self.rng.choice([*known, *known, *BEFORE, str(evil(self.rng))])]
            words += [str(evil(self.rng)) for _ in range(self.rng.choice([0, 1, 1, 1, 2]))]
        return words

    def command_line(self) -> object:
        made = evaluation_parser(self.rng.choice(list(BENCHMARKS.values())))
        return _settings(made, self.words(made))

    def command(self) -> object:
        """Of any command, up to where it would begin to work; or of none."""
        name = self.rng.choice([*COMMANDS, str(evil(self.rng))])
        if name not in COMMANDS:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = front.main([word for word in (name, *map(str, [evil(self.rng)])) if word not in COMMANDS])
            assert code == 2 and said.getvalue(), "refused without a word"
            raise UsageError(said.getvalue()[-100:])
        made = importlib.import_module(COMMANDS[name][0]).parser()
        words = self.words(made)
        return cli.parse(made, words) if made.options else made.parse_args(words)

    def config_file(self) -> object:
        made = evaluation_parser(self.rng.choice(list(BENCHMARKS.values())))
        names = list(made.options)
        values = {self.rng.choice(names): evil(self.rng) for _ in range(self.rng.randint(1, 4))}
        return _settings(made, ["--config", self.write(damaged(self.rng, as_yaml(self.rng, values)))])

    def pair(self) -> object:
        self.write(damaged(self.rng, as_yaml(self.rng, broken(self.rng, PAIR))))
        path = self.folder / "pair.yaml"
        self.file.replace(path)
        return load_pair(self.rng.choice([str(path), str(path), str(evil(self.rng))]))

    def recipe(self) -> object:
        values = {field.name: getattr(field, "default", None) for field in fields(Recipe)}
        values = {name: v if isinstance(v, str | int | float) else "x" for name, v in values.items()}
        return read_recipe(Recipe, self.write(damaged(self.rng, as_yaml(self.rng, broken(self.rng, values)))), {})

    def lines(self, record: dict[str, Any]) -> bytes:
        some = [as_json(self.rng.choice([record, broken(self.rng, record), evil(self.rng)])) for _ in range(4)]
        return damaged(self.rng, b"\n".join(some))

    def prompts(self) -> object:
        return prompts.from_jsonl(self.write(self.lines(RECORDS["prompts"])))

    def texts(self) -> object:
        return score.load(self.write(self.lines(RECORDS["texts"])), lambda text, **_: [*text.encode()], 100, 256)

    def data(self, name: str) -> object:
        benchmark = BENCHMARKS[name]
        problems = benchmark.load(self.write(self.lines(RECORDS[name])))
        return [(benchmark.identify(one), benchmark.category(one), benchmark.turns(one)) for one in problems]

    def wire(self) -> object:
        words = [self.rng.choice([0, 1, 2, 3, 16, -1, self.rng.randrange(-(1 << 31), 1 << 31)]) for _ in range(32)]
        words[0], words[1] = self.rng.randrange(-1, 10), self.rng.choice([16, 32, words[1]])
        words[2], words[3] = self.rng.randrange(-1, 10), self.rng.choice([8, 14, 30, words[3]])
        try:
            return unpack(np.array(words, np.int32))
        except MalformedMessage:
            return None

    def run_folder(self) -> object:
        """What an interrupted or tampered run has left."""
        line = {"task_id": "T/0", "sample": 0, "repeat": 0, "turn": 0, "mode": "ar", "judged": []}
        for name in (results.SAMPLES, results.PASSES):
            some = [as_json(self.rng.choice([line, broken(self.rng, line), evil(self.rng)])) for _ in range(3)]
            (self.folder / name).write_bytes(damaged(self.rng, b"\n".join(some) + b"\n"))
        for name in (results.CONFIG, results.SUMMARY):
            summary = {"config": {}, "environment": {"rows": {}}, "modes": {"ar": {}}}
            (self.folder / name).write_bytes(damaged(self.rng, as_json(broken(self.rng, summary))))
        asked = {"resume": True, "limit": 3}
        readers: list[Callable[[], object]] = [
            lambda: results.begin(self.folder, asked),
            lambda: results.ended(self.folder, asked),
            lambda: results.repair(self.folder, {"T/0": 1}),
            lambda: results.read(self.folder),
            lambda: read_run(self.folder),
            lambda: read_report([self.folder]),
        ]
        return self.rng.choice(readers)()


def _settings(made: cli.Parser, argv: list[str]) -> object:
    found = cli.parse(made, argv)
    return cli.engine_config(found), cli.schedules(found, cli.BASELINES), cli.sampling(found)


def run(count: int, seed: int, folder: Path) -> tuple[Counter[str], dict[str, str]]:
    """How many inputs were taken and refused, and the traceback of each kind of anything else."""
    fuzz, counts, failures = Fuzz(seed, folder), Counter[str](), dict[str, str]()
    names = list(fuzz.readers)
    for number in range(count):
        name = names[number % len(names)]
        try:
            fuzz.readers[name]()
            counts["taken"] += 1
        except UsageError as error:
            counts["refused"] += 1
            sentence = str(error)
            if not sentence.strip() or len(sentence) > LONGEST:
                failures[f"{name}: sentence"] = sentence
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = next((frame for frame in reversed(where) if "/pearl/" in frame.filename), where[-1])
            failures.setdefault(f"{name}: {type(error).__name__} in {ours.name}", traceback.format_exc())
            counts["failed"] += 1
    return counts, failures


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=100_000)
    made.add_argument("--seed", type=int, default=0)
    found = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = run(found.count, found.seed, Path(folder))
    for name, trace in failures.items():
        print(f"== {name}\n{trace}")
    print(f"{found.count} inputs, seed {found.seed}: {dict(counts)}, {len(failures)} kinds of failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
