"""Questions about everything but code for the drafters' training data, half of them with a second turn.

    python scripts/prose_prompts.py 4000 > prose.jsonl

Eight kinds, in equal parts: writing, explanations, roleplay, extraction, reasoning and mathematics, summaries,
translations, and questions of fact with and without a passage to answer from. All of them are put together from the
lists of prose_prompts.yaml, which were written for this purpose: none comes from a benchmark (`scripts/overlap.py`).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli

WORDS = ["thing", "subject", "person", "name", "place", "item", "trade", "month", "what", "country"]
KINDS = {  # the list of its first turns: that of its second ones
    "writing": "rewriting",
    "explaining": "deeper",
    "playing": "asking_on",
    "extracting": "after_extracting",
    "problem": "after_problem",
    "summary": "after_summary",
    "translation": "after_translation",
    "answer": "after_answer",
}


class Questions:
    """Draws questions from the lists; the same seed draws the same ones."""

    def __init__(self, lists: dict[str, Any], seed: int = 0):
        words = {name: [one.strip() for one in lists[name].split(";")] for name in WORDS}
        self._lists, self._random = {**lists, **words}, random.Random(seed)

    def conversations(self) -> Iterator[list[str]]:
        """The user's turns, one or two; endless, kinds in turn, no first turn twice."""
        seen = set[str]()
        while True:
            for kind, follow in KINDS.items():
                turns = [self._first(kind)]
                if turns[0] in seen:
                    continue
                seen.add(turns[0])
                if self._random.random() < 0.5:
                    turns.append(self._filled(self._one(follow)))
                yield turns

    def _first(self, kind: str) -> str:
        if kind == "answer" and self._random.random() < 0.5:
            return self._filled(self._one("facts"))
        question = self._one(kind)
        if kind == "extracting":
            question += "\n\n{passage}"
        return self._filled(question)

    def _filled(self, template: str) -> str:
        """With a word in the place of every name in braces."""
        draw = self._random
        a, b, c = draw.randint(13, 60), draw.randint(2, 12), draw.randint(2, 9)
        words = {name: self._one(name) for name in WORDS}
        words["other"] = draw.choice([name for name in self._lists["name"] if name != words["name"]])
        words["second"] = draw.choice([one for one in self._lists["subject"] if one != words["subject"]])
        english, german = self._one("english_german").split("|")
        return template.format(
            **words,
            english=english.format(**words),
            german=german.format(**words),
            passage=self._passage(draw.randint(3, 14)) if "{passage}" in template else "",
            **{"a": a, "b": b, "c": c, "ac": a * c, "goal": a + b * c},
        )

    def _passage(self, sentences: int) -> str:
        """A small report about people, dates and sums, none of which is true."""
        draw = self._random
        people, town = draw.sample(self._lists["name"], 4), self._one("place")
        found = []
        for _ in range(sentences):
            name, other = draw.sample(people, 2)
            words = {one: self._one(one) for one in WORDS} | {"name": name, "other": other, "town": town}
            numbers = {"a": 60, "c": 28, "cost": 900, "age": 80}
            drawn = {one: draw.randint(2, most) for one, most in numbers.items()}
            found.append(self._one("fact").format(**words, **drawn, year=draw.randint(1952, 2024)))
        return " ".join(found)

    def _one(self, name: str) -> str:
        return str(self._random.choice(self._lists[name]))


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("scripts/prose_prompts.py", about=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=cli.at_least_one, default=2000, help="how many (default: 2000)")
    count = parser.parse_args(argv).count
    lists = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    for _, turns in zip(range(count), Questions(lists).conversations(), strict=False):
        print(json.dumps({"turns": turns}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
