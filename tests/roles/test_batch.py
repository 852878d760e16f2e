"""Texts side by side: each is what the target writes of it alone, whatever the others do.

Any number of places, any arrival of requests, any drafter, any schedule, any delay of messages. The last part breaks
the code on purpose, and the same property has to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_cases import Asked, Case, cases, check, requests, small
from cases import DRAFTING
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    ScriptedChannel,
    TableModel,
    Text,
    WireEnd,
    examples,
    falsified,
    letters,
    ticks,
)

import pearl.roles.drafter
import pearl.roles.target
from pearl.core.messages import DraftPlan, DraftStats, End, Nodes, Start, Verdict
from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import DraftSource
from pearl.drafters.model import ModelSource
from pearl.drafters.tree import TreeSource
from pearl.models.verifier import SequenceQuery
from pearl.roles.drafter_inbox import DrafterInbox
from pearl.roles.sequence import SequenceRequest
from pearl.roles.target import Target


@examples(150)
@given(cases())
def test_each_text_is_what_it_is_alone(case: Case):
    check(case)


@examples(50)
@given(cases(modes=DRAFTING), st.integers(0, 60))
def test_a_lost_drafter_ends_no_text(case: Case, moves: int):
    check(case, lost_after=moves)


@examples(50)
@given(cases())
def test_a_place_is_taken_again_at_once(case: Case):
    case = replace(case, asked=tuple(replace(one, late=0) for one in case.asked))
    target, _ = check(case)
    for turn in target.turns:
        assert turn.texts <= turn.places
        assert not turn.queue or turn.texts == turn.places, "somebody waits, and a place is free"


@examples(50)
@given(cases(modes=DRAFTING))
def test_the_drafters_facts_are_those_of_each_text(case: Case):
    target, texts = check(case)
    channel = target.channel
    if not case.schedule.drafts:  # a block of no guesses
        assert not channel.sent and not channel.peer.sent
        return
    for text in texts:
        verdicts = [m for m in channel.sent if isinstance(m, Verdict) and m.sequence_id == text.sequence_id]
        guesses = [m for m in channel.peer.sent if isinstance(m, Nodes) and m.sequence_id == text.sequence_id]
        assert text.draft_stats.verdicts == len(verdicts) == len(text.passes) - 1
        assert text.draft_stats.drafted == sum(len(m.guesses) for m in guesses)
        position = len(text.request.prompt) - 1
        for p in text.passes:
            assert p.position == position and 1 <= p.texts <= case.places
            position += p.committed


@examples(40)
@given(cases(modes=DRAFTING), st.integers(1, 6))
def test_a_run_that_its_reader_leaves_does_not_reach_the_next(case: Case, passes: int):
    model, channel = case.model, ScriptedChannel(case.make_source(), case.script)
    target = Target(model, channel, ticks())
    run = target.write(requests(case), case.schedule, case.places)
    for _ in zip(range(passes), run, strict=False):
        pass
    run.close()
    assert not channel.drafter._live or channel.coming or channel.peer.coming or channel.peer.inbox
    for _ in range(2):
        over = []
        for text, committed in target.write(requests(case), case.schedule, case.places):
            over += [] if committed else [text]
        over.sort(key=lambda text: text.sequence_id)
        written = [Text(text.stopper.tokens, text.stopper.text, text.stopper.finish) for text in over]
        assert written == case.alone


def plain(mode: str, source: str = "sometimes", texts: int = 6, places: int = 3, tokens: int = 20) -> Case:
    """Nothing special about it: greedy, no end before the last token, an eager drafter."""
    asked = tuple(
        Asked((1 + i % 4, 2, i % 3), SamplingParams(max_new_tokens=tokens + 7 * (i % 3)), 0) for i in range(texts)
    )
    values = dict(vocabulary=5, order=3, table=7, eos=frozenset(), chance=0.7, chunk=1, script=((9, 9, 9),))
    return Case(**values, asked=asked, places=places, schedule=Schedule.of(mode, "auto"), source=source)


@pytest.mark.parametrize("mode", MODES)
def test_texts_share_their_passes(mode: str):
    _, texts = check(plain(mode))
    shared = [p.texts for text in texts for p in text.passes[1:]]
    assert max(shared) == 3 and sum(shared) / len(shared) > 2


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_no_text_waits_for_anothers_miss(mode: str):
    """Every text that has read its prompt is in every pass."""
    target, texts = check(plain(mode, places=6))
    longest = max(len(text.passes) for text in texts)
    assert len(target.turns) <= longest + len(texts)


def test_a_drafter_guesses_for_all_texts_in_one_forward():
    case = plain("pearl", "another model", texts=4, places=4)
    together: list[int] = []

    class Counting(TableModel):
        def read_leaves_together(self, wanted):
            together.append(len(wanted))
            return super().read_leaves_together(wanted)

    channel = ScriptedChannel(ModelSource(Counting(5, 3, 8)), case.script)
    target = Target(case.model, channel, ticks())
    for _ in target.write(requests(case), case.schedule, 4):
        pass
    assert max(together) == 4


def test_a_prompt_is_read_in_pieces_between_the_passes_of_others(monkeypatch):
    """A long prompt comes while another text is written: no pass of that one waits for more than a piece."""
    long = Asked(tuple([1, 2, 3, 0] * 200), SamplingParams(max_new_tokens=4), 0)
    case = replace(plain("ar", texts=1, places=2, tokens=60), schedule=Schedule.of("ar"))
    case = replace(case, asked=(*case.asked, long))
    read: list[tuple[int, int]] = []
    right = TableModel.read

    def noting(self, tokens, keep, side_rows=(), batch_slot=0):
        read.append((batch_slot, len(tokens)))
        return right(self, tokens, keep, side_rows, batch_slot)

    monkeypatch.setattr(TableModel, "read", noting)
    _, texts = check(case)
    pieces = [length for text, length in read if text == 1][:7]
    assert pieces == [128, 256, 384, 512, 640, 768, 800]
    between = [text for text, _ in read]
    first, last = between.index(1) + 1, len(between) - 1 - between[::-1].index(1)
    assert all(
        a == 0 or b == 0 for a, b in zip(between[first : first + 12], between[first + 1 : first + 13], strict=True)
    )
    assert last > first
    assert texts[1].passes[0].rows == 800


class Tight(TableModel):
    """Has memory for so many texts in a forward."""

    suffices_for = 2

    def read_together(self, wanted: Sequence[SequenceQuery]) -> list[torch.Tensor]:
        if len(wanted) > self.suffices_for:
            raise torch.OutOfMemoryError("this model was made small")
        return super().read_together(wanted)


def test_where_memory_runs_out_passes_hold_fewer_texts_and_nothing_is_lost(monkeypatch, caplog):
    monkeypatch.setattr(Case, "model", property(lambda self: Tight(self.vocabulary, self.order, self.table)))
    for mode in ("ar", "pearl", "tree"):
        _, texts = check(plain(mode, places=6))
        assert max(p.texts for text in texts for p in text.passes) > 2
    assert "out of memory; a pass is for at most 2 texts from now on" in caplog.text


def test_where_a_drafters_memory_runs_out_it_reads_fewer_texts_at_once(caplog):
    class TightDraft(TableModel):
        def read_leaves_together(self, wanted):
            if len(wanted) > 2:
                raise torch.OutOfMemoryError("this model was made small")
            return super().read_leaves_together(wanted)

    for mode, source in (("pearl", ModelSource), ("tree", TreeSource)):
        case = plain(mode, texts=4, places=4)
        channel = ScriptedChannel(source(TightDraft(5, 3, 8)), case.script)
        target = Target(case.model, channel, ticks())
        texts = [text for text, committed in target.write(requests(case), small(case.schedule), 4) if not committed]
        assert all(text.draft_stats.drafted > 8 and not text.draft_stats.failed for text in texts)
        assert [sorted(text.stopper.tokens for text in texts)] == [sorted(one.tokens for one in case.alone)]
        assert "a draft is for at most 2 texts from now on" in caplog.text


# Break the code on purpose: the property has to fail.


def give_a_verdict_to_the_wrong_text(patch: pytest.MonkeyPatch) -> None:
    verify = pearl.roles.target.verify

    def wrong(text, nodes, picks, controller, logits, read_root, seen=[]):  # noqa: B006
        seen.append((len(nodes), picks))
        previous = seen[-2][1] if len(seen) > 1 and seen[-2][0] == len(nodes) else picks
        return verify(text, nodes, previous, controller, logits, read_root)

    patch.setattr(pearl.roles.target, "verify", wrong)


def hang_guesses_into_the_first_text(patch: pytest.MonkeyPatch) -> None:
    """What the drafter says of a text is taken for another's: its roots are not theirs."""
    right = DrafterInbox.take

    def take(self):
        live = dict(self._batch.live)
        if live:
            first = next(iter(live.values()))
            self._batch.live = dict.fromkeys(live, first)
        right(self)
        self._batch.live = live

    patch.setattr(DrafterInbox, "take", take)


def share_one_end(patch: pytest.MonkeyPatch) -> None:
    """All texts are sampled by the params of the last one begun."""
    begin = Target._begin

    def wrong(self, request):
        begin(self, request)
        for text in self._batch.live.values():
            text.params = request.params

    patch.setattr(Target, "_begin", wrong)


MUTANTS = [give_a_verdict_to_the_wrong_text, hang_guesses_into_the_first_text, share_one_end]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_the_property_notices(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch):
    mutate(monkeypatch)
    assert falsified(check, cases(modes=DRAFTING), most=2000)


def test_a_finished_text_does_not_wait_for_a_drafter_that_is_busy():
    """As with another text's long prompt: its statistics would come after that."""
    channel = ScriptedChannel(ModelSource(TableModel(seed=1)), [(9, 9, 9)] * 4 + [(0, 0, 0)] * 5000)
    target = Target(TableModel(), channel, ticks(1e-2))
    params = [SamplingParams(max_new_tokens=count) for count in (8, 200)]
    asked = [SequenceRequest((0, 1), one, Stopper(one, (), letters)) for one in params]
    written = {1: 0, 2: 0}
    for sequence, tokens in target.write(asked, Schedule.of("pearl"), 2):
        written[sequence.sequence_id] += len(tokens)
        if not tokens:
            break
    assert sequence.sequence_id == 1 and written[1] == 8 and written[2] < 150


def test_it_may_be_ended_while_a_prompt_is_read_and_nothing_is_written(monkeypatch):
    monkeypatch.setattr("pearl.roles.prompt_reader.PREFILL_CHUNK", 2)
    target, params, turns = Target(TableModel(), None, ticks()), SamplingParams(max_new_tokens=4), iter(range(100))
    request = SequenceRequest((0, 1) * 20, params, Stopper(params, (), letters))
    written = list(target.write([request], Schedule.of("ar"), 1, lambda: next(turns) < 3))
    assert written == [] and next(turns) == 4 and target.idle


def test_a_source_that_can_not_read_what_the_target_saw_costs_its_drafting_alone():
    class Full(DraftSource):
        layers = (1,)

        def observe(self, features, batch_slot) -> None:
            raise RuntimeError("no room")

    end = WireEnd()
    drafter = pearl.roles.drafter.Drafter(Full(), end)
    seeded, features = SamplingParams(seed=0).with_defaults(), np.zeros((2, 4), np.int16)
    end.inbox += [
        Start(1, Schedule.of("pearl"), seeded, (1, 2), DraftPlan()),
        Verdict(1, 2, DraftPlan(), (3,), features),
    ]
    drafter.step()
    end.inbox.append(End(1))
    drafter.step()
    (stats,) = [message for message in end.sent if isinstance(message, DraftStats)]
    assert stats.failed
