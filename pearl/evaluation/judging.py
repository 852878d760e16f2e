"""Answers to MT-bench judged by a model, with FastChat's prompts and formats.

Knows: what there is to ask, whom to ask (any OpenAI-compatible endpoint), and how judgments add up. Judgments are kept
line by line, so a second run asks only for those that are missing.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pearl.errors import UsageError
from pearl.evaluation import lines, tables
from pearl.tasks import judge_prompts
from pearl.tasks.fastchat import Question
from pearl.tasks.judge_prompts import Answer, Prompt

TRIES, PAUSE_S, TIMEOUT_S = 5, 4.0, 300.0
_OUTCOMES = {"model_2": "wins", "tie": "ties", "model_1": "losses", "error": "errors"}
MAX_TOKENS = 2048  # of a judgment, as FastChat has it


@dataclass(frozen=True)
class Judge:
    """A chat model behind an OpenAI-compatible endpoint."""

    model: str
    endpoint: str
    prompts: dict[str, Prompt]

    def ask(self, name: str, text: str) -> str:
        """Its judgment. Raises `UsageError` if the endpoint keeps failing."""
        messages = [{"role": "system", "content": self.prompts[name].system_prompt}, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        key = os.environ.get("OPENAI_API_KEY", "")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{self.endpoint}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.load(response)["choices"][0]["message"]["content"]
            except (OSError, ValueError, LookupError) as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404)
                if refused or attempt == TRIES:
                    raise UsageError(
                        f"The judge at {self.endpoint} does not answer ({error}): check --endpoint, --model and "
                        "OPENAI_API_KEY, and run again; what is judged is kept."
                    ) from error
                time.sleep(PAUSE_S * attempt)
        raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class Game:
    """One thing to ask about: a turn (1 or 2) of a question, and the one or two answers to it."""

    question: Question
    turn: int
    answers: tuple[Answer, ...]
    reference: tuple[str, ...]

    @property
    def models(self) -> dict[str, str]:
        names = ("model",) if len(self.answers) == 1 else ("model_1", "model_2")
        return {name: answer.model_id for name, answer in zip(names, self.answers, strict=True)}

    @property
    def key(self) -> tuple[Any, ...]:
        return self.question.question_id, self.turn, *self.models.values()

    def play(self, by: Judge) -> dict[str, Any]:
        """A line of FastChat's model_judgment files."""
        kind: judge_prompts.Kind = "single" if len(self.answers) == 1 else "pair"
        name = judge_prompts.prompt_name(kind, self.question.category, self.turn)

        def asked(answers: Sequence[Answer]) -> tuple[str, str]:
            text = judge_prompts.user_prompt(by.prompts[name], self.question, answers, self.reference, self.turn)
            return text, by.ask(name, text)

        line = {"question_id": self.question.question_id, **self.models, "judge": [by.model, name], "turn": self.turn}
        text, said = asked(self.answers)
        if kind == "single":
            score = judge_prompts.rating(said)
            line |= {"user_prompt": text, "judgment": said, "score": -1 if score is None else score}
            return {**line, "tstamp": time.time()}
        other_text, other_said = asked(self.answers[::-1])
        places = {"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"}
        for game, (prompt, judgment) in enumerate(((text, said), (other_text, other_said))):
            won = judge_prompts.winner(judgment)
            line |= {
                f"g{game + 1}_winner": places[game].get(won, won),
                f"g{game + 1}_user_prompt": prompt,
                f"g{game + 1}_judgment": judgment,
            }
        return {**line, "tstamp": time.time()}


def games(
    kind: str, questions: Sequence[Question], models: Sequence[Sequence[Answer]], reference_file: str | None
) -> Iterator[Game]:
    """All there is to ask about: of `pair`, the first model's answers against each other's."""
    kept = judge_prompts.ANSWERS.load(reference_file) if reference_file else []
    references = {one.question_id: one.turns for one in kept}
    by_model = [{answer.question_id: answer for answer in answers} for answers in models]
    sides = [(one,) for one in by_model] if kind == "single" else [(by_model[0], other) for other in by_model[1:]]
    for question in questions:
        reference = references.get(question.question_id, tuple(map(str, question.reference)))
        for side in sides:
            answers = tuple(answered[question.question_id] for answered in side if question.question_id in answered)
            if len(answers) < len(side):
                continue
            needed = question.category in judge_prompts.NEEDS_REFERENCE
            if needed and len(reference) < len(question.turns):
                raise UsageError(
                    f"Question {question.question_id} is judged with a reference answer: name --reference."
                )
            for turn in range(1, len(question.turns) + 1):
                yield Game(question, turn, answers, reference if needed else ())


def judged(file: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The judgments that are there, by what they are about."""

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        models = (line[name] for name in ("model", "model_1", "model_2") if name in line)
        return line["question_id"], line["turn"], *models

    return {key(line): line for line in lines.mend(file)}


def ratings(played: Sequence[Game], judgments: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """Mean ratings of each model: both turns, all, and by category."""
    given: dict[str, dict[str, list[float]]] = {}
    for game in played:
        line = judgments[game.key]
        columns = given.setdefault(line["model"], {})
        for column in (f"turn {game.turn}", "all", game.question.category):
            columns.setdefault(column, [])
            if line["score"] >= 0:
                columns[column].append(line["score"])
        columns.setdefault("errors", []).extend([1.0] * (line["score"] < 0))
    return _table(
        {
            model: {
                name: str(len(some)) if name == "errors" else f"{sum(some) / len(some):.2f}" if some else "-"
                for name, some in columns.items()
            }
            for model, columns in given.items()
        }
    )


def wins(played: Sequence[Game], judgments: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """How often each model wins against the first, and loses; two games that disagree are a tie."""
    counts: dict[str, dict[str, int]] = {}
    for game in played:
        line = judgments[game.key]
        games = line["g1_winner"], line["g2_winner"]
        won = "error" if "error" in games else games[0] if games[0] == games[1] else "tie"
        name = f"{line['model_2']} against {line['model_1']}"
        row = counts.setdefault(name, dict.fromkeys(_OUTCOMES.values(), 0))
        row[_OUTCOMES[won]] += 1
    return _table({name: {key: str(count) for key, count in row.items()} for name, row in counts.items()})


def agreement(models: Sequence[Sequence[Answer]]) -> str:
    rows = {}
    for answers in models[1:]:
        agreed = judge_prompts.agreement(answers, models[0])
        if agreed is None:
            raise UsageError("The answers have no question in common.")
        rows[f"{answers[0].model_id} and {models[0][0].model_id}"] = {
            "turns": str(agreed.turns),
            "identical": f"{agreed.identical:.1%}",
            "common start": f"{agreed.common_start:.1%}",
            "similarity": f"{agreed.similarity:.3f}",
        }
    return _table(rows)


def _table(rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return tables.markdown(
        ["model", *columns], [[name, *(row.get(one, "-") for one in columns)] for name, row in rows.items()]
    )
