"""What the harness asks of a benchmark: plain functions, no model and no tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pearl.errors import UsageError
from pearl.tasks.prompts import ChatTokenizer, Format

Problem = TypeVar("Problem")
Answer = tuple[str, str]  # id of a problem, completion


class Turn(Protocol):
    """What of a text's record its export may tell (`records.GenerationStats` has it)."""

    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def finish(self) -> str: ...  # "eos", "stop" or "length"
    @property
    def seconds(self) -> float: ...  # its share of the target's time
    @property
    def latency_s(self) -> float: ...  # of its own, with other texts beside it
    @property
    def committed(self) -> Sequence[int]: ...


Conversations = Mapping[str, Sequence[Sequence[Turn]]]  # by problem: its samples, each with its turns


@dataclass(frozen=True)
class Benchmark(Generic[Problem]):
    """Problems, how they are asked, and how they are judged."""

    name: str  # of files and folders
    title: str
    description: str
    max_new_tokens: int
    load: Callable[[str | None], list[Problem]]
    identify: Callable[[Problem], str]
    prompt: Callable[[Problem, Sequence[str], Format, ChatTokenizer], str]  # after these answers, one a turn
    category: Callable[[Problem], str | None] = lambda _: None
    kind: Callable[[Problem], str | None] | None = None  # finer than its category: what a share is taken of
    turns: Callable[[Problem], int] = lambda _: 1
    stop: tuple[str, ...] = ()  # what ends a text in the format `completion`
    completion: Callable[[Problem, str, Format], str] = lambda problem, text, format: text
    # where a chat answer repeats its prompt, in characters: (begin, end)
    repeats: Callable[[Problem, str], tuple[int, int]] | None = None
    # the figures of a mode's answers; its headline is "score", from 0 to 1
    score: Callable[[Sequence[Problem], Sequence[Answer]], dict[str, Any]] | None = None
    # a mode's conversations as other tools read them: lines of model_answer/MODEL.jsonl
    export: Callable[[Sequence[Problem], Conversations, str], list[dict[str, Any]]] | None = None
    # files of a mode in the form of another tool: by name, what they hold as JSON
    files: Callable[[Sequence[Problem], Conversations, str], dict[str, Any]] | None = None
    # the problems as another scorer reads them, which must have those of this run only
    problem_lines: Callable[[Sequence[Problem]], list[dict[str, Any]]] | None = None
    # why a problem would not be what it says of itself if this model were asked, as a sentence goes on; None: it is
    why_not: Callable[[Problem, Format, ChatTokenizer], str | None] = lambda *_: None

    def problems(self, path: str | None) -> list[Problem]:
        """What `load` finds. Raises `UsageError` where two have one name: texts of both would count as one's."""
        found = self.load(path)
        twice = [name for name, count in Counter(map(self.identify, found)).items() if count > 1]
        if twice:
            raise UsageError(
                f"{path or f'The data of {self.title}'} has the problem {twice[0]} more than once"
                f"{f', and {len(twice) - 1} others too' * (len(twice) > 1)}: give one data set at a time."
            )
        return found
