"""SPEED-Bench: prompts that are made to measure speculative decoding (nvidia/SPEED-Bench, arXiv 2604.09557).

`qualitative` has 880 prompts of 11 categories, many in several turns. `throughput_1k` to `throughput_32k` have 1,536
prompts of so many tokens each, whose category is an entropy tier: low, mixed, high. The data set has a licence of its
own and names part of its prompts only: its framework's prepare_data.py fetches those from where they come from.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pearl.errors import UsageError
from pearl.tasks import fastchat
from pearl.tasks.benchmark import Benchmark
from pearl.tasks.data import DataSet, Record
from pearl.tasks.prompts import ChatTokenizer, Format
from pearl.tasks.speed_bench import framework

HUB = "nvidia/SPEED-Bench"
CONFIGS = ("qualitative", *(f"throughput_{size}k" for size in (1, 2, 8, 16, 32)))
TIERS = ("low_entropy", "mixed", "high_entropy")
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"  # how a turn begins that is only named
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    question_id: str
    category: str
    sub_category: str
    turns: tuple[str, ...]
    difficulty: str = ""
    source: str = ""

    @property
    def task_id(self) -> str:
        return self.question_id

    @property
    def only_named(self) -> bool:
        return any(turn.startswith(PLACEHOLDER) for turn in self.turns)

    @property
    def tier(self) -> str | None:
        """Of entropy, where the data set says one."""
        return next((tier for tier in TIERS if tier in (self.category, self.difficulty)), None)


def _problem(record: Record, _: int) -> Problem:
    """`messages`, as prepared files of other tools have them, are turns with a role: the user's, whom the model
    answers."""
    turns = record.get("turns")
    if turns is None:
        if any(message["role"] != "user" for message in record["messages"]):
            raise ValueError("words of somebody else, which would not be asked")
        turns = [message["content"] for message in record["messages"]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("no turns")
    if record["question_id"] in (None, "") or not record["category"]:
        raise ValueError("no name or no category")
    said = (record.get(name) or "" for name in ("sub_category", "difficulty", "source"))
    sub_category, difficulty, source = map(str, said)
    return Problem(str(record["question_id"]), str(record["category"]), sub_category, tuple(turns), difficulty, source)


class SpeedBench(DataSet[Problem]):
    """A config's name in place of a file is that config, from the hub."""

    def load(self, path: str | None) -> list[Problem]:
        config = path if path in CONFIGS and not Path(path).exists() else None if path else CONFIGS[0]
        if path and re.fullmatch("throughput_[0-9]+k", path) and not config and not Path(path).exists():
            raise UsageError(
                f"SPEED-Bench has no config {path}, and there is no such file: choose {', '.join(CONFIGS)}."
            )
        problems = self._of_hub(config) if config else self.read(Path(str(path)))
        known = [one for one in problems if not one.only_named]
        if len(known) < len(problems):
            where = f"{len(problems) - len(known)} of {len(problems)} prompts of {path or HUB} are only named there"
            advice = (
                "its framework fetches them (github.com/NVIDIA/Model-Optimizer, examples/specdec_bench: "
                "prepare_data.py --dataset speed); give what it writes with --data"
            )
            if not known:
                raise UsageError(f"{where}: {advice}.")
            _log.warning("%s, and left out, so that figures are of a part of it: %s", where, advice)
        return known

    def _of_hub(self, config: str) -> list[Problem]:
        return DataSet(
            self.title, self.needs, self.parse, (HUB, config), {"split": "test"}, f"huggingface.co/datasets/{HUB}"
        ).load(None)

    def read(self, file: Path) -> list[Problem]:
        """JSON lines, a parquet file, or a folder of either as prepare_data.py writes one for each config."""
        files = sorted(file.rglob("*.parquet")) or sorted(file.rglob("*.jsonl*")) if file.is_dir() else [file]
        if not files:
            raise UsageError(
                f"{file} holds no parquet file and no JSON lines: name a folder that prepare_data.py wrote, or a file."
            )
        below = {part for one in files if one != file for part in one.relative_to(file).with_suffix("").parts}
        if len(configs := [name for name in CONFIGS if name in below]) > 1:
            raise UsageError(
                f"{file} holds several configs, whose figures would be mixed: name one of them, {', '.join(configs)}."
            )
        if files[0].suffix != ".parquet" or not files[0].exists():
            return [problem for one in files for problem in super(SpeedBench, self).read(one)]
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table

        try:
            records = [record for one in files for record in read_table(one).to_pylist()]
        except (ArrowException, ArithmeticError, OSError, ValueError) as error:  # also of a date out of Python's range
            raise UsageError(
                f"{file} cannot be read as parquet: {' '.join(str(error).split())[:160].rstrip('.')}."
            ) from None
        if not records:
            raise UsageError(f"{file} holds no problem: a row is one.")
        return [self._problem(record, i, f"{file}, row {i + 1}") for i, record in enumerate(records)]


DATA = SpeedBench(
    title="SPEED-Bench",
    needs="an object with question_id, category and turns, a list of texts that are not empty (or messages, all of the "
    "user)",
    parse=_problem,
)


def prompt(problem: Problem, answers: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    """As a conversation; in the format `completion` in Vicuna's words."""
    asked = fastchat.Question(0, problem.category, problem.turns)
    return fastchat.prompt(asked, answers, format, tokenizer)


BENCHMARK = Benchmark(
    name="speed_bench",
    title="SPEED-Bench",
    description="SPEED-Bench (NVIDIA 2026): acceptance length and speed of every mode, by category and entropy tier.",
    max_new_tokens=1024,
    load=DATA.load,
    identify=lambda problem: problem.task_id,
    prompt=prompt,
    category=lambda problem: problem.category,
    turns=lambda problem: len(problem.turns),
    stop=fastchat.STOP,
    files=framework.files,
)
