"""Texts to decode side by side: any number of places, any arrival. `check` makes the claim that all of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cases import Setting, all_params, prompts, settings_of
from hypothesis import strategies as st
from toys import ScriptedChannel, Text, WatchedTarget, alone, letters, ticks

from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import DraftSource
from pearl.roles.sequence import SequenceRequest, SequenceState


@dataclass(frozen=True)
class Asked:
    """A text to be written."""

    prompt: tuple[int, ...]
    params: SamplingParams
    late: int  # how often the queue says that there is nothing for now, before it gives this one


@dataclass(frozen=True, kw_only=True)
class Case(Setting):
    asked: tuple[Asked, ...]
    places: int

    @property
    def alone(self) -> list[Text]:
        return [alone(self.model, one.prompt, one.params, self.eos) for one in self.asked]

    def make_source(self) -> DraftSource:
        return self.drafter([self.endless(one.prompt, one.params) for one in self.asked])


SOURCES = ("right", "sometimes", "random", "another model", "a tree", "its own tree", "suffix", "moody", "crashing")


def small(schedule: Schedule) -> Schedule:
    """The drafter is infinitely fast here and fills the tree of every text."""
    tree = schedule.mode == "tree"
    return replace(schedule, max_draft_tokens=min(2, schedule.max_draft_tokens or 2)) if tree else schedule


@st.composite
def cases(draw: st.DrawFn, modes: Sequence[str] = MODES, sources: Sequence[str] = SOURCES) -> Case:
    values = draw(settings_of(modes, sources))
    vocabulary = values["vocabulary"]
    asked = st.builds(Asked, prompts(vocabulary), all_params(vocabulary), st.sampled_from([0, 0, 0, 1, 5]))
    return Case(
        **values | {"schedule": small(values["schedule"])},
        asked=tuple(draw(st.lists(asked, min_size=1, max_size=9))),
        places=draw(st.sampled_from([1, 2, 3, 8])),
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
    target.always_prepares = case.foresees
    said: dict[int, list[int]] = {}
    over: list[SequenceState] = []
    for text, committed in target.write(requests(case), case.schedule, case.places):
        assert text not in over, "nothing is said of a text after its end"
        if committed:
            said.setdefault(text.sequence_id, []).extend(committed)
        else:
            over.append(text)
    over.sort(key=lambda text: text.sequence_id)
    assert len(over) == len(case.asked), "every text comes to its end"
    for text, wanted in zip(over, case.alone, strict=True):
        stopper = text.stopper
        assert stopper.finish and said.get(text.sequence_id, []) == stopper.tokens
        assert Text(stopper.tokens, stopper.text, stopper.finish) == wanted, "the text is not the target's own"
        assert not any(one.offered for one in text.passes[:1]), "a prompt is read by the same rows in every mode"
    return target, over
