"""Texts without the part that repeats their prompt: a chat model writes a function's head again before its body.

That part is easy to guess, and flatters whoever guesses. A pass that committed any token of it is left out, with all of
its tokens; what is left has its own passes and seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pearl.core.records import GenerationStats, SampleKey

Runs = Mapping[SampleKey, GenerationStats]
Decode = Callable[[Sequence[int]], str]


def left_out(
    runs: Runs, spans: Callable[[SampleKey, str], tuple[int, int]], decode: Decode
) -> dict[SampleKey, GenerationStats]:
    """`spans`: of a text, where the part begins and ends, in characters. Texts of which nothing is left fall away."""
    found = {key: _without(text, _tokens(text, spans(key, text.text), decode)) for key, text in runs.items()}
    return {key: text for key, text in found.items() if text.passes}


def _tokens(text: GenerationStats, span: tuple[int, int], decode: Decode) -> tuple[int, int]:
    """The same in tokens: the first that belongs to it, and the first after it."""
    begin, end = span
    if begin >= end:
        return 0, 0
    return _first(text.tokens, begin + 1, decode) - 1, _first(text.tokens, end, decode)


def _first(tokens: Sequence[int], characters: int, decode: Decode) -> int:
    """How many tokens it takes to write so many characters."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(decode(tokens[:middle])) >= characters else (middle + 1, high)
    return low


def _without(text: GenerationStats, span: tuple[int, int]) -> GenerationStats:
    tokens: list[int] = []
    passes, at = [], 0
    for one in text.passes:
        committed = range(at, at + one.committed)
        at += one.committed
        if committed.stop <= span[0] or committed.start >= span[1]:
            passes.append(one)
            tokens += text.tokens[committed.start : committed.stop]
    return replace(text, tokens=tuple(tokens), passes=tuple(passes))
