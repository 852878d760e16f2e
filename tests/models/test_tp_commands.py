"""What one rank says to the others is, word for word, the call that it makes itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pearl.models.tensor_parallel.commands import (
    BeginRound,
    Command,
    CopyFirst,
    Forget,
    Forward,
    KeepAlive,
    KeepPrefixes,
    ReadSequence,
    ReadTogether,
    ReadTrial,
    Restore,
    SetBuckets,
    Shutdown,
    SlotTokens,
    TokenDeltas,
    decode,
)
from pearl.models.verifier import SequenceQuery

numbers = st.integers(0, 2**31 - 1)
small = st.integers(0, 40)
tokens = st.lists(st.integers(0, 3), max_size=12).map(tuple)  # few, so that texts share beginnings
counts = st.lists(small, max_size=6).map(tuple)
wanted = st.builds(
    SequenceQuery,
    batch_slot=st.integers(0, 3),
    tokens=tokens,
    keep=small,
    side_rows=st.lists(st.tuples(small, numbers), max_size=3).map(tuple),
)
COMMANDS: st.SearchStrategy[Command] = st.one_of(
    st.builds(ReadSequence, wanted),
    st.builds(ReadTogether, st.lists(wanted, max_size=3).map(tuple)),
    st.builds(Forward, tokens, small, small),
    st.builds(ReadTrial, tokens, small, counts, small),
    st.builds(Forget, st.builds(SlotTokens, st.integers(0, 3), tokens)),
    st.builds(Restore, st.builds(SlotTokens, st.integers(0, 3), tokens)),
    st.builds(KeepPrefixes, small),
    st.builds(BeginRound, st.booleans()),
    st.builds(SetBuckets, counts, counts, st.booleans(), counts),
    st.builds(CopyFirst, small),
    st.builds(KeepAlive),
    st.builds(Shutdown),
)


@given(st.lists(COMMANDS, max_size=12))
def test_every_call_arrives_as_it_was_said_whatever_was_said_before(calls: list[Command]):
    here, there = TokenDeltas(), TokenDeltas()
    assert [decode(call.words(here), there) for call in calls] == calls


def test_a_pass_over_a_long_text_is_told_in_a_few_words():
    texts, text = TokenDeltas(), list(range(4000))
    ReadSequence(SequenceQuery(0, text, 1)).words(texts)
    later = ReadSequence(SequenceQuery(0, [*text[:3990], 7, 8, 9], 4, ((0, 5), (1, 6)))).words(texts)
    assert len(later) < 20 and max(later) < 4001


def test_words_that_are_more_than_a_call_are_refused():
    with pytest.raises(AssertionError, match="all of its words"):
        decode([*Shutdown().words(TokenDeltas()), 0], TokenDeltas())
