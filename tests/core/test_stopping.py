"""A text ends where it would end if it were written one token at a time, whatever the passes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from toys import examples, letters

from pearl.core.params import SamplingParams
from pearl.core.stopping import StopAutomaton, Stopper, TextStream

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def in_bytes(tokens: list[int]) -> str:
    """A byte-level tokenizer: a letter beyond ASCII takes several tokens, and half of one shows as a mark."""
    return bytes(tokens).decode(errors="replace")


def without_specials(tokens: list[int]) -> str:
    """A tokenizer that shows nothing for token 2."""
    return letters([token for token in tokens if token != 2])


def feed(stopper: Stopper, tokens: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The tokens in passes of these sizes, over and over, until the text ends. Returns what was kept."""
    kept: list[int] = []
    at = turn = 0
    while at < len(tokens) and stopper.finish is None:
        size = sizes[turn % len(sizes)]
        kept += stopper.take(tokens[at : at + size])
        at, turn = at + size, turn + 1
    return kept


def naive(
    tokens: Sequence[int], params: SamplingParams, eos: set[int], decode=letters
) -> tuple[list[int], str, str | None]:
    """(tokens, text, finish), by looking at the whole text after every token."""
    for count in range(1, len(tokens) + 1):
        said = list(tokens[:count])
        text = decode(said)
        if said[-1] in eos and not params.ignore_eos:
            return said, text, "eos"
        if found := [text.find(stop) for stop in params.stop if stop in text]:
            return said, text[: min(found)], "stop"
        if count == params.max_new_tokens:
            return said, text, "length"
    return list(tokens), decode(list(tokens)), None


@examples(300)
@given(
    TOKENS,
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 50),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    st.sets(st.integers(0, 2), max_size=1),
    st.booleans(),
    st.sampled_from([letters, without_specials]),
)
def test_a_text_ends_where_it_would_one_token_at_a_time(
    tokens: list[int], sizes: list[int], most: int, stop: list[str], eos: set[int], ignore: bool, decode
):
    if decode is without_specials:
        tokens = tokens[:20]  # a stop string torn apart by more tokens without letters is not looked for
    params = SamplingParams(max_new_tokens=most, stop=tuple(stop), ignore_eos=ignore)
    stopper = Stopper(params, eos, decode)
    kept = feed(stopper, tokens, sizes)
    assert kept == stopper.tokens
    assert (stopper.tokens, stopper.text, stopper.finish) == naive(tokens, params, eos, decode)


@examples(200)
@given(st.text("aé漢😀", min_size=1, max_size=60), st.text("aé漢😀", min_size=1, max_size=3), st.integers(1, 7))
def test_a_stop_string_is_found_among_letters_of_several_tokens(text: str, stop: str, size: int):
    tokens = list(text.encode())
    params = SamplingParams(max_new_tokens=10_000, stop=stop)
    stopper = Stopper(params, (), in_bytes)
    feed(stopper, tokens, [size])
    assert (stopper.tokens, stopper.text, stopper.finish) == naive(tokens, params, set(), in_bytes)


@given(st.integers(0, 300), st.text("abc", min_size=1, max_size=60))
def test_a_stop_string_is_found_however_long_the_text_before_it(before: int, stop: str):
    tokens = [3] * before + [ord(letter) - 97 for letter in stop] + [3]
    stopper = Stopper(SamplingParams(max_new_tokens=1000, stop=stop), (), letters)
    assert feed(stopper, tokens, [5]) == tokens[:-1]
    assert (stopper.finish, stopper.text) == ("stop", "d" * before)


@given(TOKENS, st.text("abc", min_size=1, max_size=4))
def test_a_text_that_goes_on_is_shown_whole(tokens: list[int], stop: str):
    assume(stop not in letters(tokens))
    stopper = Stopper(SamplingParams(max_new_tokens=100, stop=stop), (), letters)
    stopper.take(tokens)
    assert (stopper.finish, stopper.text) == (None, letters(tokens))


def test_the_first_reason_in_the_order_of_the_text_counts():
    params = SamplingParams(max_new_tokens=3, stop="bc")
    for tokens, finish, kept in (
        ([0, 9, 1, 2], "eos", 2),
        ([1, 2, 9, 0], "stop", 2),
        ([0, 0, 0, 9], "length", 3),
        ([0, 0, 9, 0], "eos", 3),  # an end-of-sequence that is also the last token asked for
        ([0, 1, 2, 0], "stop", 3),
    ):
        stopper = Stopper(params, [9], letters)
        assert stopper.take(tokens) == tokens[:kept] and stopper.finish == finish


def test_nothing_comes_after_the_end():
    stopper = Stopper(SamplingParams(max_new_tokens=1), (), letters)
    stopper.take([0])
    with pytest.raises(AssertionError, match="after the end"):
        stopper.take([1])


@examples(300)
@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=6), st.text("abc", max_size=30))
def test_all_stop_strings_are_looked_for_at_once(stops: list[str], text: str):
    automaton, state = StopAutomaton(stops), 0
    beginnings = [stop[:size] for stop in stops for size in range(len(stop))]
    for end, letter in enumerate(text, 1):
        state = automaton.after(state, letter)
        before = text[:end]
        completed = {stops.index(stop) for stop in stops if before.endswith(stop)}
        assert set(automaton.ending(state)) == completed and automaton.ends(state) == bool(completed)
        assert automaton.begun[state] == max(len(one) for one in beginnings if before.endswith(one))


def test_a_token_costs_the_same_however_many_stop_strings_there_are():
    params = SamplingParams(max_new_tokens=1000, stop=tuple(chr(0x4E00 + number) for number in range(16384)))
    stopper, stream, began = Stopper(params, (), letters), TextStream(letters, params), time.thread_time()
    assert "".join(stream.add(stopper.take([0])) for _ in range(400)) == "a" * 400
    assert time.thread_time() - began < 1  # ten times as much with a look for each


def test_tokens_that_show_nothing_cost_the_same_one_after_another():
    read = []

    def decode(tokens: list[int]) -> str:
        read.append(len(tokens))
        return without_specials(tokens)

    params = SamplingParams(max_new_tokens=2000, ignore_eos=True, stop=("zz",))
    assert Stopper(params, (), decode).take([2] * 2000) == [2] * 2000
    assert max(read) < 100 and len(read) < 10_000
