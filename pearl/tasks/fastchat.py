"""Questions and answers as FastChat's llm_judge keeps them; Spec-Bench writes the same with four lists more.

A question may have several turns: the prompt of each continues the answers before it. Conversations are the `fschat`
package's; it comes with the extra `eval`, as it needs a web server's packages.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pearl.errors import UsageError
from pearl.tasks import prompts
from pearl.tasks.benchmark import Conversations
from pearl.tasks.data import DataSet, Record
from pearl.tasks.prompts import ChatTokenizer, Format

TEMPLATE = "vicuna_v1.1"  # FastChat's own model's, for models without a chat template
STOP = ("\nUSER:", "</s>")


def installed(module: str) -> Any:
    """A module of FastChat's. Raises UsageError where it, or what it needs, is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"MT-bench, Spec-Bench and their judge need FastChat ({error}): run pip install 'pearl[eval]', or in a "
            "clone bash install.sh."
        ) from error


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
    if not turns or isinstance(turns, str) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("no turns")
    told = record.get("reference") or ()
    reference = (told,) if isinstance(told, str) else tuple(told)
    return Question(int(record["question_id"]), str(record["category"]), tuple(turns), reference)


@dataclass(frozen=True)
class Questions(DataSet[Question]):
    """A data set that is asked in FastChat's conversations, which must be there before anything is read."""

    def load(self, path: str | None) -> list[Question]:
        installed("fastchat.conversation")
        return super().load(path)


def data(title: str, url: str) -> Questions:
    needs = "an object with question_id, category and turns, a list of texts"
    return Questions(title, needs, question, ("json",), {"data_files": url, "split": "train"}, url)


def prompt(asked: Question, answers: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    prompts.check(format)
    turns = asked.turns[: len(answers) + 1]
    if format == "chat":
        return prompts.chat([*itertools.chain(*zip(turns, answers, strict=False)), turns[-1]], tokenizer)
    conversation = installed("fastchat.conversation").get_conv_template(TEMPLATE)
    # Vicuna's own separators are special tokens of its tokenizer, and plain text to any other.
    style = installed("fastchat.conversation").SeparatorStyle.ADD_COLON_SINGLE
    conversation.sep_style, conversation.sep = style, "\n"
    for turn, answer in itertools.zip_longest(turns, answers):
        conversation.append_message(conversation.roles[0], turn.strip())
        said = None if answer is None else answer.strip() or " "  # nothing would be taken for an answer to come
        conversation.append_message(conversation.roles[1], said)
    return conversation.get_prompt()


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
