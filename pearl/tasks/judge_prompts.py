"""What a judge is asked about answers, and what its words come to, as in FastChat's llm_judge (Zheng et al. 2023).

Pure: prompts and verdicts are texts. Beside it, and without a judge: how far two sets of answers agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from pearl.tasks.data import DataSet, Record, texts
from pearl.tasks.fastchat import Question

Kind = Literal["single", "pair"]
NEEDS_REFERENCE = ("math", "reasoning", "coding")
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # the second where the first is not
_WINNERS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}


@dataclass(frozen=True)
class Prompt:
    name: str
    system_prompt: str
    prompt_template: str


@dataclass(frozen=True)
class Answer:
    """The turns that a model said to a question; of several choices the first, as FastChat's judge reads them."""

    question_id: int
    model_id: str
    turns: tuple[str, ...]


def _prompt(record: Record, _: int) -> Prompt:
    return Prompt(*texts(record, "name", "system_prompt", "prompt_template"))


def _answer(record: Record, _: int) -> Answer:
    return Answer(int(record["question_id"]), str(record["model_id"]), tuple(record["choices"][0]["turns"]))


_URL = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/judge_prompts.jsonl"
PROMPTS = DataSet(
    title="FastChat judge",
    unit="prompt",
    needs="an object with the texts name, system_prompt and prompt_template",
    parse=_prompt,
    hub=("json",),
    options={"data_files": _URL, "split": "train"},
    url=_URL,
    option="--prompts",
)
ANSWERS = DataSet(
    title="FastChat", unit="answer", needs="an object with question_id, model_id and choices", parse=_answer
)


def prompt_name(kind: Kind, category: str, turn: int) -> str:
    """Which prompt judges that turn (1 or 2) of a question of that category."""
    math = "-math" if category in NEEDS_REFERENCE else ""
    version = {"single": "v1", "pair": "v1" if math else "v2"}[kind]
    return f"{kind}{math}-{version}{'-multi-turn' if turn == 2 else ''}"


def user_prompt(
    prompt: Prompt, question: Question, answers: Sequence[Answer], reference: Sequence[str], turn: int
) -> str:
    """One answer to rate, or two to choose from."""
    values = {f"ref_answer_{i}": text for i, text in enumerate(reference, start=1)}
    names = ("answer",) if len(answers) == 1 else ("answer_a", "answer_b")
    if turn == 1:
        values["question"] = question.turns[0]
        values |= {name: answer.turns[0] for name, answer in zip(names, answers, strict=True)}
    else:
        for i in range(2):
            values[f"question_{i + 1}"] = question.turns[i]
            values |= {f"{name}_{i + 1}": answer.turns[i] for name, answer in zip(names, answers, strict=True)}
    return prompt.prompt_template.format(**values)


def rating(judgment: str) -> float | None:
    """The rating that a judge gave, from 1 to 10; None if it gave none."""
    found = next((match for pattern in _RATINGS if (match := pattern.search(judgment))), None)
    return float(found[1]) if found else None


def winner(judgment: str) -> str:
    """A, B, tie, or error if the judge named none."""
    return next((name for mark, name in _WINNERS.items() if mark in judgment), "error")


@dataclass(frozen=True)
class Agreement:
    """Of the turns that two models have answered, all figures from 0 to 1."""

    turns: int
    identical: float
    common_start: float  # share of an answer's words before the first difference
    similarity: float  # difflib's ratio of words


def agreement(mine: Sequence[Answer], theirs: Sequence[Answer]) -> Agreement | None:
    """How far answers are the same without asking anybody; None if no question is in both."""
    by_id = {answer.question_id: answer for answer in theirs}
    pairs = [
        (a.split(), b.split())
        for answer in mine
        if answer.question_id in by_id
        for a, b in zip(answer.turns, by_id[answer.question_id].turns, strict=False)
    ]
    if not pairs:
        return None
    return Agreement(
        turns=len(pairs),
        identical=_mean(float(a == b) for a, b in pairs),
        common_start=_mean(_common_start(a, b) for a, b in pairs),
        similarity=_mean(SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs),
    )


def _common_start(a: Sequence[str], b: Sequence[str]) -> float:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return 1.0 if a == b else same / max(len(a), len(b))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
