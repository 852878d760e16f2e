"""Pieces of a text are whole characters, and joined they are the text, however it was cut into tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from toys import examples

from pearl.core.detokenizer import TextDecoder
from pearl.core.params import SamplingParams
from pearl.core.stopping import Stopper, TextStream

HALF = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.sampled_from("ab \n\u00e9\u8868\u60c5\uff1b\U0001f389\U0001f468\u200d"), min_size=1, max_size=12)
STOP_TEXTS = ["a", "ab", "\u8868\u60c5", "b \n"]
STOPS = st.lists(st.sampled_from(STOP_TEXTS), max_size=2)
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


class Specials:
    """Another tokenizer with a special token here and there, which is shown only if that is asked for."""

    SHOWN = ("<|a|>", "<|b|>")

    def __init__(self, words: ByteLevel | Fallback, special: Callable[[], int | None]):
        self._words, self._specials, self.count = words, {}, 0
        for _ in range(2 * len(words.words)):
            if (which := special()) is not None:
                self._specials[self.count] = which
            self.count += 1

    def _own(self, token: int) -> int:
        return (token - sum(at < token for at in self._specials)) % len(self._words.words)

    def plain(self, tokens: list[int]) -> str:
        return self._words.decode([self._own(token) for token in tokens if token not in self._specials])

    def whole(self, tokens: list[int]) -> str:
        """A special token ends a run of bytes."""
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token not in self._specials:
                run.append(self._own(token))
            else:
                text += self._words.decode(run) + ("" if token is None else self.SHOWN[self._specials[token]])
                run = []
        return text

    def is_byte(self, token: int) -> bool:
        return token not in self._specials and self._words.is_byte(self._own(token))

    @property
    def decoder(self) -> TextDecoder:
        return TextDecoder(self.plain, self.whole, self.is_byte)


@pytest.mark.parametrize("kind", [ByteLevel, Fallback])
@given(data=st.data(), text=TEXTS, stop=STOPS)
def test_pieces_of_any_text_that_ends_anywhere_are_its_beginning(kind, data, text, stop):
    words = kind(text, lambda most: data.draw(st.integers(1, most)))
    most = data.draw(st.integers(1, len(words.words)))
    stopper = Stopper(SamplingParams(max_new_tokens=most, stop=tuple(stop)), (), words.decode)
    stream, said = TextStream(TextDecoder(words.decode, None, words.is_byte), SamplingParams(stop=stop)), ""
    for token in range(most):
        if stopper.finish is None:
            said += stream.add(stopper.take([token]))
            assert HALF not in said
    assert stopper.text.startswith(said)
    assert said + stream.end(stopper.text) == stopper.text


@pytest.mark.parametrize("kind", [ByteLevel, Fallback])
@examples(300)
@given(data=st.data(), text=TEXTS, stop=st.lists(st.sampled_from([*STOP_TEXTS, "<|a|>", "a<|", "|>b"]), max_size=2))
def test_a_text_with_special_tokens_ends_and_is_shown_as_by_looking_at_all_of_it(kind, data, text, stop):
    words = Specials(
        kind(text, lambda most: data.draw(st.integers(1, most))),
        lambda: data.draw(st.sampled_from([None, None, None, 0, 1])),
    )
    most = data.draw(st.integers(1, words.count))
    params = SamplingParams(
        max_new_tokens=most,
        stop=tuple(stop),
        stop_token_ids=data.draw(st.lists(st.integers(0, words.count), max_size=1)),
        include_stop_str_in_output=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, min(3, most))),
    )
    stopper, stream, said = Stopper(params, (), words.decoder), TextStream(words.decoder, params), ""
    for token in range(most):
        if stopper.finish is None:
            said += stream.add(stopper.take([token]))
    assert said + stream.end(stopper.text) == stopper.text and stopper.text.startswith(said)
    assert (stopper.finish, stopper.reason) in ends(words, params, stopper.tokens)
    for count in range(1, len(stopper.tokens)):
        assert not ends(words, params, stopper.tokens[:count]), "it ends where it first could"
    shown = words.plain if params.skip_special_tokens else words.whole
    if isinstance(stopper.reason, int):
        assert stopper.text == shown(stopper.tokens[: len(stopper.tokens) - (not params.include_stop_str_in_output)])
    else:
        assert shown(stopper.tokens).startswith(stopper.text)
    if stopper.finish == "length":
        assert stopper.text == shown(stopper.tokens)
    if isinstance(stopper.reason, str) and stopper.reason in shown(stopper.tokens):
        at = shown(stopper.tokens).find(stopper.reason)
        if len(params.stop) == 1 and not params.min_tokens:
            assert stopper.text == shown(stopper.tokens)[: at + len(stopper.reason) * params.include_stop_str_in_output]


def ends(words: Specials, params: SamplingParams, tokens: list[int]) -> list[tuple[str, str | int | None]]:
    """Why a text of these tokens may end at the last of them."""
    found: list[tuple[str, str | int | None]] = []
    if tokens[-1] in params.stop_token_ids:
        return [("stop", tokens[-1])]
    if len(tokens) > (params.min_tokens or 0):
        for decode in (words.plain, words.whole):
            text, first = decode(tokens), len(decode(tokens[: params.min_tokens or 0]))
            found += [("stop", s) for s in params.stop if text.find(s, max(0, first - len(s) + 1)) >= 0]
    if not found and len(tokens) == params.max_new_tokens:
        return [("length", None)]
    return found


def test_the_text_before_a_special_token_that_stops_it_is_shown():
    words = Specials(ByteLevel("abcdef", lambda _: 1), iter([None, None, 0, *[None] * 20]).__next__)
    for stop, include, skip, text in (
        ("<|a|>", False, True, "ab"),
        ("<|a|>", True, True, "ab"),
        ("<|a|>", True, False, "ab<|a|>"),
        ("b<|a|>", False, True, "a"),
        ("b<|a|>", True, True, "ab"),
        ("bc", False, True, "a"),
        ("bc", False, False, "a"),
        ("a|>c", False, True, "ab"),
        ("<|a|>", False, False, "ab"),
    ):
        params = SamplingParams(stop=stop, include_stop_str_in_output=include, skip_special_tokens=skip)
        stopper = Stopper(params, (), words.decoder)
        stopper.take([0, 1, 2, 3])
        assert (stopper.text, stopper.finish, stopper.reason) == (text, "stop", stop)


def test_a_token_costs_the_same_however_long_the_text_is():
    for letters, is_byte in ((b"ab", lambda token: False), (b"\xff", lambda token: False), (b"ab", lambda token: True)):
        sizes: list[int] = []

        def decode(tokens: list[int], letters: bytes = letters, sizes: list[int] = sizes) -> str:
            sizes.append(len(tokens))
            return bytes(letters[token % len(letters)] for token in tokens).decode(errors="replace")

        stream = TextStream(TextDecoder(decode, None, is_byte))
        for token in range(2000):
            stream.add([token])
        assert sum(sizes) < 2000 * 60


def test_a_token_costs_the_same_however_long_a_stop_string_is():
    stream = TextStream(lambda tokens: "a" * len(tokens), SamplingParams(stop="a" * 100_000 + "b"))
    began = time.process_time()
    assert [stream.add([0]) for _ in range(300)] == [""] * 300, "all of it may be the beginning"
    assert time.process_time() - began < 3, "not a tenth of a second each"


def test_a_character_comes_with_its_last_byte_and_a_stop_string_never():
    words = ByteLevel("\u8868ab", lambda _: 1)
    stream = TextStream(words.decode, SamplingParams(stop=["ax", "b"]))
    assert [stream.add([token]) for token in range(5)] == ["", "", "\u8868", "", "a"]
    assert stream.end("\u8868a") == ""


def test_a_run_of_bytes_is_certain_only_when_it_is_over():
    words = Fallback("\u8868\u60c5a", lambda _: 1)
    stream = TextStream(TextDecoder(words.decode, None, words.is_byte))
    assert [stream.add([token]) for token in range(7)] == [""] * 6 + ["\u8868\u60c5a"]


def test_a_stop_string_that_does_not_count_yet_lets_nothing_out():
    """A special token that may not end the text yet stands between both halves of a stop string that may."""
    words = ["ba", "ab", "<s>"]

    def decode(tokens) -> str:
        return "".join(words[token] for token in tokens if token < 2)

    def whole(tokens) -> str:
        return "".join(words[token] for token in tokens)

    params = SamplingParams(stop=("aa", "<s>"), min_tokens=2, max_new_tokens=9)
    decoder = TextDecoder(decode, whole)
    stopper, stream = Stopper(params, (), decoder), TextStream(decoder, params)
    pieces = "".join(stream.add(stopper.take([token])) for token in (0, 2, 1))
    assert stopper.text == "b" and stopper.text.startswith(pieces)
