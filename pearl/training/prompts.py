"""What a target is asked for its own training data: questions from files or the hub, or ones that it writes itself.

A conversation is what a user says, one turn or several; the target's chat template makes prompts of it, as at
inference, with the target's own answers in between. A model without a template reads one turn as it is. A dialogue has
its answers already: those of a data set, or of an earlier recording.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from pearl.config.inputs import brief, json_lines, read_text
from pearl.errors import UsageError

COLUMNS = ("prompt", "question", "instruction")  # where a record may keep its question; or "messages", or "turns"
Conversation = tuple[str, ...]  # the user's turns
BETWEEN = "\n\n"  # what is said by turns, for a model without a chat template
_MARK = "\u241e"  # stands where somebody's words stand in a chat template


class Dialogue(NamedTuple):
    """What was said by turns, the user first, the assistant last."""

    said: tuple[str, ...]


def from_jsonl(path: str) -> list[Conversation]:
    """The conversations in a file of JSON lines. Raises `UsageError` with the line that has none."""
    lines = json_lines(read_text(path, "The prompts"), path)
    found = [_conversation(record, f"{path}, line {number}") for number, record in lines]
    if not found:
        raise UsageError(f"{path} holds no prompt; it must have one JSON object a line.")
    return found


def dialogues(path: str) -> list[Dialogue]:
    """Those of a file of JSON lines, `{"messages": [...]}`, as chat data sets have them; what comes before a user's
    first words, or after the last answer, is left out. Raises `UsageError` with the line that is no dialogue."""
    found = []
    for number, record in json_lines(read_text(path, "The texts"), path):
        turns = record.get("messages") if isinstance(record, dict) else None
        turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        turns = list(itertools.dropwhile(lambda turn: turn.get("role") != "user", turns))
        turns = turns[: len(turns) - len(turns) % 2]
        roles = [turn.get("role") for turn in turns]
        said = tuple(turn.get("content") for turn in turns)
        if not said or roles != ["user", "assistant"] * (len(roles) // 2) or not all(map(_says, said)):
            raise UsageError(
                f"{path}, line {number} is no dialogue: give it messages, of a user and an assistant by turns."
            )
        found.append(Dialogue(said))
    if not found:
        raise UsageError(f"{path} holds no dialogue; it must have one JSON object a line.")
    return found


def _says(words: Any) -> bool:
    return isinstance(words, str) and bool(words.strip())


def from_hub(name: str) -> list[Conversation]:
    """The conversations of a data set of the hub, written NAME or NAME:SPLIT or NAME:CONFIG:SPLIT."""
    from datasets import load_dataset

    name, *rest = name.split(":")
    split = rest.pop() if rest else "train"
    try:
        rows = load_dataset(name, *rest, split=split)
    except Exception as error:  # datasets raises many kinds for one thing
        raise UsageError(
            f"The data set {name} can't be loaded: give --prompts a file instead ({brief(error, 300)})."
        ) from error
    return [_conversation(row, f"{name}, row {number}") for number, row in enumerate(rows)]


def _conversation(record: Any, where: str) -> Conversation:
    if isinstance(record, dict):
        turns = record.get("messages") or record.get("turns") or ()
        said = [_words(turn) for turn in turns] if isinstance(turns, list) else []
        for texts in [[one for one in said if one is not None], *([record.get(column)] for column in COLUMNS)]:
            if texts and all(map(_says, texts)):
                return tuple(texts)
    raise UsageError(f"{where} holds no question: give it a text under {', '.join(COLUMNS)}, or messages.")


def _words(turn: Any) -> Any:
    """Of a user's turn; None for a turn of somebody else."""
    if not isinstance(turn, dict):
        return turn
    return turn.get("content") if turn.get("role", "user") == "user" else None


@dataclass(frozen=True)
class Chat:
    """How questions become prompts, in tokens."""

    tokenizer: PreTrainedTokenizerBase

    def prompt(self, said: Sequence[str]) -> tuple[int, ...]:
        """Of what the user and the target have said by turns, the user first and last."""
        if not self.tokenizer.chat_template:
            return tuple(self.tokenizer(BETWEEN.join(said)).input_ids)
        return self._ids(self._turns(said, add_generation_prompt=True))

    def answer(self, words: str, ends: Collection[int]) -> tuple[int, ...]:
        """What an assistant writes, with the token that ends it: the first one of `ends` that the template has there,
        as some templates put a space before it."""
        if not self.tokenizer.chat_template:
            end = self.tokenizer.eos_token_id
            return (*self._ids(BETWEEN + words), *([] if end is None else [end]))
        after = self._turns(["", _MARK]).partition(_MARK)[2]
        return (*self._ids(words), *[token for token in self._ids(after) if token in ends][:1])

    def opening(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens up to where a user's words begin, and those of which one ends them.

        A model given the opening alone goes on with an instruction such as it was trained on (Magpie, Xu et al. 2024).
        """
        if not self.tokenizer.chat_template:
            raise UsageError("This tokenizer has no chat template, so the target can't write its own instructions.")
        before, _, after = self._turns([_MARK]).partition(_MARK)
        return self._ids(before), self._ids(after)[:1]

    def _turns(self, said: Sequence[str], **options: bool) -> str:
        roles = itertools.cycle(("user", "assistant"))
        turns = [{"role": role, "content": words} for role, words in zip(roles, said, strict=False)]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))  # type: ignore[arg-type]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def read(files: Sequence[str], hub: Iterable[str]) -> list[Conversation]:
    """All conversations of all sources, each once."""
    found = [conversation for path in files for conversation in from_jsonl(path)]
    found += [conversation for name in hub for conversation in from_hub(name)]
    return list(dict.fromkeys(found))
