"""What a target is asked for its own training data: questions from files or the hub, or ones that it writes itself.

A question is the text of a user's turn; the target's chat template makes the prompt of it, as at inference. A model
without a template reads the question as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pearl.config.inputs import brief, json_lines, read_text
from pearl.errors import UsageError

COLUMNS = ("prompt", "question", "instruction")  # where a record may keep its question; or "messages", or "turns"
_MARK = "\u241e"  # stands where a user's words stand in a chat template


def from_jsonl(path: str) -> list[str]:
    """The questions in a file of JSON lines. Raises `UsageError` with the line that has none."""
    lines = json_lines(read_text(path, "The prompts"), path)
    found = [_question(record, f"{path}, line {number}") for number, record in lines]
    if not found:
        raise UsageError(f"{path} holds no prompt; it must have one JSON object a line.")
    return found


def from_hub(name: str) -> list[str]:
    """The questions of a data set of the hub, written NAME or NAME:SPLIT or NAME:CONFIG:SPLIT."""
    from datasets import load_dataset

    name, *rest = name.split(":")
    split = rest.pop() if rest else "train"
    try:
        rows = load_dataset(name, *rest, split=split)
    except Exception as error:  # datasets raises many kinds for one thing
        raise UsageError(
            f"The data set {name} can't be loaded: give --prompts a file instead ({brief(error, 300)})."
        ) from error
    return [_question(row, f"{name}, row {number}") for number, row in enumerate(rows)]


def _question(record: Any, where: str) -> str:
    if isinstance(record, dict):
        turns = record.get("messages") or record.get("turns") or ()
        first = turns[0] if isinstance(turns, list) and turns else None
        found = [first.get("content") if isinstance(first, dict) else first, *map(record.get, COLUMNS)]
        for text in found:
            if isinstance(text, str) and text.strip():
                return text
    raise UsageError(f"{where} holds no question: give it a text under {', '.join(COLUMNS)}, or messages.")


@dataclass(frozen=True)
class Chat:
    """How questions become prompts, in tokens."""

    tokenizer: PreTrainedTokenizerBase

    def prompt(self, question: str) -> tuple[int, ...]:
        if not self.tokenizer.chat_template:
            return tuple(self.tokenizer(question).input_ids)
        return self._ids(self._turn(question, add_generation_prompt=True))

    def opening(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens up to where a user's words begin, and those of which one ends them.

        A model given the opening alone goes on with an instruction such as it was trained on (Magpie, Xu et al. 2024).
        """
        if not self.tokenizer.chat_template:
            raise UsageError("This tokenizer has no chat template, so the target can't write its own instructions.")
        before, _, after = self._turn(_MARK).partition(_MARK)
        return self._ids(before), self._ids(after)[:1]

    def _turn(self, words: str, **options: bool) -> str:
        turn = [{"role": "user", "content": words}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, **options))  # type: ignore[arg-type]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def read(files: Sequence[str], hub: Iterable[str]) -> list[str]:
    """All questions of all sources, each once."""
    questions = [question for path in files for question in from_jsonl(path)]
    questions += [question for name in hub for question in from_hub(name)]
    return list(dict.fromkeys(questions))
