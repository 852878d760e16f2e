"""Texts to decode: any prompt, schedule, drafter, delay of messages. `check` makes the claim that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from liars import ShortOfAnswers, SureAndWrong, TooTalkative
from toys import (
    EAGER,
    Crashing,
    Moody,
    Move,
    Noise,
    Right,
    ScriptedChannel,
    Sometimes,
    TableModel,
    alone,
    letters,
    ticks,
    together,
)

from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.drafters.draft_source import Chain, DraftSource, Grown, TreeQuery
from pearl.drafters.model import ModelSource
from pearl.drafters.recycling import RecyclingSource
from pearl.drafters.suffix import SuffixSource
from pearl.drafters.tree import TreeSource
from pearl.drafters.united import UnitedSource
from pearl.roles.target import Target

DRAFTING = [mode for mode in MODES if Schedule.of(mode).drafts]


class AnyOf(DraftSource):
    """Several sources that know one text each: whichever knows this one."""

    def __init__(self, sources: Sequence[Right]):
        self.sources = list(sources)

    def propose(self, text: Sequence[int], room: int) -> Chain:
        return next((said for source in self.sources if (said := source.propose(text, room))), [])


class CrashingTree(TreeSource):
    """Raises after it has grown a tree so many times, also in the middle of its work."""

    def __init__(self, model: TableModel, calls: int):
        super().__init__(model)
        self.calls = calls

    def extend(self, queries: Sequence[TreeQuery]) -> list[Grown]:
        grown = super().extend(queries)
        self.calls -= 1
        if self.calls <= 0:
            raise RuntimeError("this source was made to crash")
        return grown


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A target, a schedule, a drafter of some quality, and a wire."""

    vocabulary: int
    order: int
    table: int
    scale: float = 1.5
    eos: frozenset[int]
    schedule: Schedule
    source: str
    chance: float  # that a guess of `sometimes` is right
    chunk: int  # guesses a turn
    script: tuple[Move, ...]
    beside: tuple[str, ...] = ()  # sources in the target's process
    foresees: bool = False  # passes are prepared while the one before is under way, as on a GPU

    @property
    def model(self) -> TableModel:
        return TableModel(self.vocabulary, self.order, self.table, self.scale)

    def endless(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt and what the target would say if nothing ended it: a drafter does not know where the text ends."""
        return [*prompt, *alone(self.model, prompt, endless(params), self.eos).tokens]

    def drafter(self, texts: Sequence[Sequence[int]]) -> DraftSource:
        """The source. `texts`: those that a good one knows."""
        return self._source(self.source, texts)

    def sources_beside(self, texts: Sequence[Sequence[int]]) -> list[DraftSource]:
        return [self._source(name, texts) for name in self.beside]

    def _source(self, name: str, texts: Sequence[Sequence[int]]) -> DraftSource:
        other = TableModel(self.vocabulary, self.order, self.table + 1, self.scale)

        def right(chance: float) -> DraftSource:
            known = [Sometimes(text, self.vocabulary, chance, self.chunk) for text in texts]
            return known[0] if len(known) == 1 else AnyOf(known)

        if "+" in name:
            return UnitedSource([self._source(part, texts) for part in name.split("+")])
        match name:
            case "sure and wrong":
                return SureAndWrong(self.vocabulary, self.table)
            case "too talkative":
                return TooTalkative(self.vocabulary, self.table)
            case "short of answers":
                return ShortOfAnswers()
            case "recycling":
                return RecyclingSource()
            case "crashing tree":
                return CrashingTree(other, self.chunk)
            case "right":
                return right(1.0)
            case "never right":
                return right(0.0)
            case "sometimes":
                return right(self.chance)
            case "random":
                return Noise(self.vocabulary, self.chunk, self.table)
            case "another model":
                return ModelSource(other)
            case "a tree":
                return TreeSource(other)
            case "its own tree":
                return TreeSource(self.model, costs=[1, 1.1, 1.2, 2.0])
            case "suffix":
                return SuffixSource()
            case "moody":
                return Moody(right(self.chance), 1 + self.chunk)
            case "at a loss":
                return Moody(right(self.chance), 1)
            case "crashing":
                return Crashing(right(self.chance), len(texts) * self.chunk - 1)
        raise AssertionError(name)


@dataclass(frozen=True, kw_only=True)
class Case(Setting):
    """One text."""

    prompt: tuple[int, ...]
    params: SamplingParams

    def make_source(self) -> DraftSource:
        return self.drafter([self.endless(self.prompt, self.params)])

    def make_sources_beside(self) -> list[DraftSource]:
        return self.sources_beside([self.endless(self.prompt, self.params)]) if self.beside else []


SOURCES = (
    "right",
    "never right",
    "sometimes",  # hits and misses of every length: three times as often as the others
    "sometimes",
    "sometimes",
    "random",
    "another model",
    "a tree",
    "a tree",
    "its own tree",
    "suffix",
    "moody",
    "at a loss",
    "crashing",
)


BESIDE = (
    "recycling",
    "recycling",
    "sometimes",
    "random",
    "a tree",
    "its own tree",
    "suffix",
    "crashing",
    "crashing tree",
)


def endless(params: SamplingParams) -> SamplingParams:
    """Without an end, a few tokens longer."""
    return replace(params, max_new_tokens=params.max_new_tokens + 8, stop=(), stop_token_ids=(), ignore_eos=True)


@st.composite
def all_processors(draw: st.DrawFn, vocabulary: int) -> dict[str, Any]:
    """Fields of `SamplingParams` that change logits: a few at a time, of many kinds."""
    token = st.integers(0, vocabulary - 1)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "repetition_penalty": st.sampled_from([1.1, 1.5, 0.7, 3.0]),
        "presence_penalty": st.sampled_from([0.3, 2.0, -1.0]),
        "frequency_penalty": st.sampled_from([0.1, 0.7, -0.3]),
        "no_repeat_ngram_size": st.integers(2, 4),
        "min_tokens": st.integers(1, 5),
        "logit_bias": st.dictionaries(token, st.sampled_from([0.1, -1.7, 5.0, -math.inf]), min_size=1, max_size=2),
        "bad_words_ids": st.lists(st.lists(token, min_size=1, max_size=3), min_size=1, max_size=4),
        "suppress_tokens": st.lists(token, min_size=1, max_size=1),
        "allowed_token_ids": st.lists(token, min_size=2, max_size=vocabulary),
        "stop_token_ids": st.lists(token, min_size=1, max_size=1),
    }
    names = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=3, unique=True))
    return {name: draw(kinds[name]) for name in names}


@st.composite
def all_params(draw: st.DrawFn, vocabulary: int = 4) -> SamplingParams:
    greedy = draw(st.booleans())
    most = draw(st.one_of(st.integers(1, 24), st.just(24)))
    processors = draw(all_processors(vocabulary)) if draw(st.booleans()) else {}
    if "min_tokens" in processors:
        processors["min_tokens"] = min(processors["min_tokens"], most)
    letter = st.sampled_from(letters(list(range(vocabulary))))
    return SamplingParams(
        max_new_tokens=most,
        temperature=0.0 if greedy else draw(st.sampled_from([1.0, 0.3, 1.7])),
        top_k=0 if greedy else draw(st.sampled_from([0, 0, 1, 2, vocabulary, vocabulary + 1])),
        top_p=1.0 if greedy else draw(st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.05])),
        min_p=0.0 if greedy else draw(st.sampled_from([0.0, 0.0, 0.1, 0.9])),
        seed=draw(st.integers(0, 1 << 40)),
        stop=tuple(draw(st.lists(st.text(letter, min_size=1, max_size=4), max_size=draw(st.sampled_from([0, 0, 2]))))),
        ignore_eos=draw(st.booleans()),
        **processors,
    )


@st.composite
def schedules(draw: st.DrawFn, modes: Sequence[str]) -> Schedule:
    """A tree is kept small, as its drafter here is infinitely fast and would fill it."""
    mode = draw(st.sampled_from(modes))
    if mode == "tree":
        branches, width = draw(st.sampled_from([None, 1, 2, 5])), draw(st.sampled_from([None, None, 3, 7]))
        return Schedule.of(mode, None, branches, width, draw(st.integers(1, 4)))
    return Schedule.of(mode, draw(st.sampled_from(["auto", "auto", 0, 1, 2, 3, 4, 5])))


@st.composite
def settings_of(draw: st.DrawFn, modes: Sequence[str], sources: Sequence[str], beside: bool = False) -> dict[str, Any]:
    """Values of a `Setting`. `beside`: with sources in the target's process, as often as not."""
    vocabulary = draw(st.integers(2, 6))
    return dict(
        vocabulary=vocabulary,
        order=draw(st.integers(1, 3)),
        table=draw(st.integers(0, 1000)),
        scale=draw(st.sampled_from([0.5, 1.5, 5.0])),
        eos=draw(st.frozensets(st.integers(0, vocabulary - 1), max_size=draw(st.sampled_from([0, 0, 1])))),
        schedule=draw(schedules(modes)),
        source=draw(st.sampled_from(sources)),
        chance=draw(st.sampled_from([0.3, 0.7, 0.9])),
        chunk=draw(st.integers(1, 4)),
        foresees=draw(st.booleans()),
        beside=tuple(draw(st.lists(st.sampled_from(BESIDE), max_size=draw(st.sampled_from([0, 3]))))) if beside else (),
        script=tuple(draw(st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 9])] * 3), max_size=12))),
    )


def prompts(vocabulary: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=5).map(tuple)


@st.composite
def cases(
    draw: st.DrawFn, modes: Sequence[str] = MODES, sources: Sequence[str] = SOURCES, beside: bool = False
) -> Case:
    values = draw(settings_of(modes, sources, beside))
    vocabulary = values["vocabulary"]
    return Case(**values, prompt=draw(prompts(vocabulary)), params=draw(all_params(vocabulary)))


def check(case: Case, lost_after: int | None = None) -> tuple[Target, ScriptedChannel]:
    """Decodes the case. The one claim of this file is made here."""
    model = case.model
    channel = ScriptedChannel(case.make_source(), case.script, lost_after)
    target = Target(model, channel, ticks(), sources=case.make_sources_beside())
    target.always_prepares = case.foresees
    written = together(target, case.prompt, case.schedule, case.params, case.eos)
    assert written == alone(model, case.prompt, case.params, case.eos), "the text is not the target's own"
    return target, channel


def plain_case(mode: str, gamma: int | str, source: str, script: Sequence[Move] = EAGER, tokens: int = 24) -> Case:
    """A case with nothing special about it: greedy, no end before the last token."""
    return Case(
        vocabulary=5,
        order=3,
        table=7,
        prompt=(1, 2, 3),
        params=SamplingParams(max_new_tokens=tokens),
        eos=frozenset(),
        schedule=Schedule.of(mode, gamma),
        source=source,
        chance=0.7,
        chunk=1,
        script=tuple(script),
    )
