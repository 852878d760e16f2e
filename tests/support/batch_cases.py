"""Texts to decode side by side: any number of places, any arrival. `check` makes the claim that all of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cases import all_params, endless, schedules
from hypothesis import strategies as st
from toys import (
    Crashing,
    Moody,
    Move,
    Noise,
    Right,
    ScriptedChannel,
    Sometimes,
    TableModel,
    Text,
    WatchedTarget,
    alone,
    letters,
    ticks,
)

from pearl.core.sampling import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import Chain, DraftSource
from pearl.drafters.model import ModelSource
from pearl.drafters.ngram import NgramSource
from pearl.drafters.tree import TreeSource
from pearl.roles.sequence import SequenceRequest, SequenceState


@dataclass(frozen=True)
class Asked:
    """A text to be written."""

    prompt: tuple[int, ...]
    params: SamplingParams
    late: int  # how often the queue says that there is nothing for now, before it gives this one


@dataclass(frozen=True)
class Case:
    vocabulary: int
    order: int
    table: int
    eos: frozenset[int]
    asked: tuple[Asked, ...]
    places: int
    schedule: Schedule
    source: str
    chance: float
    chunk: int
    script: tuple[Move, ...]

    @property
    def model(self) -> TableModel:
        return TableModel(self.vocabulary, self.order, self.table)

    @property
    def alone(self) -> list[Text]:
        return [alone(self.model, one.prompt, one.params, self.eos) for one in self.asked]

    def make_source(self):
        other = TableModel(self.vocabulary, self.order, self.table + 1)
        match self.source:
            case "right":
                return AnyOf([Right(text, self.chunk) for text in self._endless()])
            case "sometimes":
                return AnyOf([Sometimes(t, self.vocabulary, self.chance, self.chunk) for t in self._endless()])
            case "random":
                return Noise(self.vocabulary, self.chunk, self.table)
            case "another model":
                return ModelSource(other)
            case "a tree":
                return TreeSource(other)
            case "its own tree":
                return TreeSource(self.model, costs=[1, 1.1, 1.2, 2.0])
            case "ngram":
                return NgramSource(shortest=1)
            case "moody":
                return Moody(AnyOf([Right(text, self.chunk) for text in self._endless()]), 1 + self.chunk)
            case "crashing":
                return Crashing(Noise(self.vocabulary, self.chunk, self.table), 2 * self.chunk)
        raise AssertionError(self.source)

    def _endless(self) -> Iterator[list[int]]:
        for one in self.asked:
            yield [*one.prompt, *alone(self.model, one.prompt, endless(one.params), self.eos).tokens]


class AnyOf(DraftSource):
    """Several sources that know one text each: whichever knows this one."""

    def __init__(self, sources: Sequence[Right]):
        self.sources = list(sources)

    def propose(self, text: Sequence[int], room: int) -> Chain:
        return next((said for source in self.sources if (said := source.propose(text, room))), [])


SOURCES = ("right", "sometimes", "random", "another model", "a tree", "its own tree", "ngram", "moody", "crashing")


def small(schedule: Schedule) -> Schedule:
    """The drafter is infinitely fast here and fills the tree of every text."""
    tree = schedule.mode == "tree"
    return replace(schedule, max_draft_tokens=min(2, schedule.max_draft_tokens or 2)) if tree else schedule


@st.composite
def cases(draw: st.DrawFn, modes: Sequence[str] = MODES, sources: Sequence[str] = SOURCES) -> Case:
    vocabulary = draw(st.integers(2, 6))
    token = st.integers(0, vocabulary - 1)
    prompts = st.lists(token, min_size=1, max_size=5).map(tuple)
    asked = st.builds(Asked, prompts, all_params(vocabulary), st.sampled_from([0, 0, 0, 1, 5]))
    return Case(
        vocabulary=vocabulary,
        order=draw(st.integers(1, 3)),
        table=draw(st.integers(0, 1000)),
        eos=draw(st.frozensets(token, max_size=draw(st.sampled_from([0, 0, 1])))),
        asked=tuple(draw(st.lists(asked, min_size=1, max_size=9))),
        places=draw(st.sampled_from([1, 2, 3, 8])),
        schedule=small(draw(schedules(modes))),
        source=draw(st.sampled_from(sources)),
        chance=draw(st.sampled_from([0.3, 0.7, 0.9])),
        chunk=draw(st.integers(1, 4)),
        script=tuple(draw(st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 9])] * 3), max_size=12))),
    )


def requests(case: Case) -> Iterator[SequenceRequest | None]:
    for one in case.asked:
        yield from [None] * one.late
        yield SequenceRequest(one.prompt, one.params, Stopper(one.params, case.eos, letters))


def check(
    case: Case, lost_after: int | None = None, target: WatchedTarget | None = None
) -> tuple[WatchedTarget, list[SequenceState]]:
    """Writes the texts of the case. The one claim of this file is made here."""
    channel = ScriptedChannel(case.make_source(), case.script, lost_after)
    target = target or WatchedTarget(case.model, channel, ticks())
    said: dict[int, list[int]] = {}
    over: list[SequenceState] = []
    for text, committed in target.write(requests(case), case.schedule, case.places):
        assert text not in over, "nothing is said of a text after its end"
        if committed:
            said.setdefault(text.sequence, []).extend(committed)
        else:
            over.append(text)
    over.sort(key=lambda text: text.sequence)
    assert len(over) == len(case.asked), "every text comes to its end"
    for text, wanted in zip(over, case.alone, strict=True):
        stopper = text.stopper
        assert stopper.finish and said[text.sequence] == stopper.tokens
        assert Text(stopper.tokens, stopper.text, stopper.finish) == wanted, "the text is not the target's own"
        assert not text.passes[0].offered, "a prompt is read by the same rows in every mode"
    return target, over
