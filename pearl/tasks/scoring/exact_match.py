"""Exact match on the final number: which answers are right, in all and by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, Protocol

from pearl.tasks.benchmark import Answer
from pearl.tasks.numbers import Style, final_number


class Problem(Protocol):
    @property
    def task_id(self) -> str: ...
    @property
    def category(self) -> str | None: ...
    @property
    def answer(self) -> Decimal: ...
    @property
    def style(self) -> Style: ...


def score(problems: Sequence[Problem], answers: Sequence[Answer]) -> dict[str, Any]:
    """`score`: the share of answers whose final number is the problem's, and `score_by_category` if there are any."""
    by_id = {problem.task_id: problem for problem in problems}
    by_category: dict[str | None, list[bool]] = {}
    for task_id, text in answers:
        problem = by_id[task_id]
        by_category.setdefault(problem.category, []).append(right(problem, text))
    shares = {category: sum(some) / len(some) for category, some in by_category.items()}
    every = [one for some in by_category.values() for one in some]
    return {
        "score": sum(every) / len(every) if every else None,
        "score_by_category": {name: share for name, share in shares.items() if name} or None,
    }


def right(problem: Problem, text: str) -> bool:
    """Whether the final number is the problem's. 5 million are right where 5,000,000 are, and where so many millions
    were asked for."""
    return problem.answer in (
        final_number(text, style) for style in (problem.style, replace(problem.style, scales=False))
    )
