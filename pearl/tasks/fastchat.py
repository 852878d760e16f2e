"""Questions and answers as FastChat's llm_judge keeps them; Spec-Bench writes the same with four lists more.

A question may have several turns: the prompt of each continues the answers before it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pearl.tasks import prompts
from pearl.tasks.data import DataSet, Record
from pearl.tasks.prompts import ChatTokenizer, Format
from pearl.tasks.suite import Conversations

# Vicuna's conversation, which FastChat takes for models that have none of their own
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
STOP = ("\nUSER:", "</s>")


@dataclass(frozen=True)
class Question:
    question_id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[Any, ...] = ()

    @property
    def task_id(self) -> str:
        return str(self.question_id)


def question(record: Record, _: int) -> Question:
    turns = record["turns"]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("no turns")
    reference = tuple(record.get("reference") or ())
    return Question(int(record["question_id"]), str(record["category"]), tuple(turns), reference)


def data(title: str, url: str) -> DataSet[Question]:
    needs = "an object with question_id, category and turns, a list of texts"
    return DataSet(title, needs, question, ("json",), {"data_files": url, "split": "train"}, url)


def prompt(asked: Question, answers: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    prompts.check(format)
    turns = [turn for pair in zip(asked.turns, answers, strict=False) for turn in pair] + [asked.turns[len(answers)]]
    if format == "chat":
        return prompts.chat(turns, tokenizer)
    roles = ("USER", "ASSISTANT")
    said = [f"{roles[i % 2]}: {turn.strip()}" for i, turn in enumerate(turns)]
    return "\n".join([SYSTEM, *said, "ASSISTANT:"])


def answers(questions: Sequence[Question], talks: Conversations, model_id: str) -> list[dict[str, Any]]:
    """The lines of model_answer/`model_id`.jsonl: what FastChat's judge reads, and with it what Spec-Bench's speed.py
    does. A step is a target pass, and its accept length the tokens that it committed."""
    lines = []
    for one in questions:
        if one.task_id not in talks:
            continue
        choices = [
            {
                "index": index,
                "turns": [turn.text.strip() for turn in turns],
                "decoding_steps": [len(turn.committed) for turn in turns],
                "new_tokens": [len(turn.tokens) for turn in turns],
                "wall_time": [turn.seconds for turn in turns],
                "accept_lengths": [count for turn in turns for count in turn.committed],
            }
            for index, turns in enumerate(talks[one.task_id])
        ]
        lines.append(
            {
                "question_id": one.question_id,
                "category": one.category,
                "answer_id": hashlib.sha256(f"{model_id} {one.question_id}".encode()).hexdigest()[:22],
                "model_id": model_id,
                "choices": choices,
                "tstamp": time.time(),
            }
        )
    return lines
