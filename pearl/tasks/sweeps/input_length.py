"""Prompts of real text by length: what a long prompt does to each mode.

A prompt asks what a text is about. The text is a part of a file (`--data`), or of the modules of Python's own library:
prose and code that people wrote, on every machine. Its length in tokens is the category, so that a run tells every
figure by length; `--skip-too-long` leaves out what a model does not read. A length that the text does not reach, or
that the chat template alone is above, is left out aloud: no prompt repeats its text.
"""

from __future__ import annotations

import logging
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pearl.config.inputs import read_text
from pearl.errors import UsageError
from pearl.tasks import prompts
from pearl.tasks.benchmark import Benchmark
from pearl.tasks.prompts import ChatTokenizer, Format

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8000)  # with an answer below 8,192, where many models end
EACH = 16  # prompts of a length
MODULES = (
    *("argparse", "ast", "dataclasses", "datetime", "difflib", "doctest", "inspect", "ipaddress", "logging/__init__"),
    *("mailbox", "optparse", "pickle", "statistics", "subprocess", "tarfile", "turtle", "typing", "zipfile/__init__"),
)
QUESTION = "Here is a part of a longer text.\n\n{text}\n\nWhat is it about? Answer in a few sentences."
_LETTERS = 8  # of a token, more than any text of these has
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    length: int  # of the prompt, in tokens
    number: int
    source: str  # from where the text is; no part of it comes twice

    @property
    def task_id(self) -> str:
        return f"{self.length}/{self.number}"


def load(path: str | None = None) -> list[Problem]:
    """Raises `UsageError` for a file without text."""
    if path:
        whole = read_text(path, "The text")
    else:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [library / f"{name}.py" for name in MODULES]
        whole = "\n\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())
    if not whole.strip():
        raise UsageError(f"{path or 'The standard library'} holds no text: name a file with some.")
    problems = []
    for length in LENGTHS:
        count = max(1, min(EACH, len(whole) // (_LETTERS * length)))  # no two share a part of the text
        if count < EACH:
            _log.warning("%s: %d of %d prompts of %d tokens, as the text is short", path, count, EACH, length)
        for number in range(count):
            begin = len(whole) * number // count
            problems.append(Problem(length, number, whole[begin : begin + _LETTERS * length]))
    return sorted(problems, key=lambda one: one.number)  # the first ones are of every length


def prompt(problem: Problem, _: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    """The longest beginning of the text with which the prompt has no more tokens than its length."""
    low, high = 0, len(problem.source)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _tokens(problem, middle, format, tokenizer) <= problem.length
        low, high = (middle, high) if fits else (low, middle - 1)
    return _asked(problem, low, format, tokenizer)


def why_not(problem: Problem, format: Format, tokenizer: ChatTokenizer) -> str | None:
    """Why the prompt would not have its length."""
    if _tokens(problem, 0, format, tokenizer) > problem.length:
        return f"what stands around the text is above {problem.length} tokens already"
    letters = len(problem.source)
    if _tokens(problem, letters, format, tokenizer) < problem.length:
        return f"{letters:,} letters of this text are below {problem.length} tokens: give more --data for that length"
    return None


def _asked(problem: Problem, letters: int, format: Format, tokenizer: ChatTokenizer) -> str:
    prompts.check(format)
    question = QUESTION.format(text=problem.source[:letters])
    return question if format == "completion" else prompts.chat([question], tokenizer)


def _tokens(problem: Problem, letters: int, format: Format, tokenizer: ChatTokenizer) -> int:
    """Of a prompt with so many letters of the text."""
    asked = _asked(problem, letters, format, tokenizer)
    return len(tokenizer(asked, add_special_tokens=format != "chat").input_ids)  # type: ignore[operator]


BENCHMARK = Benchmark(
    name="input_length",
    title="Prompts by length",
    description="Prompts of real text of 128 to 8,000 tokens: speed of every mode by length.",
    max_new_tokens=128,
    load=load,
    identify=lambda problem: problem.task_id,
    prompt=prompt,
    category=lambda problem: str(problem.length),
    why_not=why_not,
)
