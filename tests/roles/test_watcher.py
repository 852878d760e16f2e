"""Who watches a target sees what it does, and changes nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from toys import TableModel, alone, letters

from pearl.core.messages import Nodes
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import DraftSource
from pearl.roles.drafter import Drafter
from pearl.roles.pass_recorder import PassTimes
from pearl.roles.sequence import SequenceState
from pearl.roles.target import Target
from pearl.roles.verification import PassRows, PassWalk
from pearl.wire.channel import LocalChannel

PARAMS = SamplingParams(max_new_tokens=30)


class Again(DraftSource):
    """The last token comes again."""

    def propose(self, tokens, room):
        return [(tokens[-1], ())] * min(room, 2)


class Notes:
    """A watcher that copies what it is told."""

    def __init__(self):
        self.started: list[int] = []
        self.tokens: list[int] = []
        self.drafts: list[Nodes] = []
        self.times: list[PassTimes] = []

    def began(self, sequence: SequenceState) -> None:
        self.started.append(sequence.sequence_id)

    def passed(self, sequence: SequenceState, rows: PassRows, walked: PassWalk, times: PassTimes) -> None:
        self.tokens += walked.committed
        self.times.append(times)
        assert set(walked.nodes) <= set(rows.nodes)

    def drafted(self, nodes: Nodes, at: float) -> None:
        self.drafts.append(nodes)


def written(watcher: Notes | None) -> tuple[list[int], list[Nodes]]:
    """The text, and what the drafter has said for it."""
    here, there = LocalChannel.pair()
    said: list[Nodes] = []
    send = there.send
    there.send = lambda *messages: (said.extend(one for one in messages if isinstance(one, Nodes)), send(*messages))
    here.peer_step = Drafter(Again(), there).step
    target = Target(TableModel(), here)
    target.watch(watcher)
    passes = target.decode([0, 1], Schedule.of("sd"), PARAMS, Stopper(PARAMS, (), letters))
    return [token for committed in passes for token in committed], said


def test_a_watcher_is_told_every_token_and_when_both_were_at_work():
    notes = Notes()
    text, _ = written(notes)
    assert text == notes.tokens == alone(TableModel(), [0, 1], PARAMS, ()).tokens
    assert len(notes.started) == 1
    spans = [span for nodes in notes.drafts for span in zip(nodes.spans[::2], nodes.spans[1::2], strict=True)]
    assert len(spans) >= len([nodes for nodes in notes.drafts if nodes.guesses]) > 0
    assert all(before <= after for before, after in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans)), "a drafter does one thing at a time"
    assert all(one.ended <= other.began for one, other in pairwise(notes.times))


def test_where_nobody_watches_the_drafter_says_nothing_more():
    (watched, timed), (unwatched, untimed) = written(Notes()), written(None)
    assert watched == unwatched
    assert any(nodes.spans for nodes in timed) and not any(nodes.spans for nodes in untimed)


@pytest.mark.parametrize("leaves_after", [1, 4])
def test_a_watcher_may_leave_in_the_middle(leaves_after: int):
    here, there = LocalChannel.pair()
    here.peer_step = Drafter(Again(), there).step
    target, notes = Target(TableModel(), here), Notes()
    target.watch(notes)
    text: list[int] = []
    for number, tokens in enumerate(target.decode([0, 1], Schedule.of("sd"), PARAMS, Stopper(PARAMS, (), letters)), 1):
        text += tokens
        if number == leaves_after:
            target.watch(None)
    assert text == alone(TableModel(), [0, 1], PARAMS, ()).tokens
    assert notes.tokens == text[: len(notes.tokens)] and len(notes.tokens) < len(text)
