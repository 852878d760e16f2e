"""A forward of the drafter that the text has overtaken is given up, and what arrived meanwhile is heard after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from toys import TableModel

from pearl.core.messages import DraftPlan, End, Message, Nodes, Start, Verdict
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.drafters.model import ModelSource
from pearl.drafters.tree import TreeSource
from pearl.roles.drafter import Drafter
from pearl.wire.channel import LocalChannel

V, PROMPT, PLAN = 40, (0, 1, 2), DraftPlan(1, 4, 32)


class Interrupted(TableModel):
    """Something happens while its forward is under way."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def read(self, *arguments, **more):
        self.meanwhile()
        return super().read(*arguments, **more)

    def read_leaves_together(self, queries):
        self.meanwhile()
        return super().read_leaves_together(queries)


class Drafting:
    """A drafter whose first forward is over, and the other end of its wire."""

    def __init__(self, mode: str):
        self.model = Interrupted(vocabulary=V, seed=3)
        self.source = TreeSource(self.model) if mode == "tree" else ModelSource(self.model)
        self.wire, there = LocalChannel.pair()
        self.drafter = Drafter(self.source, there)
        self.wire.send(Start(0, Schedule.of(mode), SamplingParams(seed=0), PROMPT, PLAN, -1))
        assert self.drafter.step()
        self.first = next(one for one in self.heard() if isinstance(one, Nodes)).guesses[0].token

    def heard(self) -> list[Message]:
        found = []
        while (message := self.wire.receive()) is not None:
            found.append(message)
        return found

    def step(self, *arrives: Message) -> list[Message]:
        """These messages arrive in the middle of its next forward."""
        self.model.meanwhile = lambda: self.wire.send(*arrives) if arrives else None
        assert self.drafter.step()
        self.model.meanwhile = lambda: None
        return self.heard()


def verdict(*tokens: int) -> Verdict:
    return Verdict(0, len(PROMPT) - 1 + len(tokens), PLAN, tokens)


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_after_another_token_than_it_goes_on_from_a_forward_says_nothing(mode: str):
    """Neither guesses nor that there will be no more; and the next one is about the text as it is."""
    drafting = Drafting(mode)
    children = drafting.drafter._live[0].trie.root.children
    other = next(token for token in range(V) if token not in children)
    assert drafting.step(verdict(other)) == [] and drafting.source.overtaken == 1
    (said,) = drafting.step()
    assert said.position == len(PROMPT) and said.guesses and not said.exhausted
    assert drafting.source.overtaken == 1


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_forward_along_the_text_is_finished_and_of_use(mode: str):
    drafting = Drafting(mode)
    (said,) = drafting.step(verdict(drafting.first))
    assert said.guesses and drafting.source.overtaken == 0
    drafting.step()
    trie = drafting.drafter._live[0].trie
    assert trie.root.position == len(PROMPT) and trie.root.children, "what it had guessed is below the new root"


def test_what_is_known_by_several_verdicts_counts_together():
    drafting = Drafting("pearl")
    wrong = (drafting.model.after([*PROMPT, drafting.first]).argmax().item() + 1) % V
    later = Verdict(0, len(PROMPT) + 1, PLAN, (wrong,))
    assert drafting.step(verdict(drafting.first), later) == [] and drafting.source.overtaken == 1


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_the_end_of_a_text_ends_its_forward(mode: str):
    drafting = Drafting(mode)
    assert drafting.step(End(0)) == [] and drafting.source.overtaken == 1
    (stats,) = drafting.step()
    assert stats.overtaken == stats.forwards == 1 and stats.busy_s > stats.overtaken_s > 0.0


def test_what_arrived_in_a_forward_is_heard_although_the_wire_is_lost_by_then(monkeypatch):
    drafting = Drafting("pearl")
    assert drafting.step(End(0)) == [] and drafting.drafter._live
    monkeypatch.setattr(LocalChannel, "lost", True)
    drafting.drafter.run()
    assert not drafting.drafter._live


def test_what_is_said_of_other_texts_gives_up_nothing():
    drafting = Drafting("pearl")
    (said,) = drafting.step(Verdict(7, 9, PLAN, (0,)), End(8))
    assert said.guesses and drafting.source.overtaken == 0
