"""Pieces of a text are whole characters, and joined they are the text, however it was cut into tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from pearl.core.params import SamplingParams
from pearl.core.stopping import Stopper, TextStream

HALF = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.sampled_from("ab \n\u00e9\u8868\u60c5\uff1b\U0001f389\U0001f468\u200d"), min_size=1, max_size=12)
STOPS = st.lists(st.sampled_from(["a", "ab", "\u8868\u60c5", "b \n"]), max_size=2)
SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


class ByteLevel:
    """Every token is some bytes."""

    def __init__(self, text: str, cut: Callable[[int], int]):
        self.words: list[bytes] = []
        data = text.encode()
        while data:
            size = cut(len(data))
            self.words.append(data[:size])
            data = data[size:]

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.words[token] for token in tokens).decode(errors="replace")

    def is_byte(self, token: int) -> bool:
        return False


class Fallback:
    """Characters that are no token are bytes, of which a run is decoded as a whole or not at all."""

    def __init__(self, text: str, cut: Callable[[int], int]):
        self.words: list[str] = []
        for letter in text:
            known = letter.isascii() and cut(2) == 1
            self.words += [letter.replace(" ", "\u2581")] if known else [f"<0x{byte:02X}>" for byte in letter.encode()]

    def decode(self, tokens: list[int]) -> str:
        return SENTENCEPIECE.decode([self.words[token] for token in tokens])

    def is_byte(self, token: int) -> bool:
        return self.words[token].startswith("<0x")


@pytest.mark.parametrize("kind", [ByteLevel, Fallback])
@given(data=st.data(), text=TEXTS, stop=STOPS)
def test_pieces_of_any_text_that_ends_anywhere_are_its_beginning(kind, data, text, stop):
    words = kind(text, lambda most: data.draw(st.integers(1, most)))
    most = data.draw(st.integers(1, len(words.words)))
    stopper = Stopper(SamplingParams(max_new_tokens=most, stop=tuple(stop)), (), words.decode)
    stream, said = TextStream(words.decode, stop, words.is_byte), ""
    for token in range(most):
        if stopper.finish is None:
            said += stream.add(stopper.take([token]))
            assert HALF not in said
    assert stopper.text.startswith(said)
    assert said + stream.end(stopper.text) == stopper.text


def test_a_character_comes_with_its_last_byte_and_a_stop_string_never():
    words = ByteLevel("\u8868ab", lambda _: 1)
    stream = TextStream(words.decode, ["ax", "b"])
    assert [stream.add([token]) for token in range(5)] == ["", "", "\u8868", "", "a"]
    assert stream.end("\u8868a") == ""


def test_a_run_of_bytes_is_certain_only_when_it_is_over():
    words = Fallback("\u8868\u60c5a", lambda _: 1)
    stream = TextStream(words.decode, (), words.is_byte)
    assert [stream.add([token]) for token in range(7)] == [""] * 6 + ["\u8868\u60c5a"]
